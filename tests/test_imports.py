"""What is not loaded before it is needed: each import costs whoever waits for the first line of output."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Drawing, scoring, other people's data sets, other people's adapters: none of it is wanted to attach an adapter.
HEAVY = ("matplotlib", "sklearn", "datasets", "pandas", "peft", "bitsandbytes", "optuna")

HELP = """
sys.argv = ["trimtab", "--help"]
from trimtab.cli import main
try:
    main()
except SystemExit:
    pass
"""


# One process does them all, in an order in which each may load more: ``step -> (code, what must not be loaded)``.
STEPS = {
    "package": ("import trimtab", ("torch", "pydantic", *HEAVY)),
    "configuration and tables": (
        "import trimtab.config.read, trimtab.reports.run.run_tables",
        ("torch", "transformers", *HEAVY),
    ),
    "help": (HELP, ("torch", "transformers", *HEAVY)),
    "attach": ("import trimtab; trimtab.attach", ("transformers", *HEAVY)),
    "generate": ("import trimtab.runs.load", ("transformers.trainer", *HEAVY)),
    "plan": ("import trimtab.memory.described, trimtab.training.rate_plan", ("transformers.trainer", *HEAVY)),
}


def test_what_is_not_needed_is_not_loaded() -> None:
    said = "import sys\n"
    for step, (code, names) in STEPS.items():
        said += f"{code}\nprint('loaded:', {step!r}, *(name for name in {names!r} if name in sys.modules))\n"
    result = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    told = [line.removeprefix("loaded: ") for line in result.stdout.splitlines() if line.startswith("loaded:")]
    assert told == list(STEPS)
