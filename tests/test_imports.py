"""What is not loaded before it is needed: each import costs whoever waits for the first line of output."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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


def loaded(code: str, *names: str) -> list[str]:
    """Which of ``names`` a fresh process has loaded after ``code``."""
    said = f"import sys\n{code}\nprint('loaded:', *(name for name in {names!r} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1].removeprefix("loaded:").split()


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("import trimtab", ("torch", "pydantic", *HEAVY)),
        ("import trimtab; trimtab.attach", ("transformers", *HEAVY)),
        ("import trimtab.config.read, trimtab.reports.run.run_tables", ("torch", "transformers", *HEAVY)),
        ("import trimtab.memory.suggest, trimtab.training.rate_plan", ("transformers.trainer", *HEAVY)),
        ("import trimtab.runs.load", ("transformers.trainer", *HEAVY)),
        (HELP, ("torch", "transformers", *HEAVY)),
    ],
    ids=["package", "attach", "configuration and tables", "plan", "generate", "help"],
)
def test_what_is_not_needed_is_not_loaded(code: str, names: tuple[str, ...]) -> None:
    assert loaded(code, *names) == []
