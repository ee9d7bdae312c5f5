"""Mutation testing: does a test fail for each small fault in ``ops/`` and ``methods/``?

    python tests/tools/mutants.py                          every mutant of both folders (make mutants)
    python tests/tools/mutants.py --only ops/ratio.py      of one file
    python tests/tools/mutants.py --sample 20              at most 20 of a file, always the same ones
    python tests/tools/mutants.py --again                  those that lived the last time

A mutant is the library with one expression changed: a comparison, a sum, a constant, a condition, a result, the order
of two arguments, a call left out. Each runs against the quick tests of these folders until one of them fails. What
lives is listed in tests/mutants.md with the reason why no test can see it; a row without a reason is work to do. The
page keeps its reasons when it is written again.

Why not mutmut: version 3.8 leaves out functions with two decorators, which are the backward passes here, and puts a
call of its own into every function, which the compiler that other tests use cannot follow.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import importlib.abc
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "trimtab"
PAGE = ROOT / "tests" / "mutants.md"
RESULTS = ROOT / ".mutants.json"
FOLDERS = ("ops", "methods")
# Run one after the other until a test fails, after the file of tests that has the mutant's own name.
STAGES = (
    ("tests/contract/test_contract.py",),
    ("tests/ops", "tests/methods", "tests/surgery/test_serving.py"),
    ("tests/contract", "tests/bases"),
)
# Plugins that are loaded before pytest begins are loaded for the fork's sake, and warnings are errors.
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "--tb=no", "-W", "ignore::pytest.PytestAssertRewriteWarning")
SECONDS = 300  # a mutant that runs longer is in a loop without end, and counts as found
COMPARE = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In},
}
COMPUTE = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult},
}
# Calls that can be left out of a chain and leave something of the same shape, or of the shape turned round.
DROPPED_CALLS = {"t", "detach", "sqrt", "square", "abs", "conj"}
# What a person reads, and no computation: no mutants in there.
WORDS = {"description", "match", "message"}


@dataclass(frozen=True)
class Mutant:
    """One change of one file: where it is, and what stands there before and after."""

    file: str
    place: str
    before: str
    after: str
    number: int
    """Which of the changes of this kind at this place."""

    def __str__(self) -> str:
        return f"{self.file} {self.place}: `{self.before}` -> `{self.after}`"


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What a node may be changed into."""

    def like(**new: Any) -> Any:
        made = copy.deepcopy(node)
        for name, value in new.items():
            setattr(made, name, value)
        return made

    match node:
        case ast.Compare(ops=[op]) if type(op) in COMPARE:
            yield like(ops=[COMPARE[type(op)]()])
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in COMPUTE:
            yield like(op=COMPUTE[type(op)]())
        case ast.BoolOp(op=op):
            yield like(op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not(), operand=inside) | ast.UnaryOp(op=ast.USub(), operand=inside):
            yield inside
        case ast.Constant(value=bool() as value):
            yield like(value=not value)
        case ast.Constant(value=int() as value):
            yield like(value=value + 1)
        case ast.Constant(value=float() as value):
            yield like(value=2 * value if value else 1.0)
        case ast.Return(value=ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            yield like(value=ast.Constant(None))
        case ast.If(test=test) | ast.IfExp(test=test) if not isinstance(test, ast.Compare | ast.UnaryOp):
            yield like(test=ast.UnaryOp(ast.Not(), test))
        case ast.Expr(value=ast.Call()) | ast.Raise():
            yield ast.Pass()
        case ast.Call(func=ast.Attribute(value=inside, attr=name)) if name in DROPPED_CALLS:
            yield inside
        case ast.Call(func=ast.Name(id="min" | "max")):
            pass  # the order of their arguments is nobody's business
        case ast.Call(args=[first, second, *more]) if not {ast.Starred} & {type(first), type(second)}:
            yield like(args=[second, first, *more])


def mutants(file: str) -> list[tuple[Mutant, ast.Module]]:
    """All mutants of one file, each with the whole of it."""
    tree = ast.parse((SOURCE / file).read_text("utf-8"))
    found: list[tuple[Mutant, ast.Module]] = []
    counted: dict[tuple[str, str, str], int] = defaultdict(int)

    def walk(node: ast.AST, place: str) -> None:
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "type_params") or (
                isinstance(node, ast.keyword) and node.arg in WORDS
            ):
                continue
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if not isinstance(child, ast.AST) or _skipped(child):
                    continue
                inner = place
                if isinstance(child, ast.FunctionDef | ast.ClassDef):
                    inner = f"{place}.{child.name}" if place else child.name
                for changed in changes(child):
                    text = (place or "(file)", _line(child), _line(changed))
                    if text[1] == text[2]:
                        continue
                    mutant = Mutant(file, *text, counted[text])
                    counted[text] += 1
                    _put(node, name, index, changed)
                    found.append((mutant, copy.deepcopy(tree)))
                    _put(node, name, index, child)
                if not isinstance(child, ast.Raise):
                    walk(child, inner)

    walk(tree, "")
    return found


def _put(node: ast.AST, name: str, index: int | None, value: ast.AST) -> None:
    if index is None:
        setattr(node, name, value)
    else:
        getattr(node, name)[index] = value


def _skipped(node: ast.AST) -> bool:
    """Words for people, and names of types."""
    if isinstance(node, ast.FunctionDef):
        return node.name in ("extra_repr", "__repr__", "__str__")
    if isinstance(node, ast.Subscript):  # Literal["a", "b"], tuple[int, ...]
        return isinstance(node.value, ast.Name) and node.value.id in ("Literal", "tuple", "list", "dict", "type")
    return isinstance(node, ast.Assert | ast.Import | ast.ImportFrom)


def _line(node: ast.AST) -> str:
    """The first line of a piece of source, or the condition of a statement that is an if."""
    if isinstance(node, ast.If):
        return f"if {ast.unparse(node.test)}"
    return ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).splitlines()[0]


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives one module of the library from a tree in place of its file."""

    def __init__(self, name: str, path: Path, tree: ast.Module) -> None:
        self.name, self.path, self.tree = name, path, tree

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        if fullname != self.name:
            return None
        package = [str(self.path.parent)] if self.path.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(
            fullname, self.path, loader=self, submodule_search_locations=package
        )

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(ast.fix_missing_locations(self.tree), str(self.path), "exec"), module.__dict__)


def survives(mutant: Mutant, tree: ast.Module) -> bool:
    """Whether all tests pass with the mutant's file read from ``tree``, in a fork of this process, which has loaded all
    but our library."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        code = 1
        try:
            code = _run(mutant, tree)
        finally:
            os._exit(code)
    began = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        if time.monotonic() - began > SECONDS:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.02)


def _run(mutant: Mutant, tree: ast.Module) -> int:
    import pytest

    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    path = SOURCE / mutant.file
    name = ".".join(("trimtab", *Path(mutant.file).with_suffix("").parts)).removesuffix(".__init__")
    sys.meta_path.insert(0, Changed(name, path, tree))
    own = ROOT / "tests" / path.parent.relative_to(SOURCE) / f"test_{path.stem.strip('_')}.py"
    for stage in ((str(own),) if own.is_file() else (), *STAGES):
        if stage and pytest.main([*OPTIONS, *stage]):
            return 1
    return 0


def warm_up() -> None:
    """Load what the tests load, but for our library: a fork then begins in a moment."""
    for name in (
        "torch",
        "transformers",
        "transformers.models.llama.modeling_llama",
        "pytest",
        "pydantic",
        "safetensors",
    ):
        importlib.import_module(name)
    for name in ("transformers.models.gpt2.modeling_gpt2", "transformers.pytorch_utils", "bitsandbytes", "torchao"):
        importlib.import_module(name)
    assert not any(name.startswith("trimtab") for name in sys.modules)


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
    parser.add_argument("--list", action="store_true", help="print the mutants and run none")
    said = parser.parse_args()
    files = said.only or [
        str(path.relative_to(SOURCE)) for folder in FOLDERS for path in sorted((SOURCE / folder).rglob("*.py"))
    ]
    results: dict[str, dict[str, Any]] = {}
    if RESULTS.is_file() and (said.again or said.only):
        results = json.loads(RESULTS.read_text("utf-8"))
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
    warm_up()
    (file, *_) = files
    if not survives(Mutant(file, "", "", "", 0), ast.parse((SOURCE / file).read_text("utf-8"))):
        raise SystemExit("the tests fail without any mutant: mend that first")
    lived = 0
    for number, (mutant, tree) in enumerate(chosen, 1):
        lives = survives(mutant, tree)
        results[repr(mutant)] = {"mutant": asdict(mutant), "lives": lives}
        RESULTS.write_text(json.dumps(results), "utf-8")
        lived += lives
        if lives:
            print(f"{number}/{len(chosen)}: lives: {mutant}", flush=True)
        write_page(results, said.sample)  # after each: an hour that is cut off has its page
    print(f"{len(chosen) - lived} of {len(chosen)} found; {PAGE.relative_to(ROOT)} lists the others")


if __name__ == "__main__":
    os.chdir(ROOT)
    # The package of this working tree, and one thread, so that a fork is a whole process.
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
