"""The tuned weights in a model folder, in an adapter, or in every checkpoint of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from trimtab import bases, methods
from trimtab.adapters.placing import read_adapter
from trimtab.adapters.record import StoredAdapter
from trimtab.errors import AdapterError, ModelError
from trimtab.models.model_files import Weights
from trimtab.runs.checkpoints import numbered
from trimtab.runs.folder import RunFolder
from trimtab.runs.records import Summary


@dataclass(frozen=True)
class Tuned:
    """One state of tuned weights.

    Attributes:
        label: the name of its folder.
        step: the training step at which it was saved; None if unknown.
        methods: the method of each module that may have changed.
        dtype: what the base weights were rounded to before tuning; None if they were used as stored.
        weight: the tuned weight ``[out, in]`` of a module, given its name and the base's weight ``[out, in]``.
        left_out: modules whose adapter changes no weight.
    """

    label: str
    step: int | None
    methods: dict[str, str]
    dtype: torch.dtype | None
    weight: Callable[[str, Tensor], Tensor]
    left_out: tuple[str, ...] = ()


def find_tuned(
    place: Path, layers: dict[str, bases.WeightBase], note: Callable[[str], None] = lambda _: None
) -> list[Tuned]:
    """The states in ``place``, the earliest first; ``layers`` are the layers of the base. ``note`` is told of each
    state of a run that is damaged and left out.

    Raises:
        ModelError: ``place`` is none of the three, has a module that the base lacks, or changes no weight.
        AdapterError: an adapter in it cannot be read.
    """
    run = RunFolder(place)
    if run.config.is_file() and (run.has_adapter or run.checkpoints.is_dir()):
        return _of_run(run, layers, note)
    if (place / "config.json").is_file():
        return [_of_folder(place, layers)]
    try:
        return [_of_adapter(place, place.name, None, None, layers)]
    except AdapterError as error:
        raise ModelError(
            f"{error}. To analyse: expected a model folder (config.json and *.safetensors), the folder of an adapter, "
            "or that of a run"
        ) from None


def _of_run(run: RunFolder, layers: dict[str, bases.WeightBase], note: Callable[[str], None]) -> list[Tuned]:
    summary = run.read_summary() or Summary()
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(summary.precision or "")
    places = [(folder, folder.name, step) for step, folder in numbered(run.checkpoints)]
    if run.has_adapter:
        places.append((run.adapter, "adapter", summary.steps or 0))
    states = []
    for folder, label, step in places:
        try:
            states.append(_of_adapter(folder, label, step, dtype, layers))
        except AdapterError as error:  # half of one, as an ended process or a hand that tidied up leaves it
            note(f"left out: {error}")
    if not states:
        raise ModelError(f"{run.path}: this run has neither a whole checkpoint nor an adapter yet.")
    return states


def _of_folder(place: Path, layers: dict[str, bases.WeightBase]) -> Tuned:
    weights = Weights(place)
    names = [name for name, layer in layers.items() if layer.is_linear and layer.tensor_name(name) in weights]
    if not names:
        raise ModelError(f"{place}: none of the base's {len(layers)} weights is in it; it is another model.")

    def weight(name: str, base: Tensor) -> Tensor:
        own = layers[name].as_weight(weights[layers[name].tensor_name(name)])
        if own.shape != base.shape:
            raise ModelError(f"{place}: {name} is {list(own.shape)}, the base's is {list(base.shape)}.")
        return own

    # Without an adapter, the weights themselves were trained.
    method = next(name for name in methods.names("weight") if methods.method_class(name).trains_base)
    return Tuned(place.name, None, dict.fromkeys(names, method), None, weight)


def _of_adapter(
    place: Path, label: str, step: int | None, dtype: torch.dtype | None, layers: dict[str, bases.WeightBase]
) -> Tuned:
    whole = read_adapter(place)
    stored = {name: entry for name, entry in whole.items() if methods.method_class(entry.method).sits_on == "weight"}
    if not stored:
        kinds = ", ".join(sorted({entry.method for entry in whole.values()}))
        raise ModelError(f"{place}: all of its {len(whole)} adapters ({kinds}) sit on blocks and change no weight.")
    missing = [name for name in stored if name not in layers]
    if missing:
        raise ModelError(
            f"{place}: made for another model: {len(missing)} of its {len(stored)} modules are not in the base, such "
            f"as {missing[0]!r}."
        )

    def weight(name: str, base: Tensor) -> Tensor:
        return _effective(f"{place}: {name}", layers[name], stored[name].on(layers[name]), base)

    used = {name: entry.method for name, entry in stored.items()}
    left_out = tuple(name for name in whole if name not in stored)
    return Tuned(label, step, methods=used, dtype=dtype, weight=weight, left_out=left_out)


@torch.no_grad()
def _effective(place: str, layer: bases.WeightBase, stored: StoredAdapter, weight: Tensor) -> Tensor:
    """The effective weight of ``layer``, where ``weight`` is its own, in float64; both ``[out, in]``, of a stack the
    rows of all."""
    empty = layer.parameter
    stored_weight = layer.as_stored(weight.reshape(*layer.stack, *layer.shape))
    layer.replace(nn.Parameter(stored_weight, requires_grad=False))
    try:
        with torch.random.fork_rng(devices=[]):  # a method draws its initial values, which are overwritten below
            method = methods.method_class(stored.method).class_for(layer)(layer, stored.options)
        tensors = method.stored_tensors()
        if {key: value.shape for key, value in tensors.items()} != {k: v.shape for k, v in stored.tensors.items()}:
            raise ModelError(f"{place}: its tensors do not fit a weight of {list(weight.shape)}.")
        for key, tensor in tensors.items():
            tensor.copy_(stored.tensors[key])
        return method.effective_weight(layer, torch.float64).flatten(0, -2)
    finally:
        layer.replace(empty)
