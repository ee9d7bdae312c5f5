"""A batch whose rows go through different updates of one frozen weight, with gradients: one product with the weight
forward, one backward, and one launch set for all updates (``trimtab.ops.kernels.triton_segments``).

    y_i = c_a (x_i W^T + s_a x_i A_a^T B_a^T) + bias_a        for row i, which is one of those of update a
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
    thin = all(one.through is MATRIX and (one.update is None or type(one.update) is LowRank) for one in each)
    few = thin and all(len(one.tensors[0]) <= RANKS for one in each if one.update is not None)
    return few and all(fits(one, programs, rows) for one in each)


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
        a, b = operands.tensors or (None, None)
        flat += [magnitude, norm, operands.bias, a, b]
    output: Tensor = _MixedLinear.apply(rows, weight, made, again, *flat)  # type: ignore[no-untyped-call]
    return output


_EACH = 5  # tensors of an update: magnitude, norm, bias, A, B


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
        grads_a: list[Tensor | None] = []
        if found.inner is not None:
            if grad_rows is not None:
                segments.add_input_gradient(grad_rows, found.inner)
            if any(wants[3::_EACH]):
                grads_a = segments.weight_gradients(found.inner, rows)
        grads, norms = list[Tensor | None](), flat[1::_EACH]
        grads_m: dict[int, Tensor] = {}
        if numbers := [number for number, wanted in enumerate(wants[::_EACH]) if wanted]:
            norm, products = (torch.stack([each[number] for number in numbers]) for each in (norms, found.products))
            every = torch.where(norm > 0, products / norm, 0.0)
            grads_m = dict(zip(numbers, every, strict=True))
        for number in range(len(flat) // _EACH):
            magnitude, _, bias, a, b = flat[number * _EACH : (number + 1) * _EACH]
            _, _, wants_bias, wants_a, wants_b = wants[number * _EACH : (number + 1) * _EACH]
            of_a, of_b = grads_a[number] if wants_a else None, found.b[number] if wants_b else None
            grads += [
                grads_m[number].to(magnitude.dtype) if number in grads_m else None,
                None,
                found.bias[number].to(bias.dtype) if wants_bias else None,
                None if of_a is None else of_a.to(a.dtype),
                None if of_b is None else of_b.to(b.dtype),
            ]
        return grad_rows, None, None, None, *grads
