"""PEFT's LoRA layers with our kernels: subclasses of PEFT's own, which a layer is turned into where it is.

There is one for each of PEFT's, and nothing in it but a forward pass. Names, parameters, files, merging and what PEFT
does with several adapters stay PEFT's; and whatever is no product with one adapter beside it (adapters that are merged,
disabled, active together or mixed in a batch, hooks on the modules inside) goes through PEFT's own forward pass.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import dora, layer as lora, variants
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from trimtab import bases
from trimtab.bases import WeightBase
from trimtab.errors import PlanError
from trimtab.integrations.peft_layer_adapter import PeftAdapter
from trimtab.ops.ratio import HALF
from trimtab.ops.traced import seen_through

_KEPT = "_trimtab_kept"
_DORA = (
    variants.DoraLinearVariant,
    variants.DoraEmbeddingVariant,
    variants.DoraConv1dVariant,
    variants.DoraConv2dVariant,
    variants.DoraConv3dVariant,
)


class Kept(NamedTuple):
    """What a layer keeps from one pass to the next."""

    module: nn.Module
    """The frozen layer under it."""
    kind: type
    """The class of that layer's weight."""
    base: WeightBase | None
    """The handle on it; None where it cannot take our kernels."""
    adapter: PeftAdapter | None


class Quick:
    """A layer of PEFT with our kernels in its forward pass."""

    casts_under_autocast = True
    """Whether PEFT casts an input of this kind of layer to the adapter's dtype under autocast, too."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self
        name = None if args or kwargs else _acting(layer, x)
        if name is not None and (kept := _usable(layer, x)) is not None:
            magnitudes = layer._modules["lora_magnitude_vector"]
            if name in magnitudes:  # a pass without PEFT's cache empties it
                vars(magnitudes[name]).get("_dora_cache", {}).clear()
            assert kept.base is not None
            assert kept.adapter is not None
            return kept.adapter.compute(x, kept.base, layer, name)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]


class Linear(Quick, lora.Linear):
    """``peft.tuners.lora.Linear``, on ``nn.Linear`` and on transformers' ``Conv1D``."""


class Embedding(Quick, lora.Embedding):
    """``peft.tuners.lora.Embedding``."""


class Conv1d(Quick, lora.Conv1d):
    """``peft.tuners.lora.Conv1d``."""


class Conv2d(Quick, lora.Conv2d):
    """``peft.tuners.lora.Conv2d``."""


class Conv3d(Quick, lora.Conv3d):
    """``peft.tuners.lora.Conv3d``."""


@cache
def _linear_4bit() -> Any:
    from peft.tuners.lora import bnb

    class Linear4bit(Quick, bnb.Linear4bit):
        """``peft.tuners.lora.bnb.Linear4bit``."""

        __qualname__ = "Linear4bit"
        casts_under_autocast = False

    return Linear4bit


def __getattr__(name: str) -> Any:
    """``Linear4bit`` is made when it is first asked for (by ``quick_class``, or by pickle): it takes bitsandbytes."""
    if name == "Linear4bit":
        return _linear_4bit()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def quick_class(layer: Any) -> Any:
    """The class with our kernels for ``layer``, or its own if it is one; None if there is none."""
    kind: Any = type(layer)
    if isinstance(layer, Quick):
        return type(layer)
    if (kind.__module__, kind.__name__) == ("peft.tuners.lora.bnb", "Linear4bit"):
        return _linear_4bit()
    return next((one for one in (Linear, Embedding, Conv1d, Conv2d, Conv3d) if one.__bases__[1] is kind), None)


def why_not(layer: Any) -> str:
    """Why ``layer``, one of PEFT's LoRA layers, stays as it is; empty if it takes our kernels."""
    own, kind = layer.base_layer, type(layer).__name__
    if quick_class(layer) is None:
        return _OTHER_LAYERS.get(kind, f"trimtab has no kernels for PEFT's {kind}")
    if isinstance(own, BaseTunerLayer):
        return f"another layer of PEFT, {type(own).__name__}, lies under it"
    base = bases.find(own)
    if base is None:
        return f"it lies on a {bases.named(own)}, which trimtab does not know"
    if not base.is_called:
        return "the module that holds it reads its weight and does not call it"
    if kind == "Linear" and not base.stored_dense:
        return f"it lies on a {type(own).__name__}, whose own product is not that with its dequantised weight"
    try:
        base.require()
    except PlanError as error:
        return str(error)
    if getattr(own, "sparse", False):
        return "the gradients of this look-up are sparse, and those of trimtab's kernels dense"
    return base.peft_differs(PeftAdapter(base, True).options)


_OTHER_LAYERS = {
    "Linear8bitLt": "bitsandbytes rounds the inputs of int8 layers, too, where trimtab's kernels would not",
    "MultiheadAttention": "PEFT puts its adapters into the attention's weights for each pass, and no layer is called",
    "ParamWrapper": "PEFT adds its adapters to the parameter for each pass, and no layer is called",
}


def why_not_adapter(layer: Any, name: str) -> str:
    """Why ``layer`` computes with its adapter ``name`` as PEFT does; empty if it takes our kernels."""
    variant = layer.lora_variant.get(name)
    if variant is not None and type(variant) not in _DORA:
        return f"trimtab has no {type(variant).__name__.removesuffix('Variant')}, a variant of LoRA"
    held = layer._modules
    if name in held["lora_embedding_A"]:
        parallel = name in layer.input_fns or name in layer.output_fns
        return "its look-up is cut in parts for several devices" if parallel else ""
    own, first, second, dropout = (
        held["base_layer"],
        held["lora_A"][name],
        held["lora_B"][name],
        held["lora_dropout"][name],
    )
    for module in (first, second):
        usual = type(module) is type(own) or type(module).forward is nn.Linear.forward
        if not usual or type(module.weight) not in (nn.Parameter, Tensor):
            return f"its factors are a {type(module).__name__} of {type(module.weight).__name__}"
    if not isinstance(dropout, (nn.Identity, nn.Dropout)):
        return f"its dropout is a {type(dropout).__name__}"
    if watched := next((one for one in (first, second, dropout, own) if _is_watched(one)), None):
        return f"hooks lie on a {type(watched).__name__} inside it, which only PEFT's own pass calls"
    return ""


def turn(layer: Any) -> str:
    """Make ``layer`` one with our kernels. Why not, if its forward pass was replaced by somebody else's."""
    kind, own = quick_class(layer), vars(layer)
    place = "_old_forward" if "_old_forward" in own else "forward"  # accelerate's hooks keep what they stand around
    if place in own:
        if getattr(own[place], "__func__", None) is not type(layer).forward:
            return "its forward pass was replaced by another than PEFT's"
        own[place] = kind.forward.__get__(layer)
    layer.__class__ = kind
    keep(layer)
    return ""


def why_not_in_training(layer: Any, name: str) -> str:
    """Why ``layer`` computes with its adapter ``name`` as PEFT does while it is trained; empty if it does not.

    PEFT's DoRA with dropout multiplies two inputs with the weight, one of them in the adapter's float32. That is right
    in half precision, too; but measured on a processor without AMX, whose products of half precision are the slower
    ones, it took 1.1 times as long.
    """
    held = layer._modules
    if name not in held["lora_magnitude_vector"] or name not in held["lora_A"]:
        return ""
    dropout = held["lora_dropout"][name]
    if not isinstance(dropout, nn.Dropout):
        return ""
    weight = held["base_layer"].weight
    if dropout.p > 0 and weight.device.type == "cpu" and weight.dtype in HALF:
        return "DoRA with dropout, in half precision on a processor, is no quicker with trimtab's kernels"
    return ""


def adapter_names(layer: Any) -> list[str]:
    """The adapters of ``layer``."""
    held = layer._modules
    return [*(held["lora_embedding_A"] or held["lora_A"])]


def _acting(layer: Any, x: Any) -> str | None:
    """The adapter that alone acts in this pass; None where it is PEFT's own pass."""
    plain = type(x) in (Tensor, nn.Parameter) or (isinstance(x, Tensor) and torch.compiler.is_compiling())
    if not plain or layer.disable_adapters or layer.merged or not layer.cast_input_dtype_enabled:
        return None
    held = adapter_names(layer)
    active = [name for name in layer.active_adapters if name in held]
    if len(active) != 1 or why_not_adapter(layer, active[0]):
        return None
    if dora.ENABLE_DORA_CACHING and not layer.training:  # asked for: its own pass fills the cache
        return None
    return None if layer.training and why_not_in_training(layer, active[0]) else active[0]


def keep(layer: Any) -> Kept:
    """Find out anew what ``layer`` is to keep of the frozen layer under it."""
    own = layer.base_layer
    base = None if why_not(layer) else bases.find(own)
    adapter = None if base is None else PeftAdapter(base, layer.casts_under_autocast)
    layer.__dict__[_KEPT] = kept = Kept(own, type(getattr(own, "weight", None)), base, adapter)
    return kept


def _usable(layer: Any, x: Tensor) -> Kept | None:
    """What ``layer`` keeps; None where it is PEFT's own pass."""
    own, kept = layer._modules["base_layer"], layer.__dict__.get(_KEPT)
    weight = getattr(own, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    # FSDP shows a plain tensor in the place of a parameter while it computes.
    if kept is None or kept.module is not own or type(weight) not in (kept.kind, Tensor):
        if torch.compiler.is_compiling():
            return None
        kept = keep(layer)
    trained = weight.requires_grad and torch.is_grad_enabled()
    if trained or seen_through() or x.device != weight.device or getattr(layer, "_is_replica", False):
        return None
    return kept if kept.base is not None else None


def _is_watched(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its forward function."""
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return True
    if "_hf_hook" not in own:
        return "forward" in own
    # accelerate's hooks of this kind bring the input to the layer's device, where it is, and fetch weights if asked to.
    hook = own["_hf_hook"]
    return any(getattr(one, "offload", True) for one in getattr(hook, "hooks", (hook,)))
