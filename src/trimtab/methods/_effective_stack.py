"""A stack of experts' weights with adapters, as the model's own code reads and multiplies it.

A model keeps its experts in one tensor ``[experts, out, in]`` and multiplies rows with it in a way of its own: one
expert after the other, or all in one grouped or batched product (transformers' ``experts_implementation``), or as its
authors wrote it. A look at the tensor gives an ``EffectiveStack``, which stands for the effective weights without
holding them. Multiplied with rows, it sends these through the frozen weight and the factors of their experts
(``frozen_linear``). For whatever else is done with it, it gives way to the stand-in that is read of any layer
(``ops.read_weight``), which computes the effective weights by the plain formula, with their gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.bases import WeightBase
from trimtab.methods._stack import StackPass
from trimtab.ops.autocast import without_autocast
from trimtab.ops.expert_rows import ChosenRows, SortedRows


def look(adapter: Any, base: WeightBase) -> Tensor:
    """What a look at the stack of ``base`` gives: the effective weights, laid out as the frozen ones are."""
    through = adapter.stack_pass or StackPass(adapter, base)
    if adapter.trains_base:
        return through.read()
    return EffectiveStack(through, base.parameter, turned=base.stored_transposed, is_stored=True)


class EffectiveStack(Tensor):
    """The effective weights of a stack, or of some of its experts, which are computed only if they have to be."""

    _through: StackPass
    _turned: bool
    """Whether it is laid out as ``[..., in, out]``."""
    _chosen: int | Tensor | None
    """The expert whose weight it is, ``[out, in]``, or one for each of its weights; None for the whole stack."""
    _is_stored: bool
    """Whether it is the whole stack as the module stores it, perhaps with its experts one below the other."""

    @staticmethod
    def __new__(
        cls,
        through: StackPass,
        like: Tensor,
        *,
        turned: bool = False,
        chosen: int | Tensor | None = None,
        is_stored: bool = False,
    ) -> EffectiveStack:
        weight = through.weight
        made: EffectiveStack = Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            dtype=weight.dtype,
            device=weight.device,
            requires_grad=through.trains,
        )
        made._through, made._turned, made._chosen, made._is_stored = through, turned, chosen, is_stored
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return repr(self.dense())

    def dense(self) -> Tensor:
        """The effective weights, as they are laid out here."""
        if self._is_stored:
            return self._through.read()
        return self._through.dense(self._chosen, self._turned)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SEEN:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        output = None
        if func in _KNOWN:
            output = _KNOWN[func](*args, **kwargs)
        elif getattr(func, "__name__", "").split(".")[0] in _GROUPED:
            output = _grouped(func, *args, **kwargs)
        return func(*_dense(args), **_dense(kwargs)) if output is None else output

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"trimtab: {func} was called on adapted experts where no gradient would come back")


# What models do with their experts, and how it is done without forming weights. Each of these functions gives None for
# arguments that it is not meant for.


def _dense(values: Any) -> Any:
    """``values`` with effective weights in place of what stands for them."""
    if isinstance(values, EffectiveStack):
        return values.dense()
    if isinstance(values, dict):
        return {key: _dense(value) for key, value in values.items()}
    return type(values)(map(_dense, values)) if type(values) in (list, tuple) else values


def _whole(stack: Any, turned: bool) -> bool:
    """Whether ``stack`` is a whole stack, laid out as ``[experts, in, out]`` or not."""
    if not isinstance(stack, EffectiveStack) or stack._chosen is not None or stack.dim() != 3:
        return False
    return stack._turned is turned


def _one(stack: Any, turned: bool) -> bool:
    return isinstance(stack, EffectiveStack) and isinstance(stack._chosen, int) and stack._turned is turned


def _for_each_row(stack: Any, turned: bool) -> bool:
    return isinstance(stack, EffectiveStack) and isinstance(stack._chosen, Tensor) and stack._turned is turned


def _choose(stack: EffectiveStack, index: Any) -> EffectiveStack | None:
    """``stack[index]``: the weight of one expert, or one of each row's."""
    if stack._chosen is not None or stack.dim() != 3:
        return None
    if isinstance(index, Tensor):
        if index.dtype not in (torch.int64, torch.int32) or index.dim() > 1:
            return None
        if index.dim() == 1:
            like = torch.empty(len(index), *stack.shape[1:], device="meta")
            return EffectiveStack(stack._through, like, turned=stack._turned, chosen=index)
        index = int(index)
    if not isinstance(index, int) or isinstance(index, bool):
        return None
    weight = stack._through.weight[index]
    like = weight.mT if stack._turned else weight
    return EffectiveStack(stack._through, like, turned=stack._turned, chosen=index % len(stack))


def _unbind(stack: EffectiveStack, dim: int = 0) -> tuple[EffectiveStack | None, ...] | None:
    if stack._chosen is not None or stack.dim() != 3 or dim != 0:
        return None
    return tuple(_choose(stack, expert) for expert in range(len(stack)))


def _turn(stack: EffectiveStack, *dims: int) -> EffectiveStack | None:
    """The two last dimensions exchanged."""
    if stack._chosen is None and stack.dim() != 3:
        return None
    last = {stack.dim() - 2, stack.dim() - 1}
    if (dims and {dim % stack.dim() for dim in dims} != last) or (not dims and stack.dim() != 2):
        return None
    like = torch.empty_strided(stack.shape, stack.stride(), device="meta").mT
    return EffectiveStack(stack._through, like, turned=not stack._turned, chosen=stack._chosen)


def _view(stack: EffectiveStack, *shape: Any) -> EffectiveStack | None:
    """A stack whose experts stood one below the other, as a stack."""
    weight = stack._through.weight
    stored = weight.mT if stack._turned else weight
    if stack.dim() == 3 or not stack._is_stored:
        return None
    like = torch.empty(stack.shape, device="meta").view(*shape)
    return EffectiveStack(stack._through, like, turned=stack._turned) if like.shape == stored.shape else None


def _turn_last(stack: EffectiveStack) -> EffectiveStack | None:
    return _turn(stack, -2, -1)


def _as_it_is(stack: EffectiveStack, *args: Any, **kwargs: Any) -> EffectiveStack | None:
    """``stack.to(...)`` where that changes nothing."""
    moved = torch.empty(0, dtype=stack.dtype, device=stack.device).to(*args, **kwargs)
    same = moved.dtype == stack.dtype and moved.device == stack.device
    return stack if same and not kwargs.get("copy") else None


def _linear(x: Tensor, stack: Any, bias: Tensor | None = None) -> Tensor | None:
    return stack._through.with_one(stack._chosen, x, bias) if _one(stack, turned=False) else None


def _matmul(left: Any, right: Any) -> Tensor | None:
    if _one(right, turned=True) and not isinstance(left, EffectiveStack):
        product: Tensor = right._through.with_one(right._chosen, left)
        return product
    output: Tensor | None = _bmm(left, right) if left.dim() == right.dim() == 3 else None
    return output


def _bmm(left: Any, right: Any) -> Tensor | None:
    if _whole(right, turned=True):  # [experts, rows, in]: as many rows for each
        weight, (experts, count, features) = right._through.weight, left.shape
        if experts != len(right):
            return None
        ends = torch.arange(1, experts + 1, device=left.device, dtype=torch.int32) * count

        def frozen(rows: Tensor) -> Tensor:
            return torch.bmm(rows.view(experts, count, features), weight.mT).flatten(0, 1)

        rows = left.reshape(-1, features)
        product: Tensor = right._through.with_each(SortedRows(weight, frozen, ends), rows)
        shaped: Tensor = product.unflatten(0, (experts, count))
        return shaped
    if _for_each_row(right, turned=True) and left.shape[1] == 1:
        return _with_chosen(right, left.squeeze(1)).unsqueeze(1)
    if _for_each_row(left, turned=False) and right.shape[2] == 1:
        return _with_chosen(left, right.squeeze(2)).unsqueeze(2)
    return None


def _with_chosen(stack: EffectiveStack, rows: Tensor) -> Tensor:
    """The product of each row with the weight that was chosen for it."""
    weight, chosen, turned = stack._through.weight, stack._chosen, stack._turned
    assert isinstance(chosen, Tensor)

    def frozen(rows: Tensor) -> Tensor:  # in the order in which the model multiplies
        if turned:
            return torch.bmm(rows.unsqueeze(1), weight.mT[chosen]).squeeze(1)
        return torch.bmm(weight[chosen], rows.unsqueeze(2)).squeeze(2)

    return stack._through.with_each(ChosenRows(weight, frozen, chosen), rows)


def _grouped(
    multiply: Callable[..., Tensor], rows: Any, stack: Any, offs: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    """A grouped product of rows that are sorted by expert: torch's, or transformers' for devices that have none."""
    if not _whole(stack, turned=True) or rows.dim() != 2 or offs is None or any(kwargs.values()):
        return None
    weight = stack._through.weight

    def frozen(rows: Tensor) -> Tensor:
        return multiply(rows, weight.mT, offs=offs)

    with without_autocast(rows):  # which leaves grouped products alone
        product: Tensor = stack._through.with_each(SortedRows(weight, frozen, offs), rows)
    return product


_GROUPED = ("_grouped_mm", "grouped_mm", "grouped_mm_fallback")
_KNOWN: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _choose,
    Tensor.unbind: _unbind,
    torch.unbind: _unbind,
    Tensor.__iter__: lambda stack: None if (every := _unbind(stack)) is None else iter(every),
    Tensor.transpose: _turn,
    torch.transpose: _turn,
    Tensor.t: _turn,
    Tensor.T.__get__: _turn,  # type: ignore[attr-defined]
    Tensor.mT.__get__: _turn_last,  # type: ignore[attr-defined]
    Tensor.view: _view,
    Tensor.reshape: _view,
    Tensor.to: _as_it_is,
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    Tensor.mm: _matmul,
    torch.bmm: _bmm,
    Tensor.bmm: _bmm,
}
_SEEN = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_cuda", "is_cpu", "is_meta")
} | {
    getattr(Tensor, name)
    for name in (
        *("size", "dim", "ndimension", "numel", "nelement", "stride", "__len__", "__hash__"),
        *("is_floating_point", "is_complex", "is_contiguous", "element_size", "get_device"),
    )
}
