"""Whether a layer derived from ``nn.Linear`` computes what a linear layer computes, found out by trying it.

A class that leaves ``forward`` as it is needs no trial. Any other is called with a few random rows, in eval mode and in
training mode, and has to give ``x W^T + bias`` within rounding. What is called is a copy that shares the weight, so
that a layer that counts its calls, or draws random numbers, does not notice.
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trimtab.bases import _base
from trimtab.ops.autocast import without_autocast

# What a trial found, by layer, since a handle on a layer is made many times; and by what stands for a layer on the meta
# device, where those of one size are alike.
_FOUND: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_FOUND_ON_META: dict[Any, str] = {}


def why_not_linear(layer: nn.Linear) -> str:
    """Why ``layer`` is not a linear layer with a plain weight; empty if it is one."""
    if parametrize.is_parametrized(layer, "weight"):
        return "its weight is parametrised; remove the parametrisation first"
    weight = layer._parameters.get("weight")
    if weight is None:
        others = ", ".join(name for name in layer._parameters if name != "bias")
        return f"its weight is computed from {others or 'something else'} before it is used"
    if not _base.is_plain(weight):
        return f"its weight is a {type(weight).__name__} of {weight.dtype}, and no plain matrix"
    if not _has_own_forward(layer):
        return ""
    others = ", ".join(name for name, _ in layer.named_parameters() if name not in ("weight", "bias"))
    if others:
        return f"its forward is its own, and it has other parameters than weight and bias ({others})"
    if not weight.is_meta:
        if layer not in _FOUND:
            _FOUND[layer] = _try(layer)
        return _FOUND[layer]
    if any(True for _ in layer.buffers()):
        return "its forward is its own, and with buffers on the meta device it cannot be tried"
    key = type(layer), weight.shape, weight.dtype, layer.extra_repr()
    if key not in _FOUND_ON_META:
        _FOUND_ON_META[key] = _try(layer)
    return _FOUND_ON_META[key]


def _has_own_forward(layer: nn.Linear) -> bool:
    if "forward" in vars(layer) and not hasattr(layer, "_hf_hook"):  # accelerate's hooks move tensors, and no more
        return True
    return type(layer).forward is not nn.Linear.forward or type(layer).__call__ is not nn.Module.__call__


def _try(layer: nn.Linear) -> str:
    weight = _copy(layer).weight
    x = _random(3, 2, weight.shape[1])
    for row, size in zip(x, (0.01, 1.0, 100.0), strict=True):  # so that a layer that clips is told
        row *= size
    x = x.to(weight)
    with torch.no_grad(), torch.random.fork_rng([weight.device] if weight.is_cuda else []), without_autocast(weight):
        for mode in ("", " in training mode"):
            if different := _differs(_copy(layer).train(bool(mode)), x):
                return different + mode
        for name, _ in layer.named_buffers():
            trial = _copy(layer).eval()
            buffer = trial.get_buffer(name)
            buffer.copy_(_random(*buffer.shape) if buffer.is_floating_point() else buffer.logical_not())
            if _differs(trial, x):
                return f"what its forward gives depends on its buffer {name}"
    return ""


def _random(*shape: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(shape, generator=generator, device="cpu")  # whatever the default device is


def _copy(layer: nn.Linear) -> nn.Linear:
    """A copy of ``layer`` without hooks. It shares the weight (unless that has no values, or zeros alone, which times
    anything are right) and what its attributes refer to; lists and counters, bias, buffers and children are its own."""
    made = type(layer).__new__(type(layer))
    own = dict(vars(layer))
    for name, value in own.items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            own[name] = type(value)()
        elif isinstance(value, (list, dict, set)):
            own[name] = copy.copy(value)
        elif isinstance(value, MethodType) and value.__self__ is layer:
            own[name] = MethodType(value.__func__, made)
    vars(made).update(own)
    made._buffers = {name: None if buffer is None else buffer.clone() for name, buffer in layer._buffers.items()}
    made._modules = copy.deepcopy(layer._modules)
    weight, bias = layer.weight, layer.bias
    device = torch.device("cpu") if weight.is_meta else weight.device
    if weight.is_meta or not bool(weight.any()):
        made._parameters["weight"] = nn.Parameter(_random(*weight.shape).to(device, weight.dtype))
    if bias is not None and "forward" not in own:  # a function that was put onto the layer may read the layer's bias
        made._parameters["bias"] = nn.Parameter(torch.linspace(-1, 1, len(bias), dtype=bias.dtype, device=device))
    return made


def _differs(trial: nn.Linear, x: Tensor) -> str:
    """What is wrong with the output of ``trial`` for ``x``; empty if nothing is."""
    weight, bias = trial.weight, trial.bias
    try:
        got = trial(x.clone())
    except Exception as error:
        return f"its forward cannot be tried with a batch ({type(error).__name__}: {error})"[:200]
    if not isinstance(got, Tensor):
        return f"its forward gives a {type(got).__name__}"
    work = torch.promote_types(x.dtype, torch.float32)
    expected = F.linear(x, weight, bias).to(work)
    # The output may be rounded once more, before the bias is added, and its sums taken in another order.
    lengths = x.to(work).square().mean(-1, keepdim=True).sqrt() * torch.linalg.vector_norm(weight, dim=1, dtype=work)
    eps = torch.finfo(x.dtype).eps
    room = eps * (expected.abs() + (0 if bias is None else 2 * bias.to(work).abs()))
    room = room + (eps / 4 if eps > 1e-4 else 16 * eps) * lengths
    same = got.shape == expected.shape and got.dtype == x.dtype
    if not same or not bool(((got.to(work) - expected).abs() <= room).all()):
        return "its forward gives something else than x W^T + bias"
    return ""
