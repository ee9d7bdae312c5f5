"""How the library hangs together: folders that import downwards only, no circles, files and calls of a size that can be
read, and one name for one thing. What is read is the source, so an import inside a function counts as one at the top.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "trimtab"
# From the bottom up: a file imports from folders below its own, and from its own.
PUBLIC = "trimtab/__init__.py"
LAYERS = [
    *(
        "errors",
        "outcomes",
        "hints listing machine metrics notes processes reading signals",
        "launching",
        "files",
        "diagnosis",
        "ops",
        "bases",
        "methods",
        "surgery",
        "adapters",
        "integrations",
        "models",
        "data",
    ),
    *(
        "config",
        "runs",
        "evaluation",
        "tasks",
        "questions",
        "asking assessing predicting",
        "memory",
        "drafting",
        "reports",
        "training",
        "analysis",
        "export",
        "serving",
        "studies",
    ),
    *(PUBLIC, "cli", "__main__"),
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split(" ")}
LONGEST_FILE = 400
MOST_POSITIONAL = 5
# Modules that may have a name in common: where one thing has its part in several layers, and has one name in all.
NAMESAKES = {
    **dict.fromkeys(
        ("combine", "compare", "convert", "evaluate", "explore", "merge", "plan", "tune"),
        "a verb is named after what it calls",
    ),
    **dict.fromkeys(("run", "search", "study"), "its YAML, its loop, its progress at the terminal, its page"),
    "chat": "the form of rows, and the verb that talks by it",
    "export": "a verb is named after what it calls",
    "gguf": "a file that models are read from, and the one that they are handed over in",
    "lora": "a method, and the folder that hands over what it trained",
    "errors": "the tree of errors; and how one of them is told of a YAML",
    "finlora": "FinLoRA's list of runs, and its form of rows",
    "load": "a model from its folder, and the adapted model from a run's",
    "read": "a YAML, and a run's folder for its page",
}


@cache
def modules() -> dict[str, ast.Module]:
    """Every file of the library: its dotted name, and what stands in it."""
    return {name_of(path): ast.parse(path.read_text("utf-8"), str(path)) for path in sorted(SOURCE.rglob("*.py"))}


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports(name: str) -> list[str]:
    """The files of the library that the file ``name`` imports, at the top or anywhere else."""
    return list(_imports(name))


def _imports(name: str) -> Iterator[str]:
    known = modules()
    for node in ast.walk(known[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are written in full"
            for alias in node.names if node.module in known else ():
                inside = f"{node.module}.{alias.name}"
                yield inside if inside in known else str(node.module)


def folder(name: str) -> str:
    """``trimtab.cli.app`` -> ``cli``."""
    return name.split(".")[1] if "." in name else PUBLIC


def test_every_folder_has_its_layer() -> None:
    assert {folder(name) for name in modules()} <= LEVEL.keys(), "name it in LAYERS"


def test_imports_go_downwards() -> None:
    upwards = {
        (name, other)
        for name in modules()
        for other in imports(name)
        if folder(other) != folder(name) and LEVEL[folder(other)] >= LEVEL[folder(name)]
    }
    assert not upwards, upwards


def test_no_file_imports_itself_by_way_of_others() -> None:
    reached: dict[str, set[str]] = {}
    for start in modules():
        seen: set[str] = set()
        ahead = list(imports(start))
        while ahead:
            here = ahead.pop()
            if here not in seen:
                seen.add(here)
                ahead.extend(imports(here))
        reached[start] = seen
    circles = [name for name, seen in reached.items() if name in seen]
    assert not circles, circles


def test_a_file_can_be_read_in_one_sitting() -> None:
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in SOURCE.rglob("*.py")}
    long = {str(path.relative_to(SOURCE)): length for path, length in lengths.items() if length > LONGEST_FILE}
    assert not long, long


def test_a_call_names_its_arguments() -> None:
    long = [
        f"{name}:{node.lineno}"
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and len(node.args) > MOST_POSITIONAL
    ]
    assert not long, long


def test_one_name_is_one_module() -> None:
    homes = defaultdict(list)
    for name in modules():
        if "." in name:
            homes[name.rsplit(".", 1)[-1]].append(name)
    shared = {last: names for last, names in homes.items() if len(names) > 1}
    assert shared.keys() == NAMESAKES.keys(), shared
