"""What an adapter adds to a product with the frozen weight that other adapters share with it, each on its own rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from trimtab.bases import WeightBase
from trimtab.methods._weight import WeightMethod
from trimtab.ops.frozen_linear import Operands
from trimtab.ops.kernels import quotients_for
from trimtab.ops.mixed_rows import takes
from trimtab.ops.mixed_training import Trained
from trimtab.ops.ratio import Ratio, ratio_of


def operands_of(adapter: Any, base: WeightBase, weight: Tensor) -> Operands | None:
    """What rows of ``adapter`` are multiplied with on ``base``, whose W is ``weight``; None for the adapter: for rows
    without one. None where its rows need a pass of their own: a trained copy of the weight, scaled columns, dropout, a
    form that the user chose."""
    mine = _without_ratio(adapter, base, weight)
    return mine if mine is None or not _has_magnitude(adapter) else mine._replace(ratio=_ratio(adapter, base, weight))


def trained_of(adapter: Any, base: WeightBase, weight: Tensor) -> Trained | None:
    """The same with gradients. None also where the norm has one, and where the user wants the product to be kept."""
    mine = _without_ratio(adapter, base, weight)
    if mine is None or not _has_magnitude(adapter):
        return mine and Trained(mine, None, None)
    if adapter.options.keep_product or not adapter.options.detach_norm:
        return None
    norm = adapter.norm(weight, base)
    ratio = ratio_of(adapter.magnitude, norm, weight.dtype, quotients_for(norm))
    return Trained(mine._replace(ratio=ratio), adapter.magnitude, norm)


def _has_magnitude(adapter: Any) -> bool:
    return isinstance(adapter, WeightMethod) and adapter.changes_weight and adapter.magnitude is not None


def _without_ratio(adapter: Any, base: WeightBase, weight: Tensor) -> Operands | None:
    bare = Operands(weight=weight, bias=base.bias, ratio=None, update=None, tensors=(), through=base.through)
    if adapter is None:
        return bare
    if not isinstance(adapter, WeightMethod) or adapter.stored_transposed != base.stored_transposed or base.stack:
        return None
    options = adapter.options
    if not adapter.changes_weight:
        return bare._replace(bias=adapter.bias_of(base))
    drops = adapter.training and options.dropout
    by_columns = adapter.magnitude is not None and options.magnitude_axis == "input"
    if adapter.trains_base or drops or by_columns or options.compute == "folded" or getattr(adapter, "groups", 1) > 1:
        return None
    update, tensors = adapter.factors()
    mine = bare._replace(bias=adapter.bias_of(base), update=update, tensors=tensors)
    return mine if takes(mine) else None


def share_norms(adapters: Iterable[Any]) -> None:
    """Let ``adapters`` of one frozen weight have one copy of its norms."""
    weights = [adapter for adapter in adapters if isinstance(adapter, WeightMethod)]
    known = next((adapter.squares for adapter in weights if adapter.squares is not None), None)
    for adapter in weights:
        adapter.resume(known)


def _ratio(adapter: WeightMethod, base: WeightBase, weight: Tensor) -> Ratio:
    """``m / n``, kept where the norm is."""
    norm, kept = adapter.norm(weight, base), adapter._kept
    ratios = kept.ratios if kept is not None and kept.norm is norm else {}
    if weight.dtype not in ratios:
        assert adapter.magnitude is not None
        ratios[weight.dtype] = ratio_of(adapter.magnitude, norm, weight.dtype)
    return ratios[weight.dtype]
