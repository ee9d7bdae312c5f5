"""What code gets that reads an adapted layer's weight and does not call the layer: a stand-in for the effective weight.

Fused attention, state-space models and heads of encoders multiply with ``layer.weight`` themselves. Others only look at
it: T5 asks for its dtype three times a pass. So what is read is a tensor that knows its dtype, device and shape and
holds no numbers. The first operation on it computes them, once for each time that the weight was read, and autograd
takes the gradient of the whole to the trained tensors.

The stand-in is a subclass below autograd (``__torch_dispatch__``). What reaches C++ without passing Python's operators,
``autograd.Function.apply`` for instance, is therefore differentiated as well. Writing to it, or to a view of it, is
refused: it would change a tensor that nobody reads again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import enable_reentrant_dispatch

from trimtab.errors import SurgeryError
from trimtab.ops.traced import seen_through

_REFUSED = (
    "the weight of an adapted layer is computed each time it is read, so {what} would have no effect. Change the "
    "frozen weight (layer.base.weight) or the tensors of the adapter (layer.adapter), or call trimtab.merge first"
)


class Look:
    """One reading of a weight.

    Args:
        compute: gives the weight, differentiable in ``tensors``.
        tensors: what it is computed from and differentiated in.
        assign: what ``weight.data = value`` does; None where that is refused.
        of: shape, dtype and device of the weight.
    """

    def __init__(
        self,
        compute: Callable[[], Tensor],
        tensors: tuple[Tensor, ...],
        *,
        of: tuple[Sequence[int], torch.dtype, torch.device],
        assign: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.compute, self.tensors, self.assign = compute, tensors, assign
        self.trains = any(tensor.requires_grad for tensor in tensors)
        self.tracked = False
        """Whether autograd will ask for the gradient of the weight."""
        self._of = of
        self._computed: Tensor | None = None

    def computed(self, below: bool = False) -> Tensor:
        """The weight; with its gradient, if the look is tracked. ``below``: where the operation that asks for it is
        carried out, below autograd, which is switched on again."""
        if self._computed is None:
            with enable_reentrant_dispatch() if below else nullcontext(), torch.set_grad_enabled(self.tracked):
                self._computed = self.compute().contiguous()
        return self._computed

    def value(self, below: bool = False) -> Tensor:
        """The weight without a gradient."""
        return self.computed(below).detach()

    def stand_in(self) -> ReadWeight:
        """A stand-in that autograd knows nothing of yet."""
        shape, dtype, device = self._of
        return _wrap(self, shape, dtype=dtype, device=device)


def read_weight(
    compute: Callable[[], Tensor],
    tensors: tuple[Tensor, ...],
    *,
    of: tuple[Sequence[int], torch.dtype, torch.device],
    assign: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """What is read as a weight: a stand-in for ``compute()``; where a program is traced, ``compute()`` itself. The
    arguments are those of ``Look``."""
    if torch.compiler.is_compiling() or seen_through():
        return compute()
    look = Look(compute, tensors, of=of, assign=assign)
    if look.trains and torch.is_grad_enabled():
        look.tracked = True
        weight: Tensor = _Read.apply(look, *tensors)  # type: ignore[no-untyped-call]
        return weight
    return look.stand_in()


class ReadWeight(Tensor):
    """The stand-in. All that needs its numbers computes them."""

    look: Look
    trains: bool
    """Whether this is the weight itself and something of it is trained; False for what was detached from it."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            _refuse_writing(func, args, kwargs)
        result = func(*_values(args), **{key: _values(value) for key, value in kwargs.items()})
        # A view of the weight must refuse to be written to as the weight does.
        aliases = func._schema.returns and func._schema.returns[0].alias_info is not None
        if not aliases or func._schema.is_mutable or not args or not isinstance(args[0], ReadWeight):
            return result
        return [_view(one) for one in result] if isinstance(result, (list, tuple)) else _view(result)

    @property
    def data(self) -> Tensor:
        """The weight without its gradient."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if self.look.assign is None:
            raise SurgeryError(_REFUSED.format(what="assigning to its data"))
        self.look.assign(value)

    def detach(self) -> Tensor:
        detached = self.look.stand_in()
        detached.trains = False
        return detached

    @property
    def requires_grad(self) -> bool:
        """Whether something of it is trained, as for a parameter also where gradients are off."""
        return self.trains

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        if requires_grad and not self.trains:
            raise SurgeryError(_REFUSED.format(what="asking for its gradient"))
        return self  # the weight is frozen already, and what trains is beside it

    def register_hook(self, hook: Any) -> Any:
        raise SurgeryError(_REFUSED.format(what="a hook on it"))

    def data_ptr(self) -> int:
        return self.look.value().data_ptr()

    def untyped_storage(self) -> Any:
        return self.look.value().untyped_storage()

    def numpy(self, *, force: bool = False) -> Any:
        array = (self.look.value() if force else self._checked()).numpy(force=force)
        array.flags.writeable = False
        return array

    def __array__(self, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        array = self.numpy()
        return array if dtype is None else array.astype(dtype)

    def tolist(self) -> Any:
        return self.look.value().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.look.value().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.look.value().__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.look.value())

    def _checked(self) -> Tensor:
        """The numbers. Raises, as torch does, if they have a gradient that would be lost."""
        if self.trains:
            raise RuntimeError(
                "Can't call numpy() on a weight that requires grad. Use weight.detach().numpy() instead."
            )
        return self.look.value()


class _Read(torch.autograd.Function):
    """From the trained tensors to the stand-in, and the gradient of the effective weight back to them."""

    @staticmethod
    def forward(ctx: Any, look: Look, *tensors: Tensor) -> Tensor:
        ctx.look = look
        return look.stand_in()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        look: Look = ctx.look
        wanted = [tensor for tensor in look.tensors if tensor.requires_grad]
        # Kept, since backward may be called again; it goes with the look.
        grads = iter(torch.autograd.grad(look.computed(), wanted, grad, allow_unused=True, retain_graph=True))
        return None, *(next(grads) if tensor.requires_grad else None for tensor in look.tensors)


def _wrap(look: Look, shape: Sequence[int], **said: Any) -> ReadWeight:
    wrapped: ReadWeight = Tensor._make_wrapper_subclass(ReadWeight, shape, **said)
    wrapped.look, wrapped.trains = look, look.trains
    return wrapped


def _view(value: Tensor) -> ReadWeight:
    """A stand-in for a view of the weight, whose numbers are there already."""
    look = Look(lambda: value, (), of=(value.shape, value.dtype, value.device))
    look._computed = value
    said = {"strides": value.stride(), "storage_offset": value.storage_offset()}
    return _wrap(look, value.shape, dtype=value.dtype, device=value.device, **said)


def _values(given: Any) -> Any:
    """``given`` with the numbers in place of every stand-in."""
    if isinstance(given, ReadWeight):
        return given.look.value(below=True)
    if isinstance(given, (list, tuple)):
        return type(given)(map(_values, given)) if not hasattr(given, "_fields") else given
    return given


def _refuse_writing(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raise SurgeryError if ``func`` would write to a stand-in."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[place] if place < len(args) else kwargs.get(argument.name)
        if any(isinstance(one, ReadWeight) for one in (given if isinstance(given, (list, tuple)) else (given,))):
            raise SurgeryError(_REFUSED.format(what=f"writing to it ({func._schema.name.removeprefix('aten::')})"))
