"""How long it takes until something can begin: imports, the help text, attaching and loading adapters.

    python benchmarks/startup.py

Imports and the help text are processes of their own, in turns; ``import trimtab`` is given beyond ``import torch``,
which it needs for nearly all it does. Attaching and loading are SmolLM2-135M with DoRA of rank 16 on all seven
projections, beside PEFT's.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import alternate, show, write_results

TOUCH = "import trimtab; [getattr(trimtab, name) for name in trimtab.__all__]"
PROCESSES = {
    "python": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import torch, trimtab": ["-c", "import torch, trimtab"],
    "... and every public name": ["-c", f"import torch; {TOUCH}"],
    "trimtab --help": ["-c", "import sys; sys.argv = ['trimtab', '--help']; from trimtab.cli import main; main()"],
}


def process(arguments: list[str]) -> Callable[[], None]:
    """A function that runs Python with ``arguments``."""

    def run() -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

    return run


def surgery(folder: Path) -> dict[str, Callable[[], None]]:
    """What attaches and loads, ours and PEFT's."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    import trimtab
    from trimtab.models.load import load_model
    from trimtab.models.locate import locate

    model: Any = load_model(locate("smollm2-135m"), torch.bfloat16).requires_grad_(False)
    plan = trimtab.Plan([trimtab.Rule(match="all-linear", method="dora", rank=16)])
    config = LoraConfig(r=16, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    trimtab.attach(model, plan)
    trimtab.save_adapter(model, folder)
    trimtab.detach(model)

    def ours(put: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            put()
            trimtab.detach(model)

        return run

    def theirs(put: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            put().unload()

        return run

    return {
        "attach, trimtab": ours(lambda: trimtab.attach(model, plan)),
        "attach, PEFT": theirs(lambda: get_peft_model(model, config)),
        "load, trimtab": ours(lambda: trimtab.load_adapter(model, folder)),
        "load, PEFT": theirs(lambda: PeftModel.from_pretrained(model, str(folder))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    said = parser.parse_args()
    seconds = alternate({name: process(arguments) for name, arguments in PROCESSES.items()}, said.repeats)
    with tempfile.TemporaryDirectory() as folder:
        seconds |= alternate(surgery(Path(folder)), said.repeats)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    beyond = medians["import torch, trimtab"] - medians["import torch"]
    rows = [[name, f"{median:.3f}"] for name, median in medians.items()]
    show(
        f"seconds, medians of {said.repeats}",
        ["", "seconds"],
        [*rows, ["import trimtab, beyond torch", f"{beyond:.3f}"]],
    )
    write_results("startup", {"repeats": said.repeats}, {"seconds": seconds, "beyond_torch": beyond})


if __name__ == "__main__":
    main()
