"""What PEFT stores of the model's own tensors beside its adapters: whole modules that are trained
(``modules_to_save``), biases (``bias``) and rows of embeddings (``trainable_token_indices``); read and written as
modules of method ``full``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from trimtab import methods
from trimtab.adapters.record import StoredAdapter
from trimtab.bases import ModuleBase, WeightBase, can_be_called, own_parameters
from trimtab.methods import Options
from trimtab.surgery.adapted import Adapted, bare, bare_modules

METHOD = "full"
# Heads that PEFT puts under modules_to_save by the task, whatever the model's is called.
_HEADS = ("classifier", "score", "qa_outputs")
ROWS = "trainable_tokens_delta"


def options_of(config: Mapping[str, Any], module: str, tensors: dict[str, Tensor]) -> tuple[str, Options]:
    """The method and the options of a ``module`` of which these tensors are stored. Rows of a table are put into the
    order of their numbers.

    Raises ValueError if the configuration says of rows no or other numbers.
    """
    said: dict[str, Any] = {"tensors": sorted(tensors)}
    if ROWS in tensors:
        rows = _rows_of(config, module)
        if len(tensors) > 1 or len(rows) != len(tensors[ROWS]) or len(set(rows)) < len(rows):
            raise ValueError(f"trainable_token_indices of {module} does not fit its {len(tensors[ROWS])} rows")
        order = sorted(range(len(rows)), key=rows.__getitem__)
        tensors["weight"] = tensors.pop(ROWS)[order]
        said = {"rows": rows}
    return METHOD, methods.options_class(METHOD)(**said)


def _rows_of(config: Mapping[str, Any], module: str) -> list[int]:
    said = config.get("trainable_token_indices") or []
    if isinstance(said, dict):  # PEFT matches the ends of names
        said = next((rows for name, rows in said.items() if module.endswith(name)), [])
    if not isinstance(said, list) or not all(isinstance(row, int) for row in said):
        raise ValueError("trainable_token_indices: expected lists of numbers")
    return said


def is_declared(config: Mapping[str, Any], module: str, name: str) -> bool:
    """Whether the configuration says that the tensor ``name`` of ``module`` is trained. Else PEFT stored it because the
    embedding was resized, and it may be no other than the base's."""
    return "bias" in name or any(_is_saved(module, saved) for saved in _saved(config))


def missing(config: Mapping[str, Any], own: Mapping[str, dict[str, Tensor]]) -> list[str]:
    """The modules of which the configuration says that they were trained as a whole, and of which nothing is stored."""
    return [name for name in _saved(config) if name not in _HEADS and not any(_is_saved(one, name) for one in own)]


def _saved(config: Mapping[str, Any]) -> list[str]:
    said = config.get("modules_to_save") or ()
    return [said] if isinstance(said, str) else [str(one) for one in said]


def _is_saved(module: str, saved: str) -> bool:
    """Whether ``module``, or one around it, is meant by the name ``saved``, of which PEFT compares the end."""
    return any(module[:end].endswith(saved) for end, letter in enumerate(f"{module}.") if letter == ".")


def stored_own(
    config: Mapping[str, Any], own: Mapping[str, dict[str, Tensor]], options: Mapping[str, tuple[str, Options]]
) -> dict[str, StoredAdapter]:
    """The modules of which PEFT stored the tensors ``own``."""
    return {
        module: StoredAdapter(
            *options[module],
            tensors,
            in_layout=True,
            beside=not (_rows(options[module]) or any(is_declared(config, module, name) for name in tensors)),
        )
        for module, tensors in own.items()
    }


def _rows(entry: tuple[str, Options]) -> tuple[int, ...]:
    return getattr(entry[1], "rows", None) or ()


class Said(NamedTuple):
    """What the configuration says of them."""

    modules_to_save: list[str] | None
    bias: str
    trainable_token_indices: dict[str, list[int]] | None


def said_of(model: nn.Module, adapted: Mapping[str, Adapted]) -> Said | None:
    """How a configuration says that these modules are trained by method ``full``, and which layers' biases are; None if
    it cannot: PEFT trains a module with all that is in it, or else no more than biases."""
    if any(_has_a_bias_elsewhere(module) for module in adapted.values()):
        return None
    trained = {name: module for name, module in adapted.items() if module.method == METHOD}
    every = dict(bare_modules(model))
    tables = {name: trained.pop(name) for name, module in list(trained.items()) if module.handle.kind == "table"}
    if (rows := _rows_said(model, every, tables)) is None:
        return None
    whole = {name for name, module in trained.items() if _is_whole(module)}
    biases = any("bias" in module.adapter.stored_tensors() for name, module in adapted.items() if name not in trained)
    said = "lora_only" if biases else "none"
    for name in trained.keys() - whole:
        if not all("bias" in tensor for tensor in trained[name].adapter.stored_tensors()):
            return None
        said = "all"
    saved = _outermost(every, whole)
    inside = {name for name in every if any(name == one or name.startswith(f"{one}.") for one in saved)}
    has_more = any(name not in whole and _has_tensors(bare(every[name])) for name in inside)
    # PEFT takes every module whose name ends in one that it is given, wherever that is.
    strays = any(name.endswith(one) for name in every.keys() - inside for one in saved)
    if has_more or strays:
        return None
    return Said(sorted(saved) or None, said, rows or None)


def _rows_said(
    model: Any, every: Mapping[str, nn.Module], tables: Mapping[str, Adapted]
) -> dict[str, list[int]] | None:
    """The rows that are trained, by module; None if PEFT cannot say it. Where tables are tied, PEFT is told of the
    embedding alone, and trains the rows of all of them."""
    if not tables:
        return {}
    found: dict[str, list[int]] = {}
    config = getattr(model, "config", None)
    getter = getattr(model, "get_input_embeddings", None)
    embedding = bare(getter()) if getter is not None else None
    tied = bool(getattr(config, "tie_word_embeddings", False))
    for name, module in tables.items():
        weight = module.base._parameters.get("weight")
        same = [other for other, one in every.items() if bare(one)._parameters.get("weight") is weight]
        if any(other not in tables or tables[other].adapter.weight is not module.adapter.weight for other in same):
            return None
        if tied and embedding is not None and embedding.weight is weight and module.base is not embedding:
            continue
        strays = [other for other in every if other.endswith(name) and other != name]
        if strays or (len(same) > 1 and module.base is not embedding):
            return None
        found[name] = list(_rows((METHOD, module.adapter.options)))
    return found


def written(model: nn.Module, adapted: Mapping[str, Adapted]) -> dict[str, Adapted]:
    """The modules of method ``full`` whose tensors are written; those of tied tables are written once."""
    tables = {name: module for name, module in adapted.items() if module.handle.kind == "table"}
    said = _rows_said(model, dict(bare_modules(model)), tables) or {}
    return {
        name: module
        for name, module in adapted.items()
        if module.method == METHOD and (name not in tables or name in said)
    }


def _has_a_bias_elsewhere(module: Adapted) -> bool:
    """Whether a bias is trained beside a weight that no layer of PEFT's keeps by that name."""
    handle = module.handle
    if not isinstance(handle, WeightBase) or "bias" not in module.adapter.stored_tensors():
        return False
    return not handle.is_called or handle.stored_bias is None


def _is_whole(module: Adapted) -> bool:
    """Whether all that the module has of its own is trained."""
    handle, mine = module.handle, module.adapter.stored_tensors().keys()
    if isinstance(handle, ModuleBase):
        return mine == handle.tensors().keys()
    if not isinstance(handle, WeightBase) or not handle.is_called or handle.stack:
        return False
    return mine == ({"weight"} if handle.stored_bias is None else {"weight", "bias"})


def _has_tensors(module: nn.Module) -> bool:
    return can_be_called(module) and any(True for _ in own_parameters(module))


def _outermost(every: Mapping[str, nn.Module], whole: set[str]) -> set[str]:
    """The largest modules of which all is in ``whole``: a head of two layers, and not its layers."""
    with_tensors = {name for name, module in every.items() if _has_tensors(bare(module))}
    saved = set()
    for name in whole:
        best, parent = name, name.rpartition(".")[0]
        while parent and can_be_called(bare(every[parent])):
            if not {one for one in with_tensors if one == parent or one.startswith(f"{parent}.")} <= whole:
                break
            best, parent = parent, parent.rpartition(".")[0]
        saved.add(best)
    return {name for name in saved if not any(name.startswith(f"{other}.") for other in saved)}


def tensors_of(module: Adapted) -> dict[str, Tensor]:
    """The trained tensors of a module of method ``full``, as the module stores its own."""
    mine = module.adapter.stored_tensors()
    if module.handle.kind == "table":
        return {f"token_adapter.{ROWS}": mine["weight"]}
    if isinstance(module.handle, WeightBase) and "weight" in mine:
        mine = {**mine, "weight": module.handle.as_stored(mine["weight"])}
    return mine
