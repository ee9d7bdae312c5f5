"""The public names, their signatures, and what importing them costs."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import trimtab

PUBLIC = {
    "AdapterError",
    "AttachReport",
    "ConfigError",
    "DataError",
    "MergeReport",
    "ModelError",
    "Plan",
    "PlanError",
    "Rule",
    "RunError",
    "SurgeryError",
    "TrimtabError",
    "WeightChange",
    "active_adapter",
    "adapters",
    "attach",
    "decompose",
    "delete_adapter",
    "detach",
    "disable_adapter",
    "effective_weight",
    "load_adapter",
    "merge",
    "per_row",
    "save_adapter",
    "set_adapter",
    "trainable_parameters",
    "weight_change",
}


def test_every_public_name_is_there() -> None:
    assert set(trimtab.__all__) >= PUBLIC
    assert len(trimtab.__all__) == len(set(trimtab.__all__))
    for name in trimtab.__all__:
        assert getattr(trimtab, name) is not None
    assert set(dir(trimtab)) >= PUBLIC
    with pytest.raises(AttributeError, match="'trimtab' has no attribute 'atach'"):
        _ = trimtab.atach


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("attach", ["model", "plan"]),
        ("detach", ["model"]),
        ("merge", ["model"]),
        ("trainable_parameters", ["model"]),
        ("save_adapter", ["model", "folder"]),
        ("load_adapter", ["model", "folder"]),
        ("effective_weight", ["model", "name"]),
        ("decompose", ["weight"]),
        ("weight_change", ["before", "after"]),
    ],
)
def test_signatures(name: str, parameters: list[str]) -> None:
    function = getattr(trimtab, name)
    signature = inspect.signature(function).parameters
    assert list(signature)[: len(parameters)] == parameters
    assert all(
        parameter.default is not inspect.Parameter.empty for parameter in list(signature.values())[len(parameters) :]
    )
    assert function.__doc__


def test_errors_form_one_tree() -> None:
    errors = [getattr(trimtab, name) for name in PUBLIC if name.endswith("Error")]
    assert all(issubclass(error, trimtab.TrimtabError) for error in errors)
    assert issubclass(trimtab.TrimtabError, Exception)


def test_importing_is_quick() -> None:
    """The command line and the reports import the package and its errors, and must not wait for torch."""
    code = (
        "import sys, trimtab; from trimtab import PlanError; dir(trimtab); trimtab.__version__\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_using_the_core_imports_no_optional_package() -> None:
    code = (
        "import sys, trimtab, torch; trimtab.load_adapter, trimtab.decompose\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "trimtab.attach(model, trimtab.Rule(match='0', method='dora', rank=2)); trimtab.merge(model)\n"
        "optional = {'transformers', 'datasets', 'peft', 'sklearn', 'matplotlib', 'bitsandbytes', 'torchao'}\n"
        "heavy = optional & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_type_checkers_are_told_that_the_names_are_for_others() -> None:
    """A checker takes an import for the module's own use, unless it is written ``name as name``: a program that is
    checked strictly could else use none of them. (``adapters`` is a package, and found by itself.)"""
    tree = ast.parse(Path(trimtab.__file__).read_text(encoding="utf-8"))
    imported = [name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names]
    told = {name.name for name in imported if name.asname == name.name}
    assert told == set(trimtab.__all__) - {"__version__", "adapters"}
