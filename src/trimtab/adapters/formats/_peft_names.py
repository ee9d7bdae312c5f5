"""What the names of the tensors in a PEFT folder say: ``base_model.model.MODULE.TENSOR``.

Around that, read are: the name of the adapter (``lora_A.default.weight``, as in a state_dict of PEFT's that was saved
as it stood), what wraps a model (``_orig_mod``, ``_fsdp_wrapped_module``, a leading ``module``), and the
``base_layer`` of PEFT's own wrappers (``attn.base_layer.out_proj``).

Any other name is that of a tensor of the model's own, which PEFT puts into the base when it loads the folder: of a
module that was trained as a whole (``modules_to_save``), a bias, an embedding that was resized.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from trimtab import bases
from trimtab.adapters.record import B_BIAS
from trimtab.adapters.safe_read import shown
from trimtab.errors import AdapterError

PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
BASE = "base_layer.weight"
BASE_BIAS = "base_layer.bias"
_BASE_LAYER = "base_layer"
_TOKENS = "token_adapter"
TRAINED_ROWS = "trainable_tokens_delta"
_INSIDE = f".{_BASE_LAYER}."
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_OF_PEFT = {_BASE_LAYER, _TOKENS, "modules_to_save", "original_module"} | _WRAPPERS


class _Key(NamedTuple):
    place: str
    """The module, with PEFT's ``base_layer`` in its name where it is inside another one that PEFT wraps."""
    own: str
    """Our name of the tensor."""
    adapter: str | None


ByModule = dict[str, dict[str, Tensor]]


def by_module(weights: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> tuple[ByModule, ByModule]:
    """``place -> our name of the tensor -> tensor`` of the adapters; and ``module -> its own name -> tensor`` of the
    model's own. Raises AdapterError for a tensor that does not belong there, and for tensors of more than one
    adapter."""
    modules: ByModule = {}
    own: ByModule = {}
    adapters: dict[str, None] = {}
    names = bases.peft_names()
    # Older PEFT releases added ".weight" to the magnitude's name, and some gave it a second axis.
    ours = names | {f"{MAGNITUDE}.weight": "magnitude", BASE: BASE, BASE_BIAS: BASE_BIAS}
    if config.get("lora_bias"):
        ours["lora_B.bias"] = B_BIAS
    keys = {key: _parsed(key, ours) for key in tensors}
    for key in sorted(keys, key=lambda key: (parsed := keys[key]) is not None and parsed.adapter is not None):
        parsed, tensor = keys[key], tensors[key]
        if parsed is None and (found := _of_the_model(key, tensors)) is not None:
            module, name = found
            if module:
                own.setdefault(module, {})[name] = tensor
            continue
        if parsed is None or parsed.own in modules.setdefault(parsed.place, {}):
            raise AdapterError(
                f"{weights}: unexpected tensor {shown(key)}; expected {PREFIX}MODULE.{{{', '.join(names)}}}, each once"
            )
        if parsed.adapter is not None:
            adapters[parsed.adapter] = None
        is_row = parsed.own == "magnitude" and tensor.squeeze().dim() <= 1
        modules[parsed.place][parsed.own] = tensor.reshape(-1) if is_row else tensor
    if len(adapters) > 1:
        raise AdapterError(
            f"{weights}: tensors of {len(adapters)} adapters ({shown(', '.join(adapters))}) in one folder; save one of "
            "them with PEFT: peft_model.save_pretrained(FOLDER, selected_adapters=[NAME])"
        )
    return modules, own


def _of_the_model(key: str, others: Container[str]) -> tuple[str, str] | None:
    """The module and the name there of a tensor that is the model's own; two empty words for what PEFT keeps beside it,
    and None for a name that is none of the model's."""
    parts = _without_wrappers(key)
    if parts is None or len(parts) < 2 or any(part.startswith("lora_") for part in parts):
        return None
    if _BASE_LAYER in parts and _TOKENS not in parts:
        return None
    if "original_module" in parts:
        return "", ""
    if "modules_to_save" in parts:
        # A second mention of a bias, from which PEFT took the adapter's name; or a state_dict that was saved as it
        # stood, with the adapter's name behind.
        at = parts.index("modules_to_save")
        if any(PREFIX + ".".join(parts[:at] + parts[at + more :]) in others for more in (1, 2)):
            return "", ""
        parts = parts[:at] + parts[at + 2 :]
    if _TOKENS in parts:  # the rows that are trained, and what they were in the base
        at = parts.index(_TOKENS)
        kept = parts[at + 1 : at + 2] == [TRAINED_ROWS]
        return (".".join(parts[:at]), TRAINED_ROWS) if kept else ("", "")
    module, _, name = ".".join(parts).rpartition(".")
    return (module, name) if module else None


def _without_wrappers(key: str) -> list[str] | None:
    """The parts of ``key`` without what wraps a model; None if it is no name of PEFT's."""
    parts = [part for part in key.split(".") if part not in _WRAPPERS]
    while parts and parts[0] == "module":
        parts = parts[1:]
    if not (rest := ".".join(parts)).startswith(PREFIX):
        return None
    return rest.removeprefix(PREFIX).split(".")


def _parsed(key: str, ours: dict[str, str]) -> _Key | None:
    """Where the tensor ``key`` belongs; None for a name that is none of PEFT's. ``ours``: PEFT's name -> ours."""
    if (parts := _without_wrappers(key)) is None or _TOKENS in parts:
        return None
    stems = {name.split(".")[0] for name in ours}
    at = max((number for number, part in enumerate(parts) if part in stems), default=0)
    if not at:
        return None
    stem, *tail = parts[at:]
    own, adapter = ours.get(".".join([stem, *tail])), None
    if own is None and tail and stem != _BASE_LAYER:
        own, adapter = ours.get(".".join([stem, *tail[1:]])), tail[0]
    return None if own is None else _Key(".".join(parts[:at]), own, adapter)


def can_be_read(name: str) -> bool:
    """Whether no part of a module's ``name`` is a word by which names of PEFT's tensors are read."""
    return not any(part in _OF_PEFT or part.startswith("lora_") for part in name.split("."))


def target_of(place: str) -> str:
    """The module that PEFT was told to adapt, and whose name its patterns match, for tensors at ``place``."""
    return place.split(_INSIDE)[0]


def module_of(place: str) -> str:
    """The name of the layer whose tensors are at ``place``, without PEFT's own wrappers around its parents."""
    return place.replace(_INSIDE, ".")


def parameters(place: str, targets: Sequence[str]) -> dict[str, str]:
    """``parameter -> full name`` for those of the module at ``place`` that PEFT's ``target_parameters`` may mean."""
    module, found = place, {}
    while module.endswith(f".{_BASE_LAYER}"):
        module = module.removesuffix(f".{_BASE_LAYER}")
    for target in targets:
        holder, _, parameter = target.rpartition(".")
        if not holder or module == holder or module.endswith(f".{holder}"):
            found[parameter] = f"{module}.{parameter}"
    return found


def wrapped(name: str, holder: nn.Module, adapted: Container[str]) -> str:
    """Where PEFT keeps the adapter of the parameter ``name`` of ``holder``: it wraps the module once for each of its
    parameters in turn, so that the last one is outermost."""
    module, _, parameter = name.rpartition(".")
    own = [other for other in holder._parameters if f"{module}.{other}" in adapted]
    return ".".join([module, *[_BASE_LAYER] * (len(own) - 1 - own.index(parameter))])
