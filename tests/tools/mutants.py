"""Mutation testing: does a test fail for each small fault in ``ops/`` and ``methods/``?

    python tests/tools/mutants.py                          every mutant of both folders (make mutants)
    python tests/tools/mutants.py --only ops/ratio.py      of one file
    python tests/tools/mutants.py --resume                 go on where it was cut off, or where the library changed
    python tests/tools/mutants.py --again --seconds 60     those that lived and have no reason yet, with more tests
    python tests/tools/mutants.py --again --tests tests/ops/test_stamp.py      those, with tests that are new
    python tests/tools/mutants.py --page                   write the page again, with new reasons

A mutant is the library with one expression changed: a comparison, a sum, a constant, a condition, a result, the order
of two arguments, a call left out. Each meets tests of ``killing.TESTS`` that run its line until one of them fails.
They are tried in eight rounds, every eighth of each file in a round, so that a run that is cut off has an even sample.
What lives is listed in tests/mutants.md with the reason why no test can see it, from tests/mutants.yaml; a row without
a reason is work to do.

Why not mutmut: version 3.8 leaves out functions with two decorators, which are the backward passes here, and puts a
call of its own into every function, which the compiler that other tests use cannot follow.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from killing import TESTS, run
from mutating import ROOT, SOURCE, Mutant, mutants

PAGE = ROOT / "tests" / "mutants.md"
REASONS = ROOT / "tests" / "mutants.yaml"
FOLDERS = ("ops", "methods")
ROUNDS = (0, 4, 2, 6, 1, 5, 3, 7)
Results = dict[str, dict[str, Any]]


def name_of(mutant: Mutant) -> str:
    """Place and change as they stand on the page, without line numbers, which every edit would move."""
    number = f" ({mutant.number + 1})" if mutant.number else ""
    return f"{mutant.file} {mutant.place}{number}: {mutant.before} -> {mutant.after}"


def reasons() -> dict[str, str]:
    """Why mutants live, by their names. One reason may be that of many."""
    groups = yaml.safe_load(REASONS.read_text("utf-8")) if REASONS.is_file() else []
    return {name: group["why"] for group in groups for name in group["mutants"]}


def write_page(results: Results, every: list[Mutant]) -> None:
    """The page: how many mutants of each file were tried and found, and those that live."""
    known, lines = reasons(), []
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for mutant in every:
        counts[mutant.file][0] += 1
        if one := results.get(repr(mutant)):
            counts[mutant.file][1] += 1
            counts[mutant.file][2] += not one["lives"]
            if one["lives"]:
                before, after = (text.replace("|", "\\|") for text in (mutant.before, mutant.after))
                number = f" ({mutant.number + 1})" if mutant.number else ""
                why = known.pop(name_of(mutant), "**no reason yet**")
                lines.append(f"| `{mutant.file}` {mutant.place}{number} | `{before}` | `{after}` | {why} |")
    total, tried, found = (sum(count[part] for count in counts.values()) for part in (0, 1, 2))
    table = [
        f"| `{file}` | {all_} | {some} | {dead} | {f'{100 * dead / some:.0f} %' if some else ''} |"
        for file, (all_, some, dead) in counts.items()
    ]
    open_ = sum("**no reason yet**" in line for line in lines)
    share = (
        "All of them were tried"
        if tried == total
        else f"A sample of {tried:,} was tried: every eighth of each file in turn, for as long as the run lasted, less "
        "those in functions that have changed since"
    )
    text = [
        "# Mutants",
        "",
        f"`make mutants` makes {total:,} small faults in `ops/` and `methods/`, one at a time, and runs tests against",
        "each: those of these folders, of the bases and of the surgery, and the contract suite.",
        f"{share}. The tests found {found:,}: **{100 * found / max(tried, 1):.1f} %**.",
        "Those that live are below with the reason why no test can see them"
        + (f"; {open_} have none yet." if open_ else "."),
        "",
        "| file | mutants | tried | found | share |",
        "| --- | --- | --- | --- | --- |",
        *table,
        f"| **all** | {total} | {tried} | {found} | {100 * found / max(tried, 1):.1f} % |",
        "",
        "| place | was | is | why it lives |",
        "| --- | --- | --- | --- |",
        *lines,
        "",
    ]
    PAGE.write_text("\n".join(text), "utf-8")
    for name in known.keys() - {name_of(mutant) for mutant in every}:
        print(f"{REASONS.name} gives a reason for what is no mutant any more: {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="files below src/trimtab, such as ops/ratio.py")
    parser.add_argument("--resume", action="store_true", help="keep the results of functions that are as they were")
    parser.add_argument(
        "--again", action="store_true", help="only those that lived the last time and have no reason yet"
    )
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="of tests for each: of ops and methods, and of others"
    )
    parser.add_argument("--jobs", type=int, default=2, help="so many mutants at once")
    parser.add_argument("--tests", nargs="*", default=TESTS, help="files and folders of tests (%(default)s)")
    parser.add_argument("--state", type=Path, default=ROOT / ".mutants", help="folder of results (%(default)s)")
    parser.add_argument("--list", action="store_true", help="print the mutants and run none")
    parser.add_argument("--page", action="store_true", help="write the page and run none")
    said = parser.parse_args()
    by_file = {
        name: mutants(name)
        for folder in FOLDERS
        for name in (str(path.relative_to(SOURCE)) for path in sorted((SOURCE / folder).rglob("*.py")))
    }
    every = [mutant for some in by_file.values() for mutant in some]
    wanted = said.only or list(by_file)
    if said.list:
        print(*(mutant for file in wanted for mutant in by_file[file]), sep="\n")
        return
    said.state.mkdir(exist_ok=True)
    place = said.state / "results.json"
    results: Results = json.loads(place.read_text("utf-8")) if place.is_file() else {}
    chosen = [mutant for part in ROUNDS for file in wanted for mutant in by_file[file][part :: len(ROUNDS)]]
    if said.page:
        chosen = []
    elif said.again:
        known = reasons()
        chosen = [one for one in chosen if results.get(repr(one), {}).get("lives") and name_of(one) not in known]
    elif said.resume:
        chosen = [mutant for mutant in chosen if repr(mutant) not in results]
    else:
        results = {name: one for name, one in results.items() if one["mutant"]["file"] not in wanted}
    place.write_text(json.dumps(results), "utf-8")

    def told(mutant: Mutant, lives: bool) -> None:
        results = json.loads(place.read_text("utf-8"))  # the file and no variable: this is called in two processes
        results[repr(mutant)] = {"mutant": asdict(mutant), "lives": lives}
        part = place.with_suffix(".part")
        part.write_text(json.dumps(results), "utf-8")
        part.replace(place)
        if lives:
            print(f"lives: {name_of(mutant)}", flush=True)

    try:
        if chosen:
            run(chosen, told, jobs=said.jobs, seconds=said.seconds, tests=said.tests, cache=said.state)
    finally:
        write_page(json.loads(place.read_text("utf-8")), every)
    print(f"{PAGE.relative_to(ROOT)} has the result")


if __name__ == "__main__":
    os.chdir(ROOT)
    # The package of this working tree, and one thread, so that a fork is a whole process.
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before torch loads Triton, which asks for it but once
    main()
