"""The passes by torch's own operations, one after the other: they run on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.ops.autocast import cast, scaled_to
from trimtab.ops.decomposition import row_blocks
from trimtab.ops.kernels.contract import BackwardPass, Thin
from trimtab.ops.ratio import HALF, Ratio

_BLOCK = 1 << 18  # elements: what a processor's second cache holds in float32
_CACHED = 1 << 19  # bytes: of two tensors and their product, so much of each stays in a processor's second cache
_LARGE = 1 << 21  # bytes: below that, one product and one sum are quicker than many of blocks


def forward(product: Tensor, *, thin: Thin | None, ratio: Ratio | None, bias: Tensor | None, in_place: bool) -> Tensor:
    """``c (p + s h B^T) + bias``. Afterwards ``product`` holds ``p + s h B^T``, or with ``in_place`` the output."""
    if thin is not None:
        inner, b, scale = thin
        if inner.dtype == product.dtype:
            product.addmm_(inner, scaled_to(b, scale, inner.dtype).t())
        else:  # a copy is quicker than adding two dtypes
            product.copy_(cast(product, inner.dtype).add_(F.linear(inner, cast(b, inner.dtype)), alpha=scale))
    output = product if ratio is None else ratio.times(product, in_place)
    return output if bias is None else output.add_(bias)


def backward(
    grad: Tensor,
    *,
    thin: Thin | None,
    ratio: Ratio | None,
    witness: Tensor | None,
    wants_bias: bool,
    wants_scaled: bool,
) -> BackwardPass:
    """What is asked for of ``grad = dy [tokens, out]``; ``witness`` is ``y [tokens, out]``."""
    bias = grad.sum(0) if wants_bias else None
    witnessed = None if witness is None else _summed_product(grad, witness)
    if ratio is not None and wants_scaled:
        grad, ratio = ratio.times(grad), None
    if thin is None:
        return BackwardPass(grad, bias, witnessed)
    inner, b, scale = thin
    factor = scale if ratio is None else (scale * ratio.values).unsqueeze(1)
    grad_inner = grad.mm(scaled_to(b, factor, grad.dtype))
    grad_b = inner.t().mm(grad).t() * factor  # transposed, it is up to twice as fast
    return BackwardPass(grad, bias, witnessed, grad_inner, cast(grad_b, b.dtype))


def squared_norms(weight: Tensor, squares: Tensor, a: Tensor, b: Tensor, *, scale: float) -> Tensor:
    """``||W + s B A||^2`` per row ``[out]``; of a stack of weights, expert by expert. Differentiable in A and B."""
    a_full, b_full = cast(a, squares.dtype), cast(b, squares.dtype)
    crossed = cast(weight.matmul(cast(a, weight.dtype).mT), squares.dtype)  # W A^T: [out, rank]
    add_product = torch.addmm if weight.dim() == 2 else torch.baddbmm
    inner = add_product(crossed, b_full, a_full.matmul(a_full.mT), beta=2 * scale, alpha=scale**2)
    return (squares + (b_full * inner).sum(-1)).clamp_min_(0)


def fold(weight: Tensor, ratio: Tensor | None, a: Tensor, b: Tensor, *, scale: float) -> Tensor:
    """``c (W + s B A) [out, in]``, a new tensor that is laid out as W."""
    work = torch.promote_types(weight.dtype, torch.float32)
    a, b, rows = a.to(work), b.to(work) * scale, None if ratio is None else ratio.to(work).unsqueeze(1)
    if weight.dtype == work:
        total = weight.clone().addmm_(b, a)
        return total if rows is None else total.mul_(rows)
    total = torch.empty_like(weight)
    elements = _BLOCK if weight.device.type == "cpu" else weight.numel()
    for block in row_blocks(weight.shape[0], weight.shape[1], elements):  # the full digits of a few rows at a time
        full = weight[block].to(work).addmm_(b[block], a)
        total[block] = full if rows is None else full.mul_(rows[block])
    return total


def _summed_product(grad: Tensor, witness: Tensor) -> Tensor:
    """``sum dy y [out]``. A large product is taken in blocks of tokens, which need no memory beyond the caches; on a
    processor that takes half the time in float32."""
    features = grad.shape[1]
    rows = max(1, _CACHED // (features * grad.itemsize))
    if grad.device.type != "cpu" or torch.compiler.is_compiling() or grad.numel() * grad.itemsize <= _LARGE:
        return (grad * witness).sum(0)
    first, *blocks = zip(grad.split(rows), witness.split(rows), strict=True)
    product = torch.mul(*first)
    if grad.dtype not in HALF:  # the blocks' products are added place by place, and summed once
        for part, other in blocks:
            product[: len(part)].addcmul_(part, other)
        return product.sum(0)
    total = product.sum(0).float()
    for part, other in blocks:
        total += torch.mul(part, other, out=product[: len(part)]).sum(0)
    return total
