"""Computes a module whose adapters each have some rows of the batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.bases import WeightBase
from trimtab.errors import SurgeryError
from trimtab.methods._mixed import operands_of, share_norms, trained_of
from trimtab.methods._weight import WeightMethod
from trimtab.ops.autocast import autocast_dtype
from trimtab.ops.frozen_linear import frozen_linear
from trimtab.ops.kernels import segments_for
from trimtab.ops.linear_map import MATRIX
from trimtab.ops.mixed_rows import MixedProduct, Order, Part
from trimtab.ops.mixed_training import mixed_training, trains_together
from trimtab.ops.stamp import address_of, version_of
from trimtab.surgery.row_plan import Group, RowPlan

FEW_TOKENS = 128
"""Up to so many vectors, deciding how to multiply them takes longer than multiplying does."""


class _Decided(NamedTuple):
    """How a layer computes a mixed batch of few tokens, as long as nothing that it was decided by changes."""

    by: tuple[Any, ...]
    product: MixedProduct

    @staticmethod
    def reasons(plan: RowPlan, adapters: Mapping[str | None, Any], base: WeightBase, x: Tensor) -> tuple[Any, ...]:
        weight, kept = base.weight(), [adapter.kept_since for adapter in adapters.values() if adapter is not None]
        own = id(weight), version_of(weight), address_of(weight), id(base.stored_bias)
        return (plan.batch, x.shape, x.dtype, *own, *kept)


def mixed_layer(
    plan: RowPlan, groups: Sequence[Group], adapters: Mapping[str | None, Any], base: WeightBase, x: Tensor
) -> Tensor:
    """The output of a layer for the batch ``x``; ``adapters``: by name, None for the rows without one.

    One product with the frozen weight serves all rows whose adapters can share it. For adapters that cannot (a trained
    copy of the weight), and with gradients where there are no programs for them, each has a pass of its own over its
    rows.
    """
    through = base.through
    plain = not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and autocast_dtype(x) is None
    few = plain and base.stored_dense and through is MATRIX and x.numel() <= FEW_TOKENS * x.shape[-1]
    if few and all(adapter is None or isinstance(adapter, WeightMethod) for adapter in adapters.values()):
        weight = base.weight()
        reasons = _Decided.reasons(plan, adapters, base, x)
        decided: _Decided | None = plan.decided.get(id(base))
        if decided is not None and decided.by == reasons:
            return through.output(decided.product(through.rows(x), weight, through), x.shape)
    entries = plan.entries(x, what := f"a {type(base.module).__name__}", of_vectors=x.is_floating_point())
    if through.rows(x).dim() != x.dim() and x.is_floating_point() and not through.reads_features:
        raise SurgeryError(f"per_row: {what} is called with {list(x.shape)}, which has no axis of rows")
    if not entries:
        x, entries, few = x.expand(len(plan.names), *x.shape[1:]), 1, False
    if plain:
        weight = base.weight(base.dtype_for(x))
        share_norms(adapters.values())
        found = [operands_of(adapters[group.name], base, weight) for group in groups]
        shared = [operands for operands in found if operands is not None]
        if len(shared) == len(found):
            padded = base.prepared(x)
            each = entries * (through.rows(padded).shape[0] // x.shape[0])
            slices, order = plan.order(groups, each, x.device)
            product = MixedProduct([Part(*both) for both in zip(slices, shared, strict=True)], order)
            if few:
                plan.decided[id(base)] = _Decided(_Decided.reasons(plan, adapters, base, x), product)
            return through.output(product(through.rows(padded), weight, through), padded.shape)

    elif torch.is_grad_enabled() and not torch.compiler.is_compiling() and segments_for(through.rows(x)) is not None:
        trained = _trained_together(plan, groups, adapters, base, x)
        if trained is not None:
            return trained

    def alone(group: Group, rows: Tensor) -> Tensor:
        adapter = adapters[group.name]
        if adapter is not None:
            output: Tensor = adapter(rows, base)
            return output
        dtype = base.dtype_for(rows)
        return frozen_linear(
            base.prepared(rows), base.weight(dtype), base.bias, through=base.through, again=base.again(dtype)
        )

    slices, order = plan.order(groups, entries, x.device)
    sorted_x = x if order is None else x.index_select(0, order.there)
    return _back([alone(group, sorted_x[rows]) for group, rows in zip(groups, slices, strict=True)], order)


def _trained_together(
    plan: RowPlan, groups: Sequence[Group], adapters: Mapping[str | None, Any], base: WeightBase, x: Tensor
) -> Tensor | None:
    """The output with gradients where one launch set serves all rows; None where each adapter needs its own pass."""
    if autocast_dtype(x) is not None or base.through is not MATRIX or not x.is_floating_point():
        return None
    dtype = base.dtype_for(x)
    weight, padded = base.weight(dtype), base.prepared(x)
    rows = MATRIX.rows(padded)
    found = [trained_of(adapters[group.name], base, weight) for group in groups]
    trained = [one for one in found if one is not None]
    if len(trained) < len(found) or rows.dtype != weight.dtype or not trains_together(rows, trained):
        return None
    slices, order = plan.order(groups, rows.shape[0] // len(plan.names), x.device)
    parts = [Part(place, one.operands) for place, one in zip(slices, trained, strict=True)]
    output = mixed_training(rows, weight, parts, trained, order=order, again=base.again(dtype))
    return MATRIX.output(output, padded.shape)


def mixed_call(
    plan: RowPlan,
    groups: Sequence[Group],
    call: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    what: str,
    axes: Mapping[int | str, int | None] | None = None,
) -> Any:
    """What ``call`` gives, called with the rows of each group apart.

    ``axes``: the axis of the rows in the arguments by their place or name, None for an argument that has no rows. Where
    nothing is said, that is the first axis of every tensor with as many entries there as the first one.
    """
    given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    tensors = {key: one for key, one in given.items() if isinstance(one, Tensor) and one.dim()}
    odd = [key for key, one in given.items() if not isinstance(one, Tensor | bool | int | float | str | None)]
    if odd or not tensors:
        got = f"a {type(given[odd[0]]).__name__}" if odd else "no tensor"
        raise SurgeryError(
            f"per_row: {what} is called with {got}, of which no rows can be taken. Leave this module out "
            "of the adapters, or give all rows of a batch one adapter (trimtab.set_adapter)"
        )
    first = next(iter(tensors.values()))
    chosen = axes if axes is not None else {key: 0 for key, one in tensors.items() if one.shape[0] == first.shape[0]}
    moved = {key: tensors[key].movedim(axis, 0) for key, axis in chosen.items() if axis is not None and key in tensors}
    key, batch = next(iter(moved.items()))
    count, entries = len(plan.names), plan.entries(batch, what, of_vectors=batch.is_floating_point())
    if not entries:
        entries, moved[key] = 1, batch.expand(count, *batch.shape[1:])
    outputs = []
    for number, group in enumerate(groups):
        mine = dict(given)
        for key, one in moved.items():
            slices, order = plan.order(groups, one.shape[0] // count, one.device)
            rows = one if order is None else one.index_select(0, order.there)
            mine[key] = rows[slices[number]].movedim(0, chosen[key] or 0)
        with plan.apart(group.name):
            outputs.append(call(*(mine[place] for place in range(len(args))), **{key: mine[key] for key in kwargs}))
    _, order = plan.order(groups, entries, batch.device)
    return _joined(outputs, order, next(iter(chosen.values())) or 0, what)


def _joined(outputs: list[Any], order: Order | None, axis: int, what: str) -> Any:
    """The outputs of the groups as one. Tensors, and tuples of them whose first one has its rows on ``axis``, and the
    others on their first."""
    if all(isinstance(one, Tensor) for one in outputs):
        return _back([one.movedim(axis, 0) for one in outputs], order).movedim(0, axis)
    if all(one is None for one in outputs):
        return None
    if all(isinstance(one, tuple | list) for one in outputs):
        each = zip(*outputs, strict=True)
        joined = [_joined(list(ones), order, 0 if place else axis, what) for place, ones in enumerate(each)]
        return type(outputs[0])(joined) if type(outputs[0]) in (tuple, list) else type(outputs[0])(*joined)
    raise SurgeryError(f"per_row: {what} gives a {type(outputs[0]).__name__}, which cannot be put together by rows")


def _back(outputs: list[Tensor], order: Order | None) -> Tensor:
    together = torch.cat(outputs)
    return together if order is None else together.index_select(0, order.back)


def mixed_block(
    plan: RowPlan, groups: Sequence[Group], adapters: Mapping[str, Any], x: Tensor | None, hidden: Tensor
) -> Tensor:
    """The ``hidden`` state that a block gives for ``x``, each row changed by its adapter."""
    entries = plan.entries(hidden, "a block with an adapter")
    if not entries:
        raise SurgeryError("per_row: a block with an adapter gives one row that all adapters share")
    slices, order = plan.order(groups, entries, hidden.device)

    def of(rows: slice, state: Tensor) -> Tensor:
        return (state if order is None else state.index_select(0, order.there))[rows]

    changed = []
    for group, rows in zip(groups, slices, strict=True):
        adapter, mine = adapters.get(group.name or ""), of(rows, hidden)
        fed = None if x is None else x if x.shape[0] != hidden.shape[0] else of(rows, x)
        changed.append(mine if adapter is None else adapter(fed, mine))
    return _back(changed, order)


def mixed_holder(
    plan: RowPlan, groups: Sequence[Group], holder: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """What a module gives that reads weights with adapters which hang on it, the rows of each adapter apart."""
    what, axes = f"a {type(holder).__name__}", holder_axes(holder)
    if isinstance(holder, nn.MultiheadAttention):
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        if (query := given.get(0, given.get("query"))) is None or query.dim() != 3:
            raise SurgeryError(f"per_row: {what} is called without an axis of rows")
        mask = given.get(5, given.get("attn_mask"))
        if isinstance(mask, Tensor) and mask.dim() == 3:  # one for each row and head
            axes |= {5: 0, "attn_mask": 0}
    return mixed_call(plan, groups, type(holder).forward.__get__(holder), args, kwargs, what=what, axes=axes)


# What says of each token, in the order of the tokens, which experts it goes to and how much each counts.
_ROUTING = ({"top_k_index", "top_k_weights"}, {"router_indices", "routing_weights"})


def holder_axes(holder: nn.Module) -> dict[int | str, int | None]:
    """The axes of the rows in the arguments of a module that reads weights which hang on it. Raises SurgeryError for a
    kind of module that goes through its rows in an order of its own."""
    if isinstance(holder, nn.MultiheadAttention):
        axis = 0 if holder.batch_first else 1
        return {0: axis, "query": axis, 1: axis, "key": axis, 2: axis, "value": axis, 3: 0, "key_padding_mask": 0}
    names = list(inspect.signature(type(holder).forward).parameters)[1:]
    if any(routing <= set(names) for routing in _ROUTING):
        return {key: 0 for place, name in enumerate(names) for key in (place, name)}
    raise SurgeryError(
        f"per_row: the experts of a {type(holder).__name__} get their tokens in an order of their own, so it cannot be "
        "told which adapter a token is for. Leave them out of the adapters, or give all rows of a batch one adapter "
        "(trimtab.set_adapter)"
    )
