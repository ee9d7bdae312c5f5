"""What the tests of adapter folders share: trained models to save, and a look at a model that shows any change."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import trimtab
from trimtab.surgery.adapted import adapted_modules

PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
OUR_FILES = ("trimtab.json", "trimtab_adapter.safetensors")


# What can be saved, by the layout that it is saved in.
PEFT_PLANS: dict[str, list[trimtab.Rule]] = {
    "lora": [trimtab.Rule(match="all-linear", method="lora", rank=4)],
    "lora-scaled": [trimtab.Rule(match="all-linear", method="lora", rank=4, alpha=0.7, rank_stabilised=True)],
    "dora": [trimtab.Rule(match="all-linear", method="dora", rank=3, alpha=5)],
    "lora-with-magnitude": [trimtab.Rule(match="*_proj", method="lora", rank=3, magnitude=True)],
    "dora-in-many-ranks": [
        trimtab.Rule(match="all-linear", method="dora", rank=4, alpha=8),
        trimtab.Rule(match="*.q_proj", method="dora", rank=2, alpha=16),
        trimtab.Rule(match="*.down_proj", layers="1", method="dora", rank=1, alpha=3),
    ],
    "training-options": [
        trimtab.Rule(match="*.q_proj", method="dora", rank=2, detach_norm=False, dropout=0.25),
        trimtab.Rule(match="*.v_proj", method="dora", rank=2, init="gaussian", init_std=0.5, keep_product=True),
    ],
    "bfloat16": [trimtab.Rule(match="*.q_proj", method="lora", rank=2, dtype="bfloat16")],
    "head": [trimtab.Rule(match="lm_head", method="lora", rank=2)],
}
OUR_PLANS: dict[str, list[trimtab.Rule]] = {
    "mora": [trimtab.Rule(match="all-linear", method="mora", rank=4)],
    "mora-sharing": [trimtab.Rule(match="all-linear", method="mora", rank=4, form="sharing")],
    "mora-magnitude": [trimtab.Rule(match="all-linear", method="mora", rank=4, magnitude=True)],
    "lora-and-dora": [
        trimtab.Rule(match="*.q_proj", method="lora", rank=4),
        trimtab.Rule(match="*.v_proj", method="dora", rank=4),
    ],
    "lora-and-mora": [
        trimtab.Rule(match="*.q_proj", method="lora", rank=4),
        trimtab.Rule(match="*.v_proj", method="mora", rank=4),
    ],
    "input-axis": [trimtab.Rule(match="*.q_proj", method="dora", rank=4, magnitude_axis="input")],
    "magnitude-alone": [trimtab.Rule(match="*.q_proj", method="dora", rank=0)],
    "full": [trimtab.Rule(match="*.q_proj", method="full")],
    "full-magnitude": [trimtab.Rule(match="*.q_proj", method="full", magnitude=True, dtype="float64")],
    "two-scalings": [
        trimtab.Rule(match="*.q_proj", method="lora", rank=4),
        trimtab.Rule(match="*.v_proj", method="lora", rank=4, rank_stabilised=True),
    ],
    "serial": [trimtab.Rule(match=["*.mlp", "*.self_attn"], method="serial", bottleneck=3)],
    "parallel": [trimtab.Rule(match="*.mlp", method="parallel", bottleneck=3, scale=2, activation="silu")],
    "blocks-and-lora-inside": [
        trimtab.Rule(match="all-linear", method="lora", rank=2),
        trimtab.Rule(match="*.[01]", method="serial", bottleneck=3),
        trimtab.Rule(match="*.mlp", method="parallel", bottleneck=3),
    ],
    "everything": [
        trimtab.Rule(match="all-linear", method="lora", rank=2),
        trimtab.Rule(match="*.k_proj", method="dora", rank=2, magnitude_axis="input"),
        trimtab.Rule(match="*.o_proj", method="mora", rank=3, form="sharing", magnitude=True),
        trimtab.Rule(match="*.down_proj", layers="0", method="full"),
        trimtab.Rule(match="*.down_proj", layers="1", method="dora", rank=0),
    ],
}
PLANS = PEFT_PLANS | OUR_PLANS


def trained(model: nn.Module, *rules: trimtab.Rule, seed: int = 5) -> nn.Module:
    """``model`` with the adapters of ``rules``, every trained tensor moved away from its start."""
    trimtab.attach(model, trimtab.Plan(rules))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trimtab.trainable_parameters(model).items():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter * (1 + 0.1 * noise) if name.endswith("magnitude") else parameter + 0.1 * noise)
    return model


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """``MODULE.TENSOR`` -> a copy of every trained tensor."""
    return {
        f"{name}.{key}": value.detach().clone()
        for name, module in adapted_modules(model)
        for key, value in module.adapter.named_parameters()
    }


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether the two hold the same names, dtypes and bits."""
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and torch.equal(value, other[name]) for name, value in one.items()
    )


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that an operation could change; compare with ``assert_unchanged``."""
    return {
        "tensors": {name: value.detach().clone() for name, value in model.state_dict(keep_vars=True).items()},
        "identities": {name: id(value) for name, value in model.state_dict(keep_vars=True).items()},
        "modules": {name: (type(module), id(module), module.training) for name, module in model.named_modules()},
        "trainable": {name: value.requires_grad for name, value in model.named_parameters()},
        "attributes": sorted(name for name in vars(model) if "trimtab" in name),
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    """The model is what it was: bits, modules, modes, what is trainable, and nothing hung on it."""
    after = state_of(model)
    for key in ("identities", "modules", "trainable", "attributes"):
        assert after[key] == before[key], f"{key} changed"
    assert same_tensors(after["tensors"], before["tensors"]), "values changed"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object; ``...`` removes the key."""
    value = {**read_json(path), **changes}
    path.write_text(json.dumps({key: one for key, one in value.items() if one is not ...}), encoding="utf-8")


def edit_tensors(
    path: Path,
    change: dict[str, Tensor | None] | None = None,
    header: dict[str, str] | None = None,
    rename: dict[str, str] | None = None,
) -> None:
    """Rewrite a safetensors file: replace, add or (None) remove tensors, rename them, replace the header's entries."""
    with safe_open(path, framework="pt") as file:
        tensors: dict[str, Tensor | None] = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata() or {})
    tensors.update(change or {})
    named = {(rename or {}).get(name, name): value.contiguous() for name, value in tensors.items() if value is not None}
    path.unlink()
    save_file(named, path, metadata=metadata if header is None else header)


def forge(folder: Path, edit: Any, **tensors: Any) -> None:
    """Change ``modules`` of our own format and set the hash right again, as an attacker would; further arguments go
    to ``edit_tensors``."""
    described = read_json(folder / OUR_FILES[0])
    changed = edit(described["modules"])
    described["modules"] = described["modules"] if changed is None else changed
    (folder / OUR_FILES[0]).write_text(json.dumps(described), encoding="utf-8")
    text = json.dumps(described["modules"], sort_keys=True, separators=(",", ":"))
    header = {"format": "pt", "modules": hashlib.sha256(text.encode()).hexdigest()}
    edit_tensors(folder / OUR_FILES[1], header=header, **tensors)


SECONDS = 5.0  # an error is due in a blink; this is what a busy machine may make of a blink


def refused(model: nn.Module, folder: Path, says: str | None = None) -> None:
    """Loading is refused, soon, in a message of bearable length, and leaves the model alone."""
    before = state_of(model)
    start = time.monotonic()
    with pytest.raises(trimtab.AdapterError, match=says) as caught:
        trimtab.load_adapter(model, folder)
    assert time.monotonic() - start < SECONDS
    assert_unchanged(model, before)
    message = str(caught.value)
    assert str(folder) in message, "the message names no place"
    assert len(message) < 1500
    assert message.isprintable()
