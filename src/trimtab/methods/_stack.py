"""One pass of a module through a stack of experts' weights with adapters: rows are multiplied with the frozen weight
and the factors of their experts, in the way that the model asks for (``trimtab.methods._effective_stack``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.bases import WeightBase
from trimtab.ops.dropout import draw_keep
from trimtab.ops.expert_rows import SortedRows, StackMap
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
        stack = weight[None]  # one tensor: by it the product of the frozen weight is known, which is the model's own
        through = SortedRows(stack, lambda rows: F.linear(rows, weight), ends)
        product = self._multiply(rows, stack, through, parts.as_stack())
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
        weight = self._base.as_weight(self.read())
        weight = weight if chosen is None else weight[chosen]
        return weight.mT if turned else weight


@contextmanager
def one_pass(adapter: Any, base: WeightBase) -> Iterator[None]:
    """A context in which all looks at the stack share what they compute: a forward pass of the module that has it."""
    before, adapter.stack_pass = adapter.stack_pass, StackPass(adapter, base)
    try:
        yield
    finally:
        adapter.stack_pass = before
