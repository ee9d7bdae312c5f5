"""Run the memory study: let each method memorise random pairs of identifiers, at equal numbers of trained parameters.

    python studies/memorize/run.py studies/memorize/study.yaml [key=value ...]

Settings given as key=value take the place of the file's, such as seeds=5, methods=[lora,dora] or output=elsewhere. A
cell is a method at a budget with a learning rate and a seed. Finished cells are kept: the same command goes on where it
stopped, and more methods, budgets, rates or seeds can be asked for later. At the end it prints a table, and writes
``memorize.json``, ``memorize.csv`` and ``memorize.html`` with its picture into the output folder.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from trimtab.cli.exits import program


def main(arguments: Sequence[str]) -> int:
    return program(arguments, __doc__, run)


def run(file: str, *overrides: str) -> None:
    from memory_bench import memorize
    from memory_display import MemoryDisplay
    from memory_page import arms_table, footnote, write_memory_page
    from memory_study import load_memory_study
    from trimtab.cli.displays.console import Terminal

    study, out = load_memory_study(file, overrides)
    console = Terminal()
    if not console.is_terminal:
        console.width = 130  # in a file or a pipe no line of the table has to be cut
    with MemoryDisplay(console) as display:
        results = memorize(study, out, display)
    page = write_memory_page(out)
    console.print()
    console.print(arms_table(results))
    for line in (footnote(results), f"results: {out / 'memorize.json'}, {out / 'memorize.csv'}", f"page: {page}"):
        console.print(line, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
