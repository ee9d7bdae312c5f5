"""The product of a batch with a frozen weight, an update beside it, and a magnitude per output: one autograd function.

``y = c * (x W^T + d dV^T) + bias`` with ``c = m / n``: ``x [..., in]`` the input, ``d`` the same or after dropout,
``W [out, in]`` frozen, ``dV`` an update that knows how to multiply without being built, ``m [out]`` the magnitude and
``n [out]`` the norm.

Why one function: the update is added in place to the product (no second ``[tokens, out]`` tensor), the gradient of the
input likewise, and the gradient of ``c`` is read off the output, ``dc = sum_t dy (y - bias) / c``, so no activation
is kept that a plain linear layer followed by a nonlinearity would not keep. Forward and backward each take the form
(``trimtab.ops.cost``) that costs less on their shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.ops.autocast import autocast_dtype, without_autocast
from trimtab.ops.cost import Compute, Work, counted, folds_gradient, folds_output
from trimtab.ops.dropout import Keep
from trimtab.ops.ratio import HALF, Ratio, ratio_of


class Update(Protocol):
    """An update ``dV [out, in]``, linear in the last of ``tensors``, its trained tensors in their own dtype."""

    takes_ratio: ClassVar[bool]
    """Whether ``add_gradient`` can be given the ratio apart from the gradient."""

    def work(self, tokens: int, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Work:
        """What multiplying with the update costs on so many tokens."""

    def fold(self, weight: Tensor, ratio: Tensor | None, tensors: tuple[Tensor, ...]) -> Tensor:
        """``c (W + dV) [out, in]`` with ``ratio = c [out]``, None for 1: a new tensor in the dtype of ``weight``, and
        laid out as it is (a transposed weight stays one), so that multiplying with it is what the bare layer does."""

    def add_product(self, product: Tensor, x: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Add ``x dV^T`` to ``product [tokens, out]`` in place; return what the backward pass may want besides
        ``x``."""

    def add_gradient(
        self,
        grad_x: Tensor | None,
        grad: Tensor,
        ratio: Tensor | None,
        x: Tensor,
        kept: tuple[Tensor, ...],
        tensors: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        """Add ``grad dV`` to ``grad_x [tokens, in]`` in place where it is wanted; return the gradients of ``tensors``.

        ``grad [tokens, out]`` is still to be multiplied by ``ratio [out]`` unless that is None. ``kept`` is what
        ``add_product`` returned, or empty.
        """


class _Computed(NamedTuple):
    output: Tensor  # [tokens, out]
    rows: Tensor  # the input, [tokens, in]
    kept: tuple[Tensor, ...]  # what the update may want to see again
    product: Tensor | None  # from which the gradient of the ratio is read; None: from the output


def factored(
    rows: Tensor,
    fed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ratio: Ratio | None,
    in_place: bool,
    update: Update | None,
    tensors: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """``c (x W^T + d dV^T) + bias [tokens, out]`` for ``rows = x`` and ``fed = d``, never forming a weight; the product
    before the ratio, which ``in_place`` gives up for the output; and what the update may want to see again."""
    # Without a ratio the bias goes into the product, exactly as the bare layer does it: step 0 is then bit for bit.
    product = F.linear(rows, weight, bias if ratio is None else None)
    kept = () if update is None else update.add_product(product, fed, tensors)
    output = product
    if ratio is not None:
        output = ratio.times(product, in_place)
        if bias is not None:
            output = output.add_(bias)
    return output, product, kept


def _scaled(tensors: tuple[Tensor, ...], keep: Keep | None) -> tuple[Tensor, ...]:
    """``tensors`` so that dropout's factor is in ``dV``, where it costs nothing."""
    return tensors if keep is None else (*tensors[:-1], tensors[-1] * keep.scale)


def _compute(
    x: Tensor,
    keep: Keep | None,
    weight: Tensor,
    bias: Tensor | None,
    ratio: Ratio | None,
    keep_product: bool,
    compute: Compute,
    update: Update | None,
    tensors: tuple[Tensor, ...],
) -> _Computed:
    rows = x.reshape(-1, x.shape[-1])
    fed = rows if keep is None else keep.of(x).reshape(-1, x.shape[-1])
    # In half precision a bias larger than the product swallows the product's digits: the output is no way back.
    readable = ratio is not None and ratio.near_one and not keep_product and (bias is None or weight.dtype not in HALF)
    kept: tuple[Tensor, ...] = ()
    tokens = counted(len(fed))
    if (
        update is not None
        and keep is None
        and (ratio is None or readable)
        and folds_output(compute, update.work(tokens, tensors, x.dtype), tokens, weight.shape, readable, x.dtype)
    ):
        output = F.linear(rows, update.fold(weight, None if ratio is None else ratio.values, tensors), bias)
        product = output
    else:
        output, product, kept = factored(rows, fed, weight, bias, ratio, readable, update, _scaled(tensors, keep))
    return _Computed(output, rows, kept, None if readable else product)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        keep: Keep | None,
        weight: Tensor,
        bias: Tensor | None,
        magnitude: Tensor | None,
        norm: Tensor | None,
        ratio: Ratio | None,
        keep_product: bool,
        compute: Compute,
        update: Update | None,
        again: Callable[[], Tensor] | None,
        *tensors: Tensor,
    ) -> Tensor:
        done = _compute(x, keep, weight, bias, ratio, keep_product, compute, update, tensors)
        output = done.output
        if x.dim() != 2:
            # Not a view: autograd refuses to change a view that a custom function returned in place, and models do.
            output = torch.ops.aten._unsafe_view(output, [*x.shape[:-1], weight.shape[0]])
        ctx.update, ctx.compute, ctx.reuse_output = update, compute, done.product is None
        ctx.keep_scale, ctx.shape, ctx.counts = keep and keep.scale, x.shape, (len(tensors), len(done.kept))
        ctx.near_one = ratio is not None and ratio.near_one
        ctx.again, ctx.weight_shape = again, weight.shape
        parts = (None, None) if ratio is None else (ratio.values, ratio.excess)
        kept_weight = weight if again is None else None
        rows = None if update is None else done.rows  # a frozen weight alone asks for no more than the gradient
        witness = () if ratio is None else (output if done.product is None else done.product,)
        mask = None if keep is None else keep.mask
        ctx.save_for_backward(kept_weight, rows, mask, bias, magnitude, norm, *parts, *tensors, *done.kept, *witness)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        try:
            saved = ctx.saved_tensors
        except RuntimeError as error:
            if ctx.reuse_output and "inplace" in str(error):
                raise RuntimeError(
                    "trimtab: a tensor that the backward pass of an adapted layer needs was changed in place. If it "
                    "was the layer's output (an activation with inplace=True, for instance), from which the gradient "
                    "of the magnitude is read: set keep_product=True on the rule (it keeps one more activation), or "
                    "make the operation that follows the layer out of place."
                ) from error
            raise
        weight, rows, mask, bias, magnitude, norm, values, excess = saved[:8]
        n_tensors, n_kept = ctx.counts
        tensors, kept = saved[8 : 8 + n_tensors], saved[8 + n_tensors : 8 + n_tensors + n_kept]
        wants_x, _, _, wants_bias, wants_magnitude, wants_norm = ctx.needs_input_grad[:6]
        wants_ratio = wants_magnitude or wants_norm
        wants_tensors = any(ctx.needs_input_grad[11:])
        ratio = None if values is None else Ratio(values, ctx.near_one, excess)
        upstream = grad_output.reshape(-1, ctx.weight_shape[0])
        update: Update | None = ctx.update

        grad_bias = grad_magnitude = grad_norm = None
        if wants_bias or (wants_ratio and bias is not None and ctx.reuse_output):
            grad_bias = upstream.sum(0)
        if wants_ratio:
            total = (upstream * saved[-1].reshape(upstream.shape)).sum(0)
            if ctx.reuse_output:
                if bias is not None and grad_bias is not None:
                    total = total.to(norm.dtype) - bias.to(norm.dtype) * grad_bias.to(norm.dtype)
                grad_magnitude = total / (values * norm)
            elif ctx.near_one:
                grad_magnitude = total / norm
            else:
                grad_magnitude = torch.where(norm > 0, total / norm, 0.0)
            if wants_norm:
                grad_norm = -grad_magnitude * values
            grad_magnitude = grad_magnitude.to(magnitude.dtype)

        grad, factor = upstream, ratio  # factor: what grad is still to be multiplied by
        walks = update is not None and (wants_tensors or wants_x)
        if update is not None and walks and factor is not None and not update.takes_ratio:
            grad, factor = factor.times(grad), None

        grad_x, folds = None, False
        if wants_x:
            if ctx.again is not None:
                weight = ctx.again()
            tokens = counted(len(upstream))
            if update is not None and mask is None:
                work = update.work(tokens, tensors, rows.dtype)
                folds = folds_gradient(ctx.compute, work, tokens, weight.shape, factor is not None)
            if update is not None and folds:
                multiplier = update.fold(weight, None if factor is None else factor.values, tensors)
            elif factor is not None and weight.shape[1] < tokens:
                multiplier = factor.times_rows(weight, in_place=ctx.again is not None)
            else:
                multiplier = weight
                if factor is not None:
                    grad, factor = factor.times(grad), None
            grad_x = grad.mm(multiplier)

        grads: tuple[Tensor | None, ...] = (None,) * n_tensors
        if update is not None and walks:
            keep = None if mask is None else Keep(mask.reshape(rows.shape), ctx.keep_scale)
            fed = rows if keep is None else keep.of(rows)
            # What came through dropout goes back through it, and so is gathered apart.
            target = None if folds or grad_x is None else grad_x if keep is None else torch.zeros_like(grad_x)
            left = None if factor is None else factor.values
            grads = _scaled(update.add_gradient(target, grad, left, fed, kept, _scaled(tensors, keep)), keep)
            if grad_x is not None and target is not None and keep is not None:
                grad_x.add_(keep.of(target))
        return (
            None if grad_x is None else grad_x.reshape(ctx.shape),
            None,
            None,
            grad_bias if wants_bias else None,
            grad_magnitude if wants_magnitude else None,
            grad_norm,
            *(None,) * 5,
            *grads,
        )


def frozen_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    update: Update | None = None,
    tensors: tuple[Tensor, ...] = (),
    keep: Keep | None = None,
    magnitude: Tensor | None = None,
    norm: Tensor | None = None,
    keep_product: bool = False,
    compute: Compute = "auto",
    again: Callable[[], Tensor] | None = None,
    ratios: dict[torch.dtype, Ratio] | None = None,
) -> Tensor:
    """``m / n * (x W^T + d dV^T) + bias`` with gradients for ``x``, ``bias``, ``magnitude``, ``norm`` and ``tensors``.

    Args:
        x: input ``[..., in]``, in the dtype of ``weight``.
        weight: frozen ``[out, in]``; gets no gradient.
        bias: ``[out]``, added after the ratio.
        update: how to multiply with ``dV``; None for none.
        tensors: the trained tensors of ``update``.
        keep: what the update sees of ``x`` (dropout): ``d = scale * of(x)``; None for all of it.
        magnitude: ``m [out]``; None for no ratio.
        norm: ``n [out]``, normally float32; given together with ``magnitude``. Where it is 0 the output is 0 and the
            magnitude gets no gradient.
        keep_product: keep the product itself for the gradient of ``magnitude`` instead of reading it off the output.
            Needed where the output is changed in place afterwards.
        compute: ``auto`` chooses between the two forms by their cost; ``folded`` and ``factored`` overrule it. Folding
            is left out where it cannot be exact: with dropout, with ``keep_product``, or with a ratio far from 1.
        again: gives ``weight`` once more in the backward pass, which then does not keep it: for a weight that was
            computed for this call (a dequantised one). Called once, and only if ``x`` wants a gradient; what it gives
            may be overwritten.
        ratios: where a pass without gradients looks for ``m / n``, and leaves it if it is not there, by the dtype of
            the computation; the caller empties it when ``magnitude`` or ``norm`` change.

    Differentiable once: a second derivative is refused by autograd, and ``torch.func`` transforms are not supported.
    """
    dtype = autocast_dtype(x)
    if dtype is not None and weight.dtype != torch.float64:  # which it leaves alone, for a plain linear layer too
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if update is None:
        keep = None  # there is nobody to see less of x
    given = (x, bias, magnitude, norm, *tensors)
    with without_autocast(x):
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given):
            ratio = None if magnitude is None or norm is None else ratio_of(magnitude, norm, x.dtype)
            return _FrozenLinear.apply(
                x, keep, weight, bias, magnitude, norm, ratio, keep_product, compute, update, again, *tensors
            )
        # Nobody will ask for a gradient. (And torch.compile, outside of training, calls a function with exactly two
        # trailing tensors without its context.)
        with torch.no_grad():
            ratio = None if ratios is None else ratios.get(x.dtype)
            if ratio is None and magnitude is not None and norm is not None:
                ratio = ratio_of(magnitude, norm, x.dtype)
                if ratios is not None:
                    ratios[x.dtype] = ratio
            done = _compute(x, keep, weight, bias, ratio, keep_product, compute, update, tensors)
            return done.output.view(*x.shape[:-1], weight.shape[0])
