"""A batch whose rows go through different updates of one frozen weight, with gradients: one product with the weight
forward, one backward, and one launch set for all updates (``trimtab.ops.kernels.triton_segments``).

    y_i = c_a (x_i W^T + x_i dV_a^T) + bias_a        for row i, which is one of those of update a
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.ops.frozen_linear import Operands
from trimtab.ops.kernels import segments_for
from trimtab.ops.linear_map import MATRIX
from trimtab.ops.low_rank import LowRank
from trimtab.ops.mixed_rows import Order, Part, fits, segment

RANKS = 32
"""Up to so many a program holds the gradient of B."""


class Trained(NamedTuple):
    """What some rows are multiplied with, and what gets gradients beside the operands' own tensors."""

    operands: Operands
    magnitude: Tensor | None
    norm: Tensor | None


def trains_together(rows: Tensor, parts: Sequence[Trained]) -> bool:
    """Whether ``mixed_training`` takes ``rows [tokens, in]`` through these."""
    programs = segments_for(rows) if rows.is_floating_point() else None
    if programs is None or not rows.numel():
        return False
    each = [part.operands for part in parts]
    many = any(type(one.update) is LowRank and len(one.tensors[0]) > RANKS for one in each)
    return not many and all(one.through is MATRIX and fits(one, programs, rows) for one in each)


def mixed_training(
    rows: Tensor,
    weight: Tensor,
    parts: Sequence[Part],
    trained: Sequence[Trained],
    *,
    order: Order | None,
    again: Callable[[], Tensor] | None,
) -> Tensor:
    """``[tokens, out]`` for ``rows [tokens, in]``, with gradients for them and for all that is trained.

    Args:
        parts: the rows of each update, counted in ``order``.
        trained: the same updates with their magnitudes.
        again: gives ``weight`` once more in the backward pass, as for ``frozen_linear``.
    """
    segments = [segment(part.rows.stop - part.rows.start, part.operands, segments_for(rows)) for part in parts]
    made = segments_for(rows).TrainedSegments(segments, None if order is None else order.there, rows)
    flat: list[Tensor | None] = []
    for magnitude, norm, operands in ((one.magnitude, one.norm, one.operands) for one in trained):
        first, second = (*operands.tensors, None, None)[:2]
        flat += [magnitude, norm, operands.bias, first, second]
    output: Tensor = _MixedLinear.apply(rows, weight, made, again, *flat)  # type: ignore[no-untyped-call]
    return output


_EACH = 5  # tensors of an update: magnitude, norm, bias, A, B (or M and none)


class _MixedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, segments: Any, again: Any, *flat: Tensor | None) -> Tensor:
        rows = rows.contiguous()
        product = MATRIX.product(rows, weight)
        output, inner = segments.forward(product, rows)
        ctx.segments, ctx.again = segments, again
        # What the tables point to is saved, too: so that a change before the backward pass is an error, as elsewhere.
        kept = None if output is product else product
        ctx.save_for_backward(weight if again is None else None, rows, kept, inner, *flat)
        given: Tensor = output
        return given

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, rows, product, inner, *flat = ctx.saved_tensors
        wants, segments = ctx.needs_input_grad[4:], ctx.segments
        found = segments.backward(grad.contiguous(), product, inner, any(wants[2::_EACH]))
        grad_rows = None
        if ctx.needs_input_grad[0]:
            grad_rows = MATRIX.input_gradient(found.scaled, weight if ctx.again is None else ctx.again(), rows.shape)
        wanted = {number for number, wants_first in enumerate(wants[3::_EACH]) if wants_first}
        of_first = segments.through_updates(found, rows, grad_rows, wanted)
        grads, norms = list[Tensor | None](), flat[1::_EACH]
        grads_m: dict[int, Tensor] = {}
        if numbers := [number for number, wanted in enumerate(wants[::_EACH]) if wanted]:
            norm, products = (torch.stack([each[number] for number in numbers]) for each in (norms, found.products))
            every = torch.where(norm > 0, products / norm, 0.0)
            grads_m = dict(zip(numbers, every, strict=True))
        for number in range(len(flat) // _EACH):
            magnitude, _, bias, first, second = flat[number * _EACH : (number + 1) * _EACH]
            _, _, wants_bias, wants_first, wants_second = wants[number * _EACH : (number + 1) * _EACH]
            grads += [
                grads_m[number].to(magnitude.dtype) if number in grads_m else None,
                None,
                found.bias[number].to(bias.dtype) if wants_bias else None,
                of_first[number].to(first.dtype) if wants_first else None,
                found.b[number].to(second.dtype) if wants_second else None,
            ]
        return grad_rows, None, None, None, *grads
