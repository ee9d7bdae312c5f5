"""A stack of experts' weights with adapters, as the model's own code reads and multiplies it.

A model keeps its experts in one tensor ``[experts, out, in]`` and multiplies rows with it in a way of its own: one
expert after the other, or all in one grouped or batched product (transformers' ``experts_implementation``), or as its
authors wrote it. A look at the tensor gives an ``EffectiveStack``, which stands for the effective weights without
holding them. Multiplied with rows, it sends these through the frozen weight and the factors of their experts
(``frozen_linear``). For whatever else is done with it, it gives way to the stand-in that is read of any layer
(``ops.read_weight``), which computes the effective weights by the plain formula, with their gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.bases import WeightBase
from trimtab.ops.autocast import without_autocast
from trimtab.ops.dropout import draw_keep
from trimtab.ops.expert_rows import ChosenRows, SortedRows, StackMap
from trimtab.ops.frozen_linear import frozen_linear
from trimtab.ops.linear_map import MATRIX, LinearMap
from trimtab.ops.ratio import HALF


class _Parts(NamedTuple):
    """What rows are multiplied with, beside the weight: of all experts, or of one."""

    tensors: tuple[Tensor, ...]
    magnitude: Tensor | None = None
    norm: Tensor | None = None
    columns: Tensor | None = None
    """What the columns of each weight are multiplied with, ``[experts, in]``, in place of magnitude and norm."""

    def as_stack(self) -> _Parts:
        """Those of one expert as of a stack of one."""
        magnitude, norm = (None if one is None else one[None] for one in (self.magnitude, self.norm))
        return _Parts(tuple(one[None] for one in self.tensors), magnitude, norm, self.columns)


class StackPass:
    """One pass of a module through one of its stacks: what the looks at it share, each computed when first needed.

    Args:
        adapter: the ``WeightMethod`` on the stack.
        base: the stack.
    """

    def __init__(self, adapter: Any, base: WeightBase) -> None:
        self.weight = base.weight()
        self._adapter, self._base = adapter, base
        self._read: dict[bool, Tensor] = {}

    @property
    def trains(self) -> bool:
        return torch.is_grad_enabled() and any(one.requires_grad for one in self._adapter.parameters())

    @cached_property
    def _all(self) -> _Parts:
        adapter = self._adapter
        tensors, magnitude = adapter.factors()[1], adapter.magnitude
        if magnitude is None:
            return _Parts(tensors)
        if adapter.options.magnitude_axis == "input":
            return _Parts(tensors, columns=adapter.ratio(self.weight, self._base))
        return _Parts(tensors, magnitude, adapter.norm(self.weight, self._base))

    @cached_property
    def _of_each(self) -> list[_Parts]:
        """All experts are split off at once: the gradients of as many single looks at a stack would each be as large as
        the stack."""
        experts = range(len(self.weight))

        def split(stack: Tensor | None) -> Sequence[Any]:
            return [None for _ in experts] if stack is None else stack.unbind(0)

        tensors = [split(stack) for stack in self._all.tensors]
        magnitude, norm, columns = (split(stack) for stack in self._all[1:])
        return [
            _Parts(tuple(one[expert] for one in tensors), magnitude[expert], norm[expert], columns[expert])
            for expert in experts
        ]

    def with_one(self, expert: int, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x W'^T + bias`` for ``x [..., in]``, with the weight of one expert."""
        parts, weight = self._of_each[expert], self.weight[expert]
        if bias is not None or weight.dtype not in HALF or x.device.type != "cpu" or type(x) is not Tensor:
            return self._multiply(x, weight, MATRIX, parts, bias=bias)
        # Thin products of half precision are a matter of their own there, which a stack knows; this is one of one.
        rows = x.reshape(-1, x.shape[-1])
        ends = torch.tensor([len(rows)], dtype=torch.int32)
        through = SortedRows(weight[None], lambda rows: F.linear(rows, weight), ends)
        product = self._multiply(rows, weight[None], through, parts.as_stack())
        return product.reshape(*x.shape[:-1], product.shape[-1])

    def with_each(self, through: StackMap, x: Tensor) -> Tensor:
        """``x W'^T`` for ``x [rows, in]``, each row with the weight of its expert."""
        parts = self._all
        if parts.columns is not None:
            parts = parts._replace(columns=parts.columns[through.experts(x.shape[0])])
        return self._multiply(x, self.weight, through, parts)

    def _multiply(
        self,
        x: Tensor,
        weight: Tensor,
        through: LinearMap,
        parts: _Parts,
        *,
        bias: Tensor | None = None,
    ) -> Tensor:
        options, update = self._adapter.options, self._adapter.factors()[0]
        if parts.columns is not None:
            x = (x * parts.columns).to(x.dtype)
        drops = self._adapter.training and bool(options.dropout) and update is not None
        return frozen_linear(
            x,
            weight,
            bias,
            through=through,
            update=update,
            tensors=parts.tensors,
            keep=draw_keep(x, options.dropout) if drops else None,
            magnitude=parts.magnitude,
            norm=parts.norm,
            keep_product=options.keep_product or self._base.changes_products,
            compute=options.compute,
        )

    def read(self) -> Tensor:
        """The effective weights as the module stores its own, with their gradient: what is read of any layer."""
        grads = torch.is_grad_enabled()
        if grads and self._adapter.training and self._adapter.options.dropout:
            raise RuntimeError(
                "trimtab: dropout acts on the input of the update, and this model multiplies its experts in a way of "
                "which we know no input; set dropout: 0 on the rule"
            )
        if grads not in self._read:
            self._read[grads] = self._base.read(self._adapter)
        return self._read[grads]

    def dense(self, chosen: int | Tensor | None, turned: bool) -> Tensor:
        """The effective weights of the experts that are ``chosen`` (None: all), ``turned`` to ``[..., in, out]`` or
        not."""
        weight = self.read()
        weight = weight if chosen is None else weight[chosen]
        return weight if turned == self._base.stored_transposed else weight.mT


@contextmanager
def one_pass(adapter: Any, base: WeightBase) -> Iterator[None]:
    """A context in which all looks at the stack share what they compute: a forward pass of the module that has it."""
    before, adapter.stack_pass = adapter.stack_pass, StackPass(adapter, base)
    try:
        yield
    finally:
        adapter.stack_pass = before


def look(adapter: Any, base: WeightBase) -> Tensor:
    """What a look at the stack of ``base`` gives: the effective weights, laid out as the frozen ones are."""
    through = adapter.stack_pass or StackPass(adapter, base)
    if adapter.trains_base:
        return through.read()
    return EffectiveStack(through, base.parameter, turned=base.stored_transposed)


class EffectiveStack(Tensor):
    """The effective weights of a stack, or of some of its experts, which are computed only if they have to be."""

    _through: StackPass
    _turned: bool
    """Whether it is laid out as ``[..., in, out]``."""
    _chosen: int | Tensor | None
    """The expert whose weight it is, ``[out, in]``, or one for each of its weights; None for the whole stack."""

    @staticmethod
    def __new__(
        cls, through: StackPass, like: Tensor, *, turned: bool = False, chosen: int | Tensor | None = None
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
        made._through, made._turned, made._chosen = through, turned, chosen
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return repr(self.dense())

    def dense(self) -> Tensor:
        """The effective weights, as they are laid out here."""
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
    return isinstance(stack, EffectiveStack) and stack._chosen is None and stack._turned is turned


def _one(stack: Any, turned: bool) -> bool:
    return isinstance(stack, EffectiveStack) and isinstance(stack._chosen, int) and stack._turned is turned


def _for_each_row(stack: Any, turned: bool) -> bool:
    return isinstance(stack, EffectiveStack) and isinstance(stack._chosen, Tensor) and stack._turned is turned


def _choose(stack: EffectiveStack, index: Any) -> EffectiveStack | None:
    """``stack[index]``: the weight of one expert, or one of each row's."""
    if stack._chosen is not None:
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
    if stack._chosen is not None or dim != 0:
        return None
    return tuple(_choose(stack, expert) for expert in range(len(stack)))


def _turn(stack: EffectiveStack, *dims: int) -> EffectiveStack | None:
    """The two last dimensions exchanged."""
    last = {stack.dim() - 2, stack.dim() - 1}
    if (dims and {dim % stack.dim() for dim in dims} != last) or (not dims and stack.dim() != 2):
        return None
    like = torch.empty_strided(stack.shape, stack.stride(), device="meta").mT
    return EffectiveStack(stack._through, like, turned=not stack._turned, chosen=stack._chosen)


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
    Tensor.__iter__: lambda stack: None if stack._chosen is not None else iter(_unbind(stack) or ()),
    Tensor.transpose: _turn,
    torch.transpose: _turn,
    Tensor.t: _turn,
    Tensor.T.__get__: _turn,  # type: ignore[attr-defined]
    Tensor.mT.__get__: _turn_last,  # type: ignore[attr-defined]
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
