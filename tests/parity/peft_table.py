"""PEFT's own table of models, held against ours: the LoRA and DoRA cases of ``tests/test_custom_models.py``.

    pip download --no-deps --no-binary :all: peft==0.21.2 && tar xzf peft-0.21.2.tar.gz
    python tests/parity/peft_table.py peft-0.21.2/tests/test_custom_models.py

The file is part of PEFT's source distribution and not of this repository, so its path is given. Only its table and its
models are run: the rest of it asks for packages that a comparison does not need. Each case is checked in float64:

    loads     the folder that PEFT saved gives PEFT's outputs here
    merges    so does the merged model, which is as it was before `load_adapter` but for its weights; what PEFT itself
              cannot merge (convolutions with groups) is refused with a SurgeryError
    in PEFT   what was loaded, disturbed and saved by us: PEFT gives our outputs from our folder
"""

from __future__ import annotations

import ast
import copy
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import trimtab

CHECKS = ("loads", "merges", "in PEFT")
# What is in PEFT's table and no LoRA or DoRA: methods of their own behind LoraConfig.
OTHER_METHODS = {"kasa_config", "velora_config", "monteclora_config", "use_bdlora"}
CLOSE = 1e-10


@dataclass(frozen=True)
class Case:
    """One line of PEFT's table."""

    name: str
    model_id: str
    settings: dict[str, Any]
    source: Any
    """The class of PEFT's tests that makes the model."""

    def model(self) -> nn.Module:
        return _in_float64(self.source.from_pretrained(self.model_id))

    def adapted(self) -> nn.Module:
        """PEFT's model; made in float32, since one of PEFT's inits takes no float64."""
        made = get_peft_model(self.source.from_pretrained(self.model_id), LoraConfig(**copy.deepcopy(self.settings)))
        _in_float64(made.base_model.model)
        return made.eval()


@cache
def cases(path: Path) -> tuple[Case, ...]:
    """The LoRA and DoRA cases of the file at ``path``."""
    keep = [node for node in ast.parse(path.read_text("utf-8")).body if _is_table_or_model(node)]
    found: dict[str, Any] = {"__name__": "peft_custom_models"}
    exec(compile(ast.Module(keep, []), str(path), "exec"), found)
    return tuple(
        Case(name, model_id, settings, found["MockTransformerWrapper"])
        for name, model_id, kind, settings in found["TEST_CASES"]
        if kind is LoraConfig and not OTHER_METHODS & settings.keys()
    )


def _is_table_or_model(node: ast.stmt) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.level == 0
    if isinstance(node, ast.Assign):
        return any(isinstance(target, ast.Name) and target.id == "TEST_CASES" for target in node.targets)
    models = isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "nn.Module" for base in node.bases)
    return isinstance(node, ast.Import) or models or getattr(node, "name", "") == "MockTransformerWrapper"


def check(case: Case) -> Iterator[tuple[str, float | str]]:
    """For each of ``CHECKS``, the relative difference, or the error that came in its place."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        theirs = case.adapted()
        _disturb(theirs)
        theirs.save_pretrained(folder)
        right = _outputs(theirs)
        model = case.model()
        try:
            trimtab.load_adapter(model, folder)
            yield "loads", _difference(_outputs(model), right)
        except Exception as error:
            yield "loads", _said(error)
            return
        try:
            names = list(case.model().state_dict())
            trimtab.merge(model)
            assert list(model.state_dict()) == names, "the merged model has other names"
            yield "merges", _difference(_outputs(model), right)
        except trimtab.SurgeryError as error:
            yield "merges", 0.0 if _cannot_be_merged(theirs) else _said(error)
        except Exception as error:
            yield "merges", _said(error)
        try:
            trimtab.load_adapter(model := case.model(), folder)
            _disturb(model)
            trimtab.save_adapter(model, folder)
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*(missing|unexpected|not initialized).*")
                theirs = PeftModel.from_pretrained(case.model(), folder).eval()
            yield "in PEFT", _difference(_outputs(theirs), _outputs(model))
        except Exception as error:
            yield "in PEFT", _said(error)


def _cannot_be_merged(theirs: Any) -> bool:
    """Whether PEFT refuses to merge its own adapter, too."""
    try:
        copy.deepcopy(theirs).merge_and_unload()
    except NotImplementedError:
        return True
    return False


def _in_float64(model: nn.Module) -> nn.Module:
    if hasattr(model, "dtype"):
        model.dtype = torch.float64  # type: ignore[assignment]  # the models cast their input to it
    return model.double().eval()


def _disturb(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


def _outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(90).view(9, 10))
    return found


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def main(path: Path) -> int:
    held = 0
    for case in cases(path):
        found = dict(check(case))
        right = [name for name in CHECKS if isinstance(value := found.get(name), float) and value < CLOSE]
        held += len(right) == len(CHECKS)
        print(f"{'held  ' if len(right) == len(CHECKS) else 'broken'} {case.name}")
        for name in [name for name in CHECKS if name not in right and name in found]:
            print(f"           {name}: {found[name]}")
    print(f"{held} of {len(cases(path))} hold")
    return held < len(cases(path))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
