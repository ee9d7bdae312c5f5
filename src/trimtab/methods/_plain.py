"""Passes by torch's own operations and the whole weight of a layer, where the fused ones have no place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.bases import WeightBase
from trimtab.errors import SurgeryError
from trimtab.methods._method import full_dtype
from trimtab.ops.dropout import Drawn
from trimtab.ops.linear_map import multiply


def plainly(adapter: Any, x: Tensor, base: WeightBase) -> Tensor:
    """The output of ``adapter`` on ``base`` by the plain formula, which can be differentiated again, batched and
    traced."""
    if adapter.drops(x):
        raise SurgeryError(
            "the dropout of an adapter cannot be drawn inside of a transform of torch.func, nor traced: call "
            "model.eval() before, or give the rule dropout: 0"
        )
    weight: Tensor = adapter.held(adapter.formula(base, full_dtype(base), detach_norm=adapter.options.detach_norm))
    return multiply(base.through, base.prepared(x), weight.to(base.dtype_for(x)), adapter.bias_of(base))


def columns_scaled(
    adapter: Any, x: Tensor, base: WeightBase, *, ratio: Tensor, weight: Tensor, keep: Drawn | None
) -> Tensor:
    """The output with a ``ratio`` for each column, where the input has no features that could be scaled instead."""
    whole = weight.to(ratio.dtype)
    total: Tensor = adapter.total(whole) if adapter.seen(base) is base else adapter.total(whole.t()).t()
    if keep is None:
        return multiply(base.through, x, (total * ratio).to(weight.dtype), adapter.bias_of(base))
    fed = x * (keep.of(torch.ones_like(x)) * keep.scale)
    update = (total - whole) * ratio
    y = multiply(base.through, x, (whole * ratio).to(weight.dtype), adapter.bias_of(base))
    return y + multiply(base.through, fed, update.to(weight.dtype))
