"""Runs tests against mutants, each in a fork of a process that has loaded what it needs.

A mutant inside a function is put into a process that has collected all tests: the loaded functions get its code and its
defaults, and the tests that run its line are run until one fails. First come those that killed other mutants of the
function, then one case of each test before a second of any. A mutant that no test is seen to call (a default in the
body of a class, what is called while a module is imported) is put into a process without the library, which loads the
changed file and runs the tests that call anything in it.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib
import importlib.abc
import importlib.util
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

from mutating import ROOT, SOURCE, Mutant, mutated

TESTS = ("tests/ops", "tests/methods", "tests/bases", "tests/surgery", "tests/contract")
# Plugins that are loaded before pytest begins are loaded for the fork's sake, and warnings are errors.
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "--tb=no", "-W", "ignore::pytest.PytestAssertRewriteWarning")
FILES = tuple(str(SOURCE / folder) for folder in ("ops", "methods"))  # whose lines are watched
OWN = ("tests/ops", "tests/methods")
KILLERS = 6  # tests that are tried first, because they killed a mutant of the same function before
SLACK = 20  # seconds of processor time beyond ten times what the tests take; a mutant that runs longer never ends
MOVED = 97  # what a fork ends with whose files are no longer those that were loaded
MEMORY = 8 * 2**30  # bytes beyond what the process has: a mutant that asks for more is found

Told = Callable[[Mutant, bool], None]
"""Called with each mutant and whether it lives."""
Function = tuple[str, str]
"""File and qualified name."""
Calls = dict[Function, dict[int, float]]
"""``function -> number of a test that calls it -> seconds``. A line of a function counts as one, with its number as its
name."""
Work = Callable[[], tuple[Callable[[], int], float]]
"""Says when its turn has come what a fork has to do, and for how many seconds. The fork ends with 0 if it lives."""


def run(mutants: Sequence[Mutant], told: Told, *, jobs: int, seconds: float, tests: Sequence[str], cache: Path) -> None:
    """Run tests against every mutant, ``jobs`` at once, each for ``seconds`` of the tests of single functions and for
    as long of the others. ``cache`` keeps which test calls what. Raises SystemExit if some test fails without any."""
    _warm_up()
    with tempfile.TemporaryDirectory() as folder:
        left = Path(folder) / "left.json"
        child = os.fork()
        if child == 0:
            os._exit(_in_functions(mutants, told, jobs=jobs, seconds=seconds, paths=tests, cache=cache, left=left))
        if os.waitpid(child, 0)[1]:
            failed = Path(folder) / "killer"
            name = failed.read_text("utf-8") if failed.is_file() else "some test"
            raise SystemExit(f"{name} fails without any mutant: mend that first")
        of_file = json.loads(left.read_text("utf-8"))
    anew = [mutant for mutant in mutants if repr(mutant) in of_file]
    everything = 20 * SLACK + 20 * seconds
    _each(
        [
            (mutant, lambda mutant=mutant: (partial(_loaded_anew, mutant, of_file[repr(mutant)]), everything))
            for mutant in anew
        ],
        told,
        jobs,
    )


def _each(work: Sequence[tuple[Mutant, Work]], told: Told, jobs: int) -> None:
    """Do the ``work`` on each mutant in a fork, which ends with 0 if the mutant lives."""
    waiting, running = list(reversed(work)), dict[int, tuple[Mutant, float]]()
    gc.collect()
    gc.freeze()
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant, begin = waiting.pop()
            task, seconds = begin()
            child = os.fork()
            if child == 0:
                os.setpgid(0, 0)
                quiet = os.open(os.devnull, os.O_WRONLY)
                os.dup2(quiet, 1)
                os.dup2(quiet, 2)
                _limit(seconds)
                code = 1
                try:
                    code = task()
                finally:
                    os._exit(code)
            running[child] = mutant, time.monotonic() + 5 * seconds
        for child, (mutant, end) in list(running.items()):
            done, status = os.waitpid(child, os.WNOHANG)
            if not done and time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
                done, status = os.waitpid(child, 0)
            if done:
                del running[child]
                if status and os.waitstatus_to_exitcode(status) == MOVED:
                    raise SystemExit(f"{mutant.file} was changed meanwhile; go on with --resume")
                told(mutant, status == 0)
        time.sleep(0.005)


def _limit(seconds: float) -> None:
    """A fork gets so much processor time, whatever else the machine does, and some gigabytes beyond what it has."""
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds)))
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


# In a process that has collected all tests ---------------------------------------------------------------------------


def _in_functions(
    mutants: Sequence[Mutant],
    told: Told,
    *,
    jobs: int,
    seconds: float,
    paths: Sequence[str],
    cache: Path,
    left: Path,
) -> int:
    import pytest

    killer = left.with_name("killer")

    class Session:
        """Takes the place of pytest's own loop over the tests."""

        def pytest_runtestloop(self, session: pytest.Session) -> bool:
            calls = _calls(session.items, cache)
            functions = _functions()
            numbers = {item.nodeid: number for number, item in enumerate(session.items)}
            killers: dict[Function, list[int]] = defaultdict(list)
            work: list[tuple[Mutant, Work]] = []
            others = {}

            def begin(mutant: Mutant, function: Function) -> tuple[Callable[[], int], float]:
                of_lines = _of_lines(mutant, calls) or calls[function]
                first = [number for number in killers[function] if number in of_lines]
                chosen, takes = _chosen(session.items, of_lines, first, seconds)
                return partial(_with_change, mutant, function, functions[function], chosen), SLACK + 10 * takes

            def noted(mutant: Mutant, lives: bool) -> None:
                function = _function_of(mutant, functions)
                if killer.is_file() and function:
                    number = numbers[killer.read_text("utf-8")]
                    killers[function] = [number, *(one for one in killers[function] if one != number)][:KILLERS]
                    killer.unlink()
                told(mutant, lives)

            for mutant in mutants:
                function = _function_of(mutant, functions)
                if function and calls.get(function):
                    work.append((mutant, partial(begin, mutant, function)))
                else:
                    of_file: dict[int, float] = {}
                    everywhere: dict[int, float] = {}
                    for (file, _), some in calls.items():
                        everywhere |= some
                        if file == str(SOURCE / mutant.file):
                            of_file |= some
                    of_file = of_file or everywhere
                    others[repr(mutant)] = [one.nodeid for one in _chosen(session.items, of_file, [], seconds)[0]]
            _each(work, noted, jobs)
            left.write_text(json.dumps(others), "utf-8")
            return True

        @pytest.hookimpl(tryfirst=True)
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed:
                killer.write_text(report.nodeid, "utf-8")
                os._exit(1)

    return int(pytest.main([*OPTIONS, *paths], plugins=[Session()]))


def _calls(items: Sequence[Any], cache: Path) -> Calls:
    """Which tests call which function, seen in a fork, and kept for as long as neither the library nor a test changes.
    Raises SystemExit if a test fails."""
    files = sorted([*SOURCE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")])
    known = b"".join([*(file.read_bytes() for file in files), *(item.nodeid.encode() for item in items)])
    kept = cache / f"calls-{hashlib.sha256(known).hexdigest()[:12]}.json"
    if not kept.is_file():
        child = os.fork()
        if child == 0:
            calls: Calls = defaultdict(dict)
            for number, item in enumerate(items):
                seen: set[Function] = set()

                def line(frame: FrameType, event: str, _: Any, seen: set[Function] = seen) -> Any:
                    if event == "line":
                        seen.add((frame.f_code.co_filename, str(frame.f_lineno)))
                    return line

                def call(frame: FrameType, *_: Any, seen: set[Function] = seen, line: Any = line) -> Any:
                    if frame.f_code.co_filename.startswith(FILES):
                        seen.add((frame.f_code.co_filename, _outermost(frame.f_code.co_qualname)))
                        return line
                    return None

                began = time.process_time()  # whatever else the machine does
                sys.settrace(call)
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=(*items, None)[number + 1])
                sys.settrace(None)
                for function in seen:
                    calls[function][number] = time.process_time() - began
            kept.write_text(json.dumps([[*function, tests] for function, tests in calls.items()]), "utf-8")
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            raise SystemExit(1)
    every = json.loads(kept.read_text("utf-8"))
    return {(file, name): {int(number): took for number, took in tests.items()} for file, name, tests in every}


def _of_lines(mutant: Mutant, calls: Calls) -> dict[int, float]:
    """The tests that run a line of what is changed."""
    lines = range(mutant.lines[0], mutant.lines[1] + 1)
    return {
        number: took for line in lines for number, took in calls.get((str(SOURCE / mutant.file), str(line)), {}).items()
    }


def _chosen(
    items: Sequence[Any], took: dict[int, float], killers: Sequence[int], seconds: float
) -> tuple[list[Any], float]:
    """The tests of a function in the order in which they are run, and how long they take.

    ``killers`` come first, then the tests of single functions (tests/ops, tests/methods), then all others, ``seconds``
    of each, and one test in any case. Cases of one test are much alike, so the quickest case of each comes first, then
    the second of each.
    """
    cases: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for number, one in took.items():
        cases[items[number].nodeid.partition("[")[0]].append((one, number))
    every = [
        (not name.startswith(OWN), place, one, number)
        for name, some in cases.items()
        for place, (one, number) in enumerate(sorted(some))
    ]
    chosen, total = [items[number] for number in killers], [0.0, 0.0]
    for other, _, one, number in sorted(every):
        if number not in killers and (not chosen or total[other] + one <= seconds):
            total[other] += one
            chosen.append(items[number])
    return chosen, sum(total) + sum(took.get(number, 0.0) for number in killers)


def _functions() -> dict[Function, list[FunctionType]]:
    """The loaded functions of the library. One name can have several, such as a property's."""
    functions: dict[Function, list[FunctionType]] = defaultdict(list)
    gc.unfreeze()  # the tests freeze what they import, and what is frozen is not among the objects
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


def _with_change(mutant: Mutant, name: Function, functions: Sequence[FunctionType], items: Sequence[Any]) -> int:
    """Give ``functions`` their code and their defaults from the changed file, and run ``items``."""
    try:
        tree = mutated(mutant)
        nodes = {
            min(one.lineno for one in (node, *node.decorator_list)): node
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
        }
        for function in functions:
            _keep_closure(nodes[function.__code__.co_firstlineno], function)
        new = {code.co_firstlineno: code for code in _code(tree, name)}
        for function in functions:
            line = function.__code__.co_firstlineno
            function.__code__ = new[line]
            _set_defaults(function, nodes[line].args)
            if any(ast.unparse(one).startswith("triton.jit") for one in nodes[line].decorator_list):
                _set_program(function, nodes[line])
    except LookupError:
        return MOVED
    for number, item in enumerate(items):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=(*items, None)[number + 1])
    return 0


def _set_program(function: FunctionType, node: ast.FunctionDef) -> None:
    """Let Triton's interpreter, which reads a program from its file, take ``node`` for it."""
    from triton.runtime import interpreter

    tree = ast.Module([ast.copy_location(ast.FunctionDef(node.name, node.args, node.body, []), node)], [])
    tree = ast.fix_missing_locations(interpreter.ASTTransformer().visit(tree))
    known: dict[str, Any] = {}
    exec(compile(tree, function.__code__.co_filename, "exec"), vars(interpreter) | function.__globals__, known)
    interpreter.InterpretedFunction.rewritten_fn[function] = known[node.name]


def _keep_closure(node: ast.FunctionDef, function: FunctionType) -> None:
    """Name what the function closes over (a call of ``super`` is one) where nothing is done, so that code from which
    the change took it fits the function still."""
    names = [ast.Expr(ast.Name(name, ast.Load())) for name in function.__code__.co_freevars]
    if names:
        node.body.insert(0, ast.copy_location(ast.If(ast.Constant(False), names, []), node.body[0]))


def _set_defaults(function: FunctionType, arguments: ast.arguments) -> None:
    """Defaults that are constants, as the changed file has them; others stay."""

    def value(node: ast.expr | None, before: Any) -> Any:
        return node.value if isinstance(node, ast.Constant) else before

    if function.__defaults__:
        pairs = zip(arguments.defaults, function.__defaults__, strict=True)
        function.__defaults__ = tuple(value(node, before) for node, before in pairs)
    for argument, node in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if node is not None:
            function.__kwdefaults__[argument.arg] = value(node, function.__kwdefaults__[argument.arg])


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


def _loaded_anew(mutant: Mutant, tests: Sequence[str]) -> int:
    """Collect the files of ``tests`` with the changed module, and run ``tests`` in their order."""
    import pytest

    class Chosen:
        def pytest_collection_modifyitems(self, items: list[Any]) -> None:
            found = {item.nodeid: item for item in items}
            items[:] = [found[name] for name in tests if name in found]

    name = ".".join(("trimtab", *Path(mutant.file).with_suffix("").parts)).removesuffix(".__init__")
    sys.meta_path.insert(0, Changed(name, SOURCE / mutant.file, mutated(mutant)))
    files = dict.fromkeys(one.partition("::")[0] for one in tests)
    return int(pytest.main([*OPTIONS, *files], plugins=[Chosen()]))


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
