"""Runs tests against mutants, each in a fork of a process that has loaded what it needs.

A mutant inside a function is put into a process that has collected all tests: the loaded functions get its code, and
the tests that call them are run until one fails, one case of each before a second of any. A mutant that no test is seen
to call (a default in the body of a class, what is called while a module is imported) is put into a process without the
library, which loads the changed file and runs all tests.
"""

from __future__ import annotations

import ast
import gc
import importlib
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

from mutating import SOURCE, Mutant

TESTS = ("tests/ops", "tests/methods", "tests/bases", "tests/surgery", "tests/contract")
# Plugins that are loaded before pytest begins are loaded for the fork's sake, and warnings are errors.
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "--tb=no", "-W", "ignore::pytest.PytestAssertRewriteWarning")
OWN = ("tests/ops", "tests/methods")
SECONDS = 20  # of the other tests for a mutant
SLACK = 120  # seconds beyond ten times that; a mutant that runs longer never ends, and counts as found

Mutants = Sequence[tuple[Mutant, ast.Module]]
Told = Callable[[Mutant, bool], None]
"""Called with each mutant and whether it lives."""
Function = tuple[str, str]
"""File and qualified name."""


def run(mutants: Mutants, told: Told, jobs: int) -> None:
    """Run tests against every mutant, ``jobs`` at once. Raises SystemExit if some test fails without any."""
    _warm_up()
    with tempfile.TemporaryDirectory() as folder:
        left = Path(folder) / "left.json"
        child = os.fork()
        if child == 0:
            os._exit(_in_functions(mutants, told, jobs, left))
        if os.waitpid(child, 0)[1]:
            raise SystemExit("some test fails without any mutant: mend that first")
        names = set(json.loads(left.read_text("utf-8")))
    anew = [(mutant, tree) for mutant, tree in mutants if repr(mutant) in names]
    _each(
        [(mutant, lambda mutant=mutant, tree=tree: _loaded_anew(mutant, tree), SLACK) for mutant, tree in anew],
        told,
        jobs,
    )


def _each(work: Sequence[tuple[Mutant, Callable[[], int], float]], told: Told, jobs: int) -> None:
    """Do the ``work`` on each mutant in a fork, which ends with 0 if the mutant lives."""
    waiting, running = list(reversed(work)), dict[int, tuple[Mutant, float]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant, task, seconds = waiting.pop()
            child = os.fork()
            if child == 0:
                os.setpgid(0, 0)
                quiet = os.open(os.devnull, os.O_WRONLY)
                os.dup2(quiet, 1)
                os.dup2(quiet, 2)
                code = 1
                try:
                    code = task()
                finally:
                    os._exit(code)
            running[child] = mutant, time.monotonic() + seconds
        for child, (mutant, end) in list(running.items()):
            done, status = os.waitpid(child, os.WNOHANG)
            if not done and time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
                done, status = os.waitpid(child, 0)
            if done:
                del running[child]
                told(mutant, status == 0)
        time.sleep(0.005)


# In a process that has collected all tests ---------------------------------------------------------------------------


def _in_functions(mutants: Mutants, told: Told, jobs: int, left: Path) -> int:
    import pytest

    class Session:
        """Takes the place of pytest's own loop over the tests."""

        def pytest_runtestloop(self, session: pytest.Session) -> bool:
            calls = _calls(session.items, left.with_name("calls.json"))
            functions = _functions()
            work, others = [], []
            for mutant, tree in mutants:
                function = _function_of(mutant, functions)
                if tests := _chosen(session.items, calls.get(function, {})):
                    task = partial(_with_tree, tree, function, functions[function], tests)
                    work.append((mutant, task, SLACK + 10 * SECONDS))
                else:
                    others.append(repr(mutant))
            _each(work, told, jobs)
            left.write_text(json.dumps(others), "utf-8")
            return True

        @pytest.hookimpl(tryfirst=True)
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                os._exit(1)

    return int(pytest.main([*OPTIONS, *TESTS], plugins=[Session()]))


def _calls(items: Sequence[Any], place: Path) -> dict[Function, dict[int, float]]:
    """``function -> number of a test that calls it -> seconds``, seen in a fork. Raises SystemExit if a test fails."""
    child = os.fork()
    if child == 0:
        calls: dict[Function, dict[int, float]] = defaultdict(dict)
        ours = str(SOURCE)
        for number, item in enumerate(items):
            seen: set[CodeType] = set()

            def see(frame: FrameType, event: str, _: Any, seen: set[CodeType] = seen) -> None:
                if event == "call":
                    seen.add(frame.f_code)

            began = time.monotonic()
            sys.setprofile(see)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=(*items, None)[number + 1])
            sys.setprofile(None)
            for code in seen:
                if code.co_filename.startswith(ours):
                    calls[code.co_filename, _outermost(code.co_qualname)][number] = time.monotonic() - began
        place.write_text(json.dumps([[*function, tests] for function, tests in calls.items()]), "utf-8")
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit(1)
    every = json.loads(place.read_text("utf-8"))
    return {(file, name): {int(number): took for number, took in tests.items()} for file, name, tests in every}


def _chosen(items: Sequence[Any], seconds: dict[int, float]) -> list[Any]:
    """The tests of a function in the order in which they are run.

    Those of single functions come first (tests/ops, tests/methods), all of them. Of the others, cases of one test are
    much alike, so the quickest case of each comes first, then the second of each, for ``SECONDS`` in all.
    """
    cases: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for number, took in seconds.items():
        cases[items[number].nodeid.partition("[")[0]].append((took, number))
    order = []
    for name, some in cases.items():
        own = name.startswith(OWN)
        order += [(not own, 0 if own else place, took, number) for place, (took, number) in enumerate(sorted(some))]
    order.sort()
    ends = accumulate(took if other else 0.0 for other, _, took, _ in order)
    return [items[number] for (*_, number), end in zip(order, ends, strict=True) if end <= SECONDS]


def _functions() -> dict[Function, list[FunctionType]]:
    """The loaded functions of the library. One name can have several, such as a property's."""
    functions: dict[Function, list[FunctionType]] = defaultdict(list)
    for one in gc.get_objects():
        if type(one) is FunctionType and one.__code__.co_filename.startswith(str(SOURCE)):
            functions[one.__code__.co_filename, one.__code__.co_qualname].append(one)
    return functions


def _outermost(name: str) -> str:
    """The function around a function inside it, by their qualified names."""
    return name.split(".<locals>", 1)[0]


def _function_of(mutant: Mutant, functions: dict[Function, list[FunctionType]]) -> Function | None:
    """The outermost function that ``mutant`` changes; None where it changes none."""
    file, parts = str(SOURCE / mutant.file), mutant.place.split(".")
    names = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return next(((file, name) for name in names if (file, name) in functions), None)


def _code(tree: ast.Module, function: Function) -> list[CodeType]:
    """The code of all functions of this name in ``tree``, in their order."""
    file, name = function

    def inside(code: CodeType) -> Iterator[CodeType]:
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                if constant.co_qualname == name:
                    yield constant
                yield from inside(constant)

    return list(inside(compile(ast.fix_missing_locations(tree), file, "exec")))


def _with_tree(tree: ast.Module, name: Function, functions: Sequence[FunctionType], items: Sequence[Any]) -> int:
    """Give ``functions`` their code from ``tree``, and run ``items``."""
    new = {code.co_firstlineno: code for code in _code(tree, name)}
    for function in functions:
        function.__code__ = new[function.__code__.co_firstlineno]
    for number, item in enumerate(items):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=(*items, None)[number + 1])
    return 0


# In a process without the library ------------------------------------------------------------------------------------


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


def _loaded_anew(mutant: Mutant, tree: ast.Module) -> int:
    import pytest

    name = ".".join(("trimtab", *Path(mutant.file).with_suffix("").parts)).removesuffix(".__init__")
    sys.meta_path.insert(0, Changed(name, SOURCE / mutant.file, tree))
    return int(pytest.main([*OPTIONS, *TESTS]))


def _warm_up() -> None:
    """Load what the tests load, but for our library: a fork then begins in a moment."""
    for name in (
        "torch",
        "transformers",
        "transformers.models.llama.modeling_llama",
        "transformers.models.gpt2.modeling_gpt2",
        "transformers.pytorch_utils",
        "bitsandbytes",
        "torchao",
        "pytest",
        "pydantic",
        "safetensors",
    ):
        importlib.import_module(name)
    assert not any(name.startswith("trimtab") for name in sys.modules)
