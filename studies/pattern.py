"""Run the pattern study: full fine-tuning, LoRA and DoRA, and how magnitude and direction of their weights change.

    python studies/pattern.py studies/pattern.yaml [key.sub=value ...]

Settings given as key.sub=value go into the study's base. It goes on where it stopped: every finished run is on disk,
and none is run twice. At the end it prints the correlations and writes ``pattern.json``, ``pattern.csv`` and
``pattern.html`` with its pictures into the study's folder, by default one beside the YAML of its name.
`trimtab.studies.pattern` says what the YAML may hold.
"""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console

from trimtab.cli.displays.run import Display
from trimtab.errors import Interrupted, TrimtabError
from trimtab.files import locked, read_json
from trimtab.reports.pattern import pattern_table, write_pattern_page
from trimtab.studies.pattern import Cell, load_study, run_study
from trimtab.studies.pattern_results import write_results


def main(arguments: list[str]) -> int:
    if not arguments or "--help" in arguments:
        print(__doc__)
        return 0 if arguments else 2
    console = Console()
    if not console.is_terminal:
        console.width = 140  # the table's: in a file or a pipe nothing has to be cut
    results: list[tuple[Cell, dict[str, Any]]] = []
    failed: list[tuple[Cell, str]] = []
    code = 0
    try:
        study = load_study(arguments[0], arguments[1:])
        with locked(study.folder / "cells" / ".lock"), Display(console) as display:
            for result in run_study(study.cells, display, failed):
                results.append(result)
                write_results(study, results)
    except (KeyboardInterrupt, Interrupted):
        code = 130
    except TrimtabError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1
    if results:
        page = write_pattern_page(study.folder)
        console.print()
        console.print(pattern_table(read_json(study.folder / "pattern.json")))
        console.print(f"\npage: {page}", highlight=False, soft_wrap=True)
    for cell, reason in failed:
        console.print(f"failed: {cell}: {reason}", style="red", markup=False, highlight=False, soft_wrap=True)
    if code == 130:
        console.print("\nstopped; every finished run is kept. Go on with the same command.")
    return code or int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
