"""An accelerator for machines that have none: its tensors compute, and lie in the processor's memory.

    with accelerator() as seen:
        y = layer.to(DEVICE)(x.to(DEVICE))
    assert not seen.waits

``DEVICE`` is PyTorch's device for backends of others (PrivateUse1). Its tensors are ordinary tensors with a storage and
numbers of their own, so autograd, views, versions, ``.data``, autocast and safetensors treat them as they do a GPU's.
Every kernel runs on a view of the same memory as a tensor of the processor (by DLPack, whose device is written over),
and so gives the processor's numbers: what runs here has to give what it gives there. An operation with tensors of both
devices is refused as a GPU refuses it.

What it cannot tell: seconds, and what a GPU's own kernels round otherwise.
"""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo  # before a function that it has a table of is replaced below
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "fakegpu"
aten = torch.ops.aten

# What is no kernel on any device: another look at the same memory.
VIEWS = (
    "as_strided",
    "view",
    "_reshape_alias",
    "unfold",
    "set_.source_Storage",
    "set_.source_Storage_storage_offset",
    "set_.source_Tensor",
)
# What makes the program wait for the device, since its result is a number, or a shape that depends on numbers.
WAITS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "repeat_interleave")
MEMORY = 8 * 2**30
HALF = (torch.bfloat16, torch.float16)
LOWER = "linear matmul mm addmm bmm baddbmm conv1d conv2d scaled_dot_product_attention"
FULL = "softmax.int log_softmax.int layer_norm cross_entropy_loss"
_BELOW = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


@dataclass
class Seen:
    """What happened on the device while this was open, each with the line of ours that made it."""

    launches: Counter[str] = field(default_factory=Counter)
    """Kernels, by the operation."""
    lines: Counter[str] = field(default_factory=Counter)
    """Kernels, by the line."""
    waits: Counter[str] = field(default_factory=Counter)
    """Where the program waited for the device: ``item``, ``nonzero``, comparisons, copies to the processor."""
    uploads: Counter[str] = field(default_factory=Counter)
    """Copies from the processor to the device."""
    left: Counter[str] = field(default_factory=Counter)
    """Tensors that lines of ours made on the processor, other than single numbers."""
    kept: int = 0
    """Bytes that autograd keeps for the backward pass, parameters and buffers not counted."""

    @property
    def count(self) -> int:
        """Kernels."""
        return self.launches.total()


class _Module(backend_registration._DummyBackendModule):
    """``torch.fakegpu``, which is there only while an ``accelerator`` is open, so that other tests see none."""

    def __init__(self) -> None:
        self.is_open = False

    def is_available(self) -> bool:
        return self.is_open

    def is_initialized(self) -> bool:
        return self.is_open

    def device_count(self) -> int:
        return int(self.is_open)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [*HALF]

    def get_device_name(self, device: Any = None) -> str:
        return "Fake GPU"

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return MEMORY // 2, MEMORY

    def memory_allocated(self, device: Any = None) -> int:
        return MEMORY // 16

    def memory_reserved(self, device: Any = None) -> int:
        return MEMORY // 8

    def max_memory_reserved(self, device: Any = None) -> int:
        return MEMORY // 4


class _Hook(backend_registration._DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return module.is_open


module = _Module()
# Autograd counts the devices at its first pass, and a process in which it has threads for one can't be forked any more
# (tests/faults do). Without threads of its own a device's pass is done by the thread that asks for it.
torch.ones(1, requires_grad=True).sum().backward()
backend_registration._setup_privateuseone_for_python_backend(NAME, module, _Hook())
DEVICE = torch.device(NAME, 0)
_open: list[Seen] = []


# Tensors of both devices over one memory ------------------------------------------------------------------------------

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_PROCESSOR, _EXTENSION = 1, 12  # DLPack's numbers of devices


def _retagged(tensor: Tensor, device: int) -> Tensor:
    """The memory of ``tensor`` as a tensor of another device."""
    capsule = torch._C._to_dlpack(tensor)  # type: ignore[attr-defined]
    ctypes.c_int32.from_address(_pointer(capsule, b"dltensor") + 8).value = device  # behind the pointer to the numbers
    again: Tensor = torch._C._from_dlpack(capsule)  # type: ignore[attr-defined]
    return again


def _down(value: Any) -> Any:
    return _retagged(value, _PROCESSOR) if isinstance(value, Tensor) and value.device.type == NAME else value


def _up(value: Any) -> Any:
    return _retagged(value.detach(), _EXTENSION) if isinstance(value, Tensor) and value.device.type == "cpu" else value


# Kernels --------------------------------------------------------------------------------------------------------------


def _line() -> str:
    """The innermost line of ours on the stack: ``methods/_weight.py:301``."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        _, _, place = frame.f_code.co_filename.rpartition("/src/trimtab/")
        if place and place != frame.f_code.co_filename:
            return f"{place}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def _tell(what: str, name: str) -> None:
    for seen in _open:
        getattr(seen, what)[f"{name} {_line()}"] += 1


def _kernel(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operation of the device, done by the processor's kernel on the same memory."""
    name = op.__name__.removesuffix(".default")
    if name in VIEWS:
        return op.redispatch(_BELOW, *args, **kwargs)
    place = op.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if place in ("_to_copy", "copy_", "_copy_from"):
        return _copied(op, place, args, kwargs)
    mine = [one for one in tensors if one.device.type == NAME]
    others = [one for one in tensors if one.device.type != NAME and one.dim() > 0]
    if mine and others and place not in ("index", "index_put_", "_index_put_impl_"):
        raise RuntimeError(f"Expected all tensors to be on the same device, but {op} got {others[0].device} and {NAME}")
    counts = place not in ("empty", "empty_strided", "empty_like", "new_empty", "_local_scalar_dense")
    if counts:
        line = _line()
        for seen in _open:
            seen.launches[place] += 1
            seen.lines[line] += 1
    chosen = tree_leaves(args[1:2]) if place.startswith("index") else []
    if place in WAITS or any(isinstance(one, Tensor) and one.dtype == torch.bool for one in chosen):
        _tell("waits", {"_local_scalar_dense": "item"}.get(place, place))
    here = {key: torch.device("cpu") if isinstance(value, torch.device) else value for key, value in kwargs.items()}
    outs = {one.name: kwargs[one.name] for one in op._schema.arguments if one.is_out and one.name in kwargs}
    here.update({key: _down(out) if out.numel() else torch.empty(0, dtype=out.dtype) for key, out in outs.items()})
    given = [_as_tensor(one, value) for one, value in zip(op._schema.arguments, args, strict=False)]
    result = op(*tree_map(_down, given), **tree_map(_down, here))
    for key, out in outs.items():
        if not out.numel():  # made with no size, to be given one
            made = _up(here[key])
            place_of = made.untyped_storage(), 0, made.shape, made.stride()
            aten.set_.source_Storage_storage_offset.redispatch(_BELOW, out, *place_of)
    returns = op._schema.returns
    if returns and all(one.alias_info is not None and one.alias_info.is_write for one in returns):
        pairs = zip(op._schema.arguments, args, strict=False)
        changed = [own for one, own in pairs if one.alias_info is not None and one.alias_info.is_write]
        changed += list(outs.values())
        return changed[0] if len(returns) == 1 else tuple(changed)
    return tree_map(_up, result)


def _as_tensor(argument: Any, value: Any) -> Any:
    """``value``; a number in the place of a tensor, as one again: on the way here it was made a number."""
    if isinstance(value, (int, float)) and str(argument.type) == "Tensor":
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
    return value


def _copied(op: Any, place: str, args: Any, kwargs: Any) -> Any:
    if place == "_to_copy":
        source, target = args[0], kwargs.get("device") or args[0].device
        kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": None}
        _moved(source.device, target)
        copy = op(_down(source), **kwargs)
        return _up(copy) if target.type == NAME else copy
    target, source = (args[1], args[0]) if place == "_copy_from" else (args[0], args[1])
    _moved(source.device, target.device)
    _down(target).copy_(_down(source))
    return target


def _moved(source: torch.device, target: torch.device) -> None:
    if source.type != target.type:
        _tell("waits" if target.type == "cpu" else "uploads", "copy")
    else:
        line = _line()
        for seen in _open:
            seen.launches["copy"] += 1
            seen.lines[line] += 1


_library = torch.library.Library("_", "IMPL")
_library.fallback(_kernel, "PrivateUse1")
_ours = torch.library.Library("aten", "IMPL")
# ``torch.tensor`` goes round modes, and then finds only what is registered by its name.
for _name in ("empty.memory_format", "empty_strided", "_copy_from", "fill_.Scalar"):
    _packet, _, _overload = _name.partition(".")
    _ours.impl(_name, partial(_kernel, getattr(getattr(aten, _packet), _overload or "default")), "PrivateUse1")

# Convolutions have names of their own for backends of others.
_ours.impl("convolution_overrideable", partial(_kernel, aten.convolution.default), "PrivateUse1")


def _convolved_back(grad: Tensor, x: Tensor, weight: Tensor, *settings: Any) -> Any:
    return _kernel(aten.convolution_backward.default, grad, x, weight, [grad.shape[1]], *settings)


_ours.impl("convolution_backward_overrideable", _convolved_back, "PrivateUse1")


# A parameter that is moved stays the object that it was, with its attributes, as on a GPU -----------------------------

_data: Any = torch._C.TensorBase.data
_fits = torch._has_compatible_shallow_copy_type


def _set_data(tensor: Tensor, value: Tensor) -> None:
    if NAME in (tensor.device.type, value.device.type) and tensor.device.type != value.device.type:
        torch._C._swap_tensor_impl(tensor, value.detach().requires_grad_(tensor.requires_grad))  # type: ignore[attr-defined]
    else:
        _data.__set__(tensor, value)


def _fits_too(one: Tensor, other: Tensor) -> bool:
    return NAME in (one.device.type, other.device.type) or _fits(one, other)


# Autocast, whose lists each backend registers for itself --------------------------------------------------------------

_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)


def _casting(op: Any, to: Callable[[], torch.dtype]) -> Callable[..., Any]:
    def cast(value: Any) -> Any:
        casts = isinstance(value, Tensor) and value.device.type == NAME and value.dtype in (torch.float32, *HALF)
        return value.to(to()) if casts else value

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return op(*tree_map(cast, args), **tree_map(cast, kwargs))

    return call


_library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
for _names, _to in ((LOWER, lambda: torch.get_autocast_dtype(NAME)), (FULL, lambda: torch.float32)):
    for _name in _names.split():
        _packet, _, _overload = _name.partition(".")
        _op = getattr(getattr(aten, _packet), _overload or "default")
        _ours.impl(_name, _casting(_op, _to), "AutocastPrivateUse1")


# What a test opens ----------------------------------------------------------------------------------------------------


class _OnProcessor(TorchDispatchMode):
    """Notes what lines of ours make on the processor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        if any(one.device.type == "cpu" and one.dim() for one in made) and not func.is_view:
            line = _line()
            if line != "elsewhere":
                for seen in _open:
                    seen.left[f"{func.overloadpacket.__name__} {line}"] += 1
        return result


@contextmanager
def accelerator(*, looks: bool = True) -> Iterator[Seen]:
    """The machine has an accelerator while this is open; gives what happens on it. ``looks``: off to leave out what is
    made on the processor, where tensors of a class with operations of its own are read, inside of which torch cannot
    make tensors while somebody looks on."""
    seen, before = Seen(), module.is_open
    module.is_open = True
    _open.append(seen)
    try:
        # In one thread: an error in a backward pass is then raised where it was called, and lines can be told.
        with ExitStack() as stack:
            stack.enter_context(_OnProcessor() if looks else nullcontext())
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            stack.enter_context(patch.object(torch.Tensor, "data", property(_data.__get__, _set_data)))
            stack.enter_context(patch.object(torch, "_has_compatible_shallow_copy_type", _fits_too))
            yield seen
    finally:
        _open.remove(seen)
        module.is_open = before


@contextmanager
def keeping(seen: Seen, *not_counted: Tensor) -> Iterator[None]:
    """Count into ``seen.kept`` what autograd keeps of the forward passes in it, each memory once and without those of
    ``not_counted``."""
    known = {one.untyped_storage()._cdata for one in not_counted}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            seen.kept += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
