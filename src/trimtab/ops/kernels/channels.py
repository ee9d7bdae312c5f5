"""The passes where the channels come before the places, as a convolution gives them: ``p [batch, out, places]``,
``h [batch, rank, places]``. No tensor is turned round on the way, whichever of the two lies together in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.ops.autocast import cast, scaled_to
from trimtab.ops.kernels.contract import BackwardPass, Thin
from trimtab.ops.kernels.plain import fold as fold, squared_norms as squared_norms
from trimtab.ops.ratio import Ratio


def forward(product: Tensor, *, thin: Thin | None, ratio: Ratio | None, bias: Tensor | None, in_place: bool) -> Tensor:
    """``c (p + s B h) + bias``. Afterwards ``product`` holds ``p + s B h``, or with ``in_place`` the output."""
    if thin is not None:
        inner, b, scale = thin
        scaled = scaled_to(b, scale, inner.dtype).expand(len(inner), *b.shape)
        if inner.dtype == product.dtype:
            product.baddbmm_(scaled, inner)
        else:
            product.copy_(torch.baddbmm(cast(product, inner.dtype), scaled, inner))
    output = product if ratio is None else ratio.times_rows(product, in_place)
    return output if bias is None else output.add_(bias.unsqueeze(1))


def backward(
    grad: Tensor,
    *,
    thin: Thin | None,
    ratio: Ratio | None,
    witness: Tensor | None,
    wants_bias: bool,
    wants_scaled: bool,
) -> BackwardPass:
    """What is asked for of ``grad = dy [batch, out, places]``; ``witness`` is ``y``."""
    bias = grad.sum((0, 2)) if wants_bias else None
    witnessed = None if witness is None else (grad * witness).sum((0, 2))
    if ratio is not None and wants_scaled:
        grad, ratio = ratio.times_rows(grad), None
    if thin is None:
        return BackwardPass(grad, bias, witnessed)
    inner, b, scale = thin
    factor = scale if ratio is None else (scale * ratio.values).unsqueeze(1)
    grad_inner = torch.matmul(scaled_to(b, factor, grad.dtype).t(), grad)
    grad_b = torch.bmm(grad, inner.transpose(1, 2)).sum(0) * factor
    return BackwardPass(grad, bias, witnessed, grad_inner, cast(grad_b, b.dtype))
