"""Run the pattern study: full fine-tuning, LoRA and DoRA, and how magnitude and direction of their weights change.

    python studies/pattern/run.py studies/pattern/study.yaml [key.sub=value ...]

Settings given as key.sub=value go into the study's base. It goes on where it stopped: every finished run is on disk,
and none is run twice. At the end it prints the correlations and writes ``pattern.json``, ``pattern.csv`` and
``pattern.html`` with its pictures into the study's folder, ``results`` beside the YAML. ``pattern_study.py`` says what
the YAML may hold.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trimtab.cli.exits import program

if TYPE_CHECKING:
    from pattern_study import PatternCell


def main(arguments: Sequence[str]) -> int:
    return program(arguments, __doc__, run)


def run(file: str, *overrides: str) -> None:
    from pattern_page import pattern_table, write_pattern_page
    from pattern_results import write_results
    from pattern_study import load_pattern_study, run_cells
    from trimtab.cli.displays.console import Terminal
    from trimtab.cli.displays.run import RunDisplay
    from trimtab.errors import STOPS, Interrupted, RunError
    from trimtab.files import read_json
    from trimtab.runs.lock import locked

    console = Terminal()
    if not console.is_terminal:
        console.width = 140  # in a file or a pipe no line of the table has to be cut
    study = load_pattern_study(file, overrides)
    results: list[tuple[PatternCell, dict[str, Any]]] = []
    failed: list[tuple[PatternCell, str]] = []
    stopped: BaseException | None = None
    try:
        with locked(study.folder / "cells" / ".lock"), RunDisplay(console) as display:
            for result in run_cells(study.cells, display, failed):
                results.append(result)
                write_results(study, results)
    except (*STOPS, Interrupted) as stop:
        stopped = stop
    if results:
        page = write_pattern_page(study.folder)
        console.print()
        console.print(pattern_table(read_json(study.folder / "pattern.json")))
        console.print(f"\npage: {page}", soft_wrap=True)
    reasons = "".join(f"\n  {cell}: {reason}" for cell, reason in failed)
    if stopped is not None:
        raise Interrupted.by(stopped, f"stopped; every finished run is kept. Go on with the same command.{reasons}")
    if failed:
        raise RunError(f"{len(failed)} of the study's runs failed; the same command tries them again:{reasons}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
