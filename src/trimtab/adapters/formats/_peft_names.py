"""What the names of the tensors in a PEFT folder say: ``base_model.model.MODULE.TENSOR``.

Around that, read are: the name of the adapter (``lora_A.default.weight``, as in a state_dict of PEFT's that was saved
as it stood), what wraps a model (``_orig_mod``, ``_fsdp_wrapped_module``, a leading ``module``), and the
``base_layer`` of PEFT's own wrappers (``attn.base_layer.out_proj``).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from trimtab import bases
from trimtab.adapters.safe_read import shown
from trimtab.errors import AdapterError

PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
BASE = "base_layer.weight"
_BASE_LAYER = "base_layer"
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


class _Place(NamedTuple):
    module: str
    own: str
    """Our name of the tensor."""
    adapter: str | None


def by_module(weights: Path, tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """``module -> our name of the tensor -> tensor``. Raises AdapterError for a tensor that does not belong there, and
    for tensors of more than one adapter."""
    modules: dict[str, dict[str, Tensor]] = {}
    adapters: dict[str, None] = {}
    names = bases.peft_names()
    # Older PEFT releases added ".weight" to the magnitude's name, and some gave it a second axis.
    ours = names | {f"{MAGNITUDE}.weight": "magnitude", BASE: BASE}
    places = {key: _place(key, ours) for key in tensors}
    for key in sorted(places, key=lambda key: (place := places[key]) is not None and place.adapter is not None):
        place, tensor = places[key], tensors[key]
        if place is None or place.own in modules.setdefault(place.module, {}):
            raise AdapterError(
                f"{weights}: unexpected tensor {shown(key)}; expected {PREFIX}MODULE.{{{', '.join(names)}}}, each once"
            )
        if place.adapter is not None:
            adapters[place.adapter] = None
        is_row = place.own == "magnitude" and tensor.squeeze().dim() <= 1
        modules[place.module][place.own] = tensor.reshape(-1) if is_row else tensor
    if len(adapters) > 1:
        raise AdapterError(
            f"{weights}: tensors of {len(adapters)} adapters ({shown(', '.join(adapters))}) in one folder; save one of "
            "them with PEFT: peft_model.save_pretrained(FOLDER, selected_adapters=[NAME])"
        )
    return modules


def _place(key: str, ours: dict[str, str]) -> _Place | None:
    """Where the tensor ``key`` belongs; None for a name that is none of PEFT's. ``ours``: PEFT's name -> ours."""
    parts = [part for part in key.split(".") if part not in _WRAPPERS]
    while parts[0] == "module":
        parts = parts[1:]
    if not (rest := ".".join(parts)).startswith(PREFIX):
        return None
    parts = rest.removeprefix(PREFIX).split(".")
    stems = {name.split(".")[0] for name in ours}
    at = max((number for number, part in enumerate(parts) if part in stems), default=0)
    if not at:
        return None
    stem, *tail = parts[at:]
    own, adapter = ours.get(".".join([stem, *tail])), None
    if own is None and tail and stem != _BASE_LAYER:
        own, adapter = ours.get(".".join([stem, *tail[1:]])), tail[0]
    # PEFT's wrapper around a module with modules of its own; where it is the last part, it says which of several
    # wrappers around one module is meant.
    inside = [part for part in parts[: at - 1] if part != _BASE_LAYER]
    return None if own is None else _Place(".".join([*inside, parts[at - 1]]), own, adapter)
