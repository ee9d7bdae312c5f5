"""Mutation testing: does a test fail for each small fault in ``ops/`` and ``methods/``?

    python tests/tools/mutants.py                          every mutant of both folders (make mutants)
    python tests/tools/mutants.py --only ops/ratio.py      of one file
    python tests/tools/mutants.py --sample 20              at most 20 of a file, always the same ones
    python tests/tools/mutants.py --again                  those that lived the last time

A mutant is the library with one expression changed: a comparison, a sum, a constant, a condition, a result, the order
of two arguments, a call left out. Each meets the tests of ``killing.TESTS`` until one of them fails. What lives is
listed in tests/mutants.md with the reason why no test can see it; a row without a reason is work to do. The page keeps
its reasons when it is written again.

Why not mutmut: version 3.8 leaves out functions with two decorators, which are the backward passes here, and puts a
call of its own into every function, which the compiler that other tests use cannot follow.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import sys
from collections import defaultdict
from dataclasses import asdict
from typing import Any

from killing import run
from mutating import ROOT, SOURCE, Mutant, mutants

PAGE = ROOT / "tests" / "mutants.md"
RESULTS = ROOT / ".mutants.json"
FOLDERS = ("ops", "methods")


def reasons() -> dict[str, str]:
    """What the page says of mutants that live, by their place and change."""
    if not PAGE.is_file():
        return {}
    rows = [line.split(" | ") for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| `")]
    return {" | ".join(row[:-1]): row[-1].removesuffix(" |").strip() for row in rows}


def row_of(mutant: Mutant) -> str:
    """Place and change as they stand on the page, without line numbers, which every edit would move."""
    before, after = (text.replace("|", "\\|") for text in (mutant.before, mutant.after))
    number = f" ({mutant.number + 1})" if mutant.number else ""
    return f"| `{mutant.file}` {mutant.place}{number} | `{before}` | `{after}`"


def write_page(results: dict[str, dict[str, Any]], sampled: int | None) -> None:
    """The page of those that live, and how many there are of a file."""
    known, lines = reasons(), []
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for one in results.values():
        mutant = Mutant(**one["mutant"])
        counts[mutant.file][0] += 1
        counts[mutant.file][1] += not one["lives"]
        if one["lives"]:
            row = row_of(mutant)
            lines.append(f"{row} | {known.get(row, '**no reason yet**')} |")
    total, killed = (sum(count[part] for count in counts.values()) for part in (0, 1))
    share = f"at most {sampled} of a file, drawn with a fixed seed" if sampled else "all of them"
    table = [f"| `{file}` | {all_} | {dead} | {100 * dead / all_:.0f} % |" for file, (all_, dead) in counts.items()]
    open_ = sum("**no reason yet**" in line for line in lines)
    text = [
        "# Mutants",
        "",
        f"Made by `make mutants` ({share}): {total} small faults in `ops/` and `methods/`, of which the tests of these",
        f"folders and the contract suite find {killed}: **{100 * killed / max(total, 1):.1f} %**. Those that live are",
        "listed below with the reason why no test can see them" + (f"; {open_} have none yet." if open_ else "."),
        "",
        "| file | mutants | found | share |",
        "| --- | --- | --- | --- |",
        *table,
        "",
        "| place | was | is | why it lives |",
        "| --- | --- | --- | --- |",
        *lines,
        "",
    ]
    PAGE.write_text("\n".join(text), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="files below src/trimtab, such as ops/ratio.py")
    parser.add_argument("--sample", type=int, help="at most so many mutants of a file")
    parser.add_argument("--again", action="store_true", help="only those that lived the last time")
    parser.add_argument("--jobs", type=int, default=2, help="so many mutants at once")
    parser.add_argument("--list", action="store_true", help="print the mutants and run none")
    said = parser.parse_args()
    files = said.only or [
        str(path.relative_to(SOURCE)) for folder in FOLDERS for path in sorted((SOURCE / folder).rglob("*.py"))
    ]
    results = _results() if said.again or said.only else {}
    chosen: list[tuple[Mutant, ast.Module]] = []
    for file in files:
        every = mutants(file)
        if said.sample and len(every) > said.sample:
            every = random.Random(file).sample(every, said.sample)
        if said.again:
            every = [(mutant, tree) for mutant, tree in every if results.get(repr(mutant), {}).get("lives")]
        else:
            results = {name: one for name, one in results.items() if one["mutant"]["file"] != file}
        chosen += every
    if said.list:
        print(*(mutant for mutant, _ in chosen), sep="\n")
        return
    RESULTS.write_text(json.dumps(results), "utf-8")

    def told(mutant: Mutant, lives: bool) -> None:
        results = _results()  # the file and no variable: this is called in more than one process
        results[repr(mutant)] = {"mutant": asdict(mutant), "lives": lives}
        RESULTS.write_text(json.dumps(results), "utf-8")
        if lives:
            print(f"lives: {mutant}", flush=True)
        write_page(results, said.sample)  # after each: an hour that is cut off has its page

    run(chosen, told, said.jobs)
    lived = sum(results[repr(mutant)]["lives"] for results in [_results()] for mutant, _ in chosen)
    print(f"{len(chosen) - lived} of {len(chosen)} found; {PAGE.relative_to(ROOT)} lists the others")


def _results() -> dict[str, dict[str, Any]]:
    return json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}


if __name__ == "__main__":
    os.chdir(ROOT)
    # The package of this working tree, and one thread, so that a fork is a whole process.
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
