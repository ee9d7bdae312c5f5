"""The weights of something tuned, whatever form it is in: a model folder, an adapter, or every checkpoint of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from trimtab import bases, methods
from trimtab.adapters.record import StoredAdapter
from trimtab.adapters.store import read_adapter
from trimtab.errors import AdapterError, ModelError
from trimtab.models.tensors import Weights
from trimtab.runs.folder import RunFolder


@dataclass(frozen=True)
class Tuned:
    """One state of tuned weights.

    Attributes:
        label: what to call it: the name of its folder.
        step: the training step it was saved at; None if unknown.
        methods: of each module that it may have changed, the method.
        dtype: what the base weights were rounded to before they were tuned; None: as stored.
        weight: the tuned weight ``[out, in]`` of a module, given its name and the base's weight ``[out, in]``.
        left_out: modules whose adapter changes no weight.
    """

    label: str
    step: int | None
    methods: dict[str, str]
    dtype: torch.dtype | None
    weight: Callable[[str, Tensor], Tensor]
    left_out: tuple[str, ...] = ()


def find_tuned(place: Path, layers: dict[str, bases.WeightBase]) -> list[Tuned]:
    """The states in ``place``, the earliest first; ``layers`` are the modules of the base that hold weights.

    Raises:
        ModelError: it is none of the three forms, has a module that the base has not, or changes no weight.
        AdapterError: an adapter in it cannot be read.
    """
    run = RunFolder(place)
    if run.config.is_file() and (run.has_adapter or run.checkpoints.is_dir()):
        return _of_run(run, layers)
    if (place / "config.json").is_file():
        return [_of_folder(place, layers)]
    try:
        return [_of_adapter(place, place.name, None, None, layers)]
    except AdapterError as error:
        raise ModelError(
            f"{error}. To analyse: expected a model folder (config.json and *.safetensors), the folder of an adapter, "
            "or that of a run"
        ) from None


def _of_run(run: RunFolder, layers: dict[str, bases.WeightBase]) -> list[Tuned]:
    summary = run.read_summary()
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(summary.get("precision", ""))
    found = [_of_adapter(folder, folder.name, step, dtype, layers) for step, folder in run.complete_checkpoints()]
    if run.has_adapter:
        found.append(_of_adapter(run.adapter, "adapter", summary.get("steps"), dtype, layers))
    if not found:
        raise ModelError(f"{run.path}: this run has neither checkpoints nor an adapter yet.")
    return found


def _of_folder(place: Path, layers: dict[str, bases.WeightBase]) -> Tuned:
    weights = Weights(place)
    names = [name for name in layers if f"{name}.weight" in weights]
    if not names:
        raise ModelError(f"{place}: none of the base's {len(layers)} weights is in it; it is another model.")

    def weight(name: str, base: Tensor) -> Tensor:
        found = layers[name].as_stored(weights[f"{name}.weight"])
        if found.shape != base.shape:
            raise ModelError(f"{place}: {name} is {list(found.shape)}, the base's is {list(base.shape)}.")
        return found

    # Without an adapter, the weights themselves were trained.
    method = next(name for name in methods.names("weight") if methods.method_class(name).trains_base)
    return Tuned(place.name, None, dict.fromkeys(names, method), None, weight)


def _of_adapter(
    place: Path, label: str, step: int | None, dtype: torch.dtype | None, layers: dict[str, bases.WeightBase]
) -> Tuned:
    whole = read_adapter(place)
    stored = {name: one for name, one in whole.items() if methods.method_class(one.method).sits_on == "weight"}
    if not stored:
        said = ", ".join(sorted({entry.method for entry in whole.values()}))
        raise ModelError(f"{place}: all of its {len(whole)} adapters ({said}) sit on blocks and change no weight.")
    missing = [name for name in stored if name not in layers]
    if missing:
        raise ModelError(
            f"{place}: made for another model: {len(missing)} of its {len(stored)} modules are not in the base, such "
            f"as {missing[0]!r}."
        )

    def weight(name: str, base: Tensor) -> Tensor:
        return _effective(place, name, stored[name], base)

    kinds = {name: entry.method for name, entry in stored.items()}
    left_out = tuple(name for name in whole if name not in stored)
    return Tuned(label, step, methods=kinds, dtype=dtype, weight=weight, left_out=left_out)


@torch.no_grad()
def _effective(place: Path, name: str, stored: StoredAdapter, weight: Tensor) -> Tensor:
    """``m (W + dV) / ||W + dV|| [out, in]`` in float64 for the stored adapter of one module."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    base = bases.find(layer)
    assert base is not None
    with torch.random.fork_rng(devices=[]):  # a method draws its start, which is overwritten here
        method = methods.method_class(stored.method)(base, stored.options)
    expected = {key: value.shape for key, value in method.named_parameters()}
    if expected != {key: value.shape for key, value in stored.tensors.items()}:
        raise ModelError(f"{place}: {name}: its tensors do not fit a weight of {list(weight.shape)}.")
    for key, parameter in method.named_parameters():
        parameter.copy_(stored.tensors[key])
    return method.effective_weight(base, torch.float64)
