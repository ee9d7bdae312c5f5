"""The product of a batch with a frozen weight, an update beside it, and a magnitude per output: one autograd function.

``y = c * (x W^T + d dV^T) + bias`` with ``c = m / n``: ``x [..., in]`` the input, ``d`` the same or after dropout,
``W [out, in]`` frozen, ``dV`` an update that knows how to multiply without being built, ``m [out]`` the magnitude and
``n [out]`` the norm. How ``x`` goes through ``W`` is the map's affair (``trimtab.ops.linear_map``), what happens to the
product after that the kernels' (``trimtab.ops.kernels``).

Why one function: the update is added in place to the product (no second ``[tokens, out]`` tensor), the gradient of the
input likewise, and the gradient of ``c`` is read off the output, ``dc = sum_t dy (y - bias) / c``, so no activation
is kept that a plain linear layer followed by a nonlinearity would not keep. Forward and backward each take the form
(``trimtab.ops.cost``) that costs less on their shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.ops.autocast import autocast_dtype, cast, scaled_to, without_autocast
from trimtab.ops.cost import Compute, counted, folds_gradient, folds_output, full_digits_for_few, may_fold_output
from trimtab.ops.dropout import Drawn, drawn_again
from trimtab.ops.expert_rows import StackMap
from trimtab.ops.kernels import kernels_for, quotients_for, turning_for
from trimtab.ops.kernels.contract import Passes
from trimtab.ops.linear_map import MATRIX, LinearMap
from trimtab.ops.ratio import HALF, Ratio, ratio_of
from trimtab.ops.update import BuiltUpdate, Update


class Operands(NamedTuple):
    """What a batch is multiplied with: ``y = c (x W^T + x dV^T) + bias``."""

    weight: Tensor
    bias: Tensor | None
    ratio: Ratio | None
    update: Update | None
    tensors: tuple[Tensor, ...]
    through: LinearMap
    seen: LinearMap | None = None
    """How the update reads the rows, where that is another way than the weight's."""


class Settings(NamedTuple):
    """How it is multiplied: what the user chose, and how the weight is had again."""

    keep: Drawn | None
    keep_product: bool
    compute: Compute
    again: Callable[[], Tensor] | None


class Computed(NamedTuple):
    """What a forward pass gives."""

    output: Tensor
    """In the shape of a product."""
    product: Tensor
    """The product before the ratio; the output itself, if the ratio was applied in place."""
    inner: Tensor | None = None
    """``x A^T`` of a thin update, where the backward pass may use it."""


def factored(rows: Tensor, fed: Tensor, operands: Operands, in_place: bool) -> Computed:
    """``c (x W^T + d dV^T) + bias`` for ``rows = x`` and ``fed = d``, never forming a weight; ``in_place`` gives the
    product before the ratio up for the output."""
    weight, bias, ratio, update, tensors, through, seen = operands
    # Without a ratio the bias goes into the product, exactly as the bare layer does it: step 0 is then bit for bit.
    product = through.product(rows, weight, bias if ratio is None else None)
    thin = None
    if update is not None:
        work = full_digits_for_few(through.tokens(rows), product.dtype, product.device)
        thin = update.thin(fed, tensors, seen or through, work)
        if thin is None and (spread := update.before_spread(fed, tensors, through)) is not None:
            left = {"ratio": ratio, "bias": None if ratio is None else bias, "in_place": in_place}
            output = turning_for(product).forward_of_spread(product, spread, **left)
            if output is not None:
                return Computed(output, product)
        if thin is None:
            update.add_product(product, fed, tensors, through)
    if thin is None and ratio is None:
        return Computed(product, product)
    bias = None if ratio is None else bias
    output = _kernels(through, product).forward(product, thin=thin, ratio=ratio, bias=bias, in_place=in_place)
    return Computed(output, product, thin.inner if thin is not None and thin.inner.dtype == product.dtype else None)


def _kernels(through: LinearMap, product: Tensor) -> Passes:
    """The kernels for ``product``. A stack of weights has its own, since its factors and ratios go row by row."""
    return through if isinstance(through, StackMap) else kernels_for(product)


def _dropped(operands: Operands, keep: Drawn, rows: Tensor, x: Tensor) -> tuple[Tensor, Operands]:
    """What the update reads, and ``operands`` with how it does that and dropout's factor. ``x`` are the rows as they
    were given."""
    update, through = operands.update, operands.through
    tensors = _scaled(operands.tensors, keep, torch.promote_types(operands.tensors[-1].dtype, rows.dtype))
    seen = keep.inside(rows, through, len(tensors[0])) if update is not None and update.is_thin else through
    fed = through.rows(keep.of(x)) if seen is through else rows
    return fed, operands._replace(tensors=tensors, seen=seen)


def _scaled(tensors: tuple[Tensor, ...], keep: Drawn, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """``tensors`` so that dropout's factor is in ``dV``, where it costs nothing: in the last of them, which is given in
    ``dtype``."""
    *others, last = tensors
    return *others, scaled_to(last, keep.scale, dtype)


def _compute(x: Tensor, operands: Operands, settings: Settings) -> tuple[Computed, Tensor, bool]:
    """The product; the rows of ``x``; and whether the output is a way back to the product, which then is not kept."""
    weight, bias, ratio, update, tensors, through, _ = operands
    keep = settings.keep
    rows = through.rows(x)
    # In half precision a bias larger than the product swallows the product's digits: no way back from the output.
    readable = ratio is not None and ratio.divisor is not None and not settings.keep_product
    readable = readable and (bias is None or (ratio is not None and ratio.near_one and weight.dtype not in HALF))
    # (A stack of weights is never formed: it is as large as all experts, however few the rows are.)
    folds = update is not None and keep is None and (ratio is None or readable) and weight.dim() == 2
    if folds and may_fold_output(settings.compute, weight.dtype):
        assert update is not None
        tokens = counted(through.tokens(rows))
        work = update.work(tokens, tensors, weight.dtype)
        if folds_output(settings.compute, work, tokens, weight.shape, scaled=readable, like=weight):
            folded = update.fold(weight, None if ratio is None else ratio.values, tensors)
            output = through.product(rows, folded, bias)
            return Computed(output, output), rows, readable
    fed = rows
    if keep is not None and update is not None:
        fed, operands = _dropped(operands, keep, rows, x)
    return factored(rows, fed, operands, readable), rows, readable


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        magnitude: Tensor | None,
        norm: Tensor | None,
        fixed: tuple[Operands, Settings],
        *tensors: Tensor,
    ) -> Tensor:
        operands, settings = fixed[0]._replace(bias=bias, tensors=tensors), fixed[1]
        weight, ratio, update, through = operands.weight, operands.ratio, operands.update, operands.through
        keep, again = settings.keep, settings.again
        computed, rows, readable = _compute(x, operands, settings)
        output = through.output(computed.output, x.shape)
        ctx.update, ctx.through, ctx.settings, ctx.readable = update, through, settings._replace(keep=None), readable
        ctx.drawn = (type(keep), 0.0 if keep is None else keep[1])
        ctx.shape, ctx.n_tensors = x.shape, len(tensors)
        ctx.near_one, ctx.weight_shape = ratio is not None and ratio.near_one, weight.shape
        saved = (
            weight if again is None else None,
            None if update is None else rows,  # a frozen weight alone asks for no more than the gradient
            None if keep is None else keep[0],
            bias,
            magnitude,
            norm,
            *((None, None, None) if ratio is None else ratio[:1] + ratio[2:]),
            None if ratio is None else output if readable else computed.product,
            computed.inner,
            *tensors,
        )
        ctx.save_for_backward(*saved)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved, readable = _saved(ctx)
        weight, rows, kept, bias, magnitude, norm, values, excess, divisor, witness, inner, *trained = saved
        tensors: tuple[Tensor, ...] = tuple(trained)
        update: Update | None = ctx.update
        through: LinearMap = ctx.through
        again = ctx.settings.again
        wants_x, wants_bias, wants_magnitude, wants_norm = ctx.needs_input_grad[:4]
        wants_ratio = wants_magnitude or wants_norm
        ratio = None if values is None else Ratio(values, ctx.near_one, excess, divisor)
        upstream = through.product_gradient(grad_output)
        if readable:
            witness = through.product_gradient(witness)
        elif ctx.readable and wants_ratio:
            witness = _product_again(ctx, rows, kept, weight, tensors)
        tokens = counted(upstream.shape[0] if upstream.dim() == 2 else upstream.shape[0] * upstream.shape[2])

        # Which form the gradient of the input takes, and what the ratio goes into: the gradient, the weight, or B.
        thin, keep, folds = None, None, False
        walks = update is not None and (wants_x or any(ctx.needs_input_grad[5:]))
        if update is not None and walks:
            keep, fed, seen = None if kept is None else _kept(ctx, kept, rows), rows, through
            operands = Operands(weight, bias=None, ratio=None, update=update, tensors=tensors, through=through)
            if keep is not None:
                fed, operands = _dropped(operands, keep, rows, rows)
                seen = operands.seen or through
            thin = update.thin(fed, operands.tensors, seen, upstream.dtype, inner=inner)
            if wants_x and keep is None and len(ctx.weight_shape) == 2:
                work, scales = update.work(tokens, tensors, upstream.dtype), ratio is not None and thin is not None
                shape, compute = ctx.weight_shape, ctx.settings.compute
                folds = folds_gradient(compute, work, tokens, shape, scaled=scales, like=upstream)
        into_weight = folds or (len(ctx.weight_shape) == 2 and ctx.weight_shape[1] < tokens)
        into_gradient = ratio is not None and ((walks and thin is None) or (wants_x and not into_weight))
        passed = _kernels(through, upstream).backward(
            upstream,
            thin=thin,
            ratio=ratio,
            witness=witness if wants_ratio else None,
            wants_bias=wants_bias or (wants_ratio and bias is not None and readable),
            wants_scaled=into_gradient,
        )

        grad_magnitude = grad_norm = None
        if wants_ratio:
            total = passed.witnessed
            assert total is not None
            if readable:
                if bias is not None and passed.bias is not None:
                    total = total.to(norm.dtype) - bias.to(norm.dtype) * passed.bias.to(norm.dtype)
                grad_magnitude = total / divisor
            elif ctx.near_one:
                grad_magnitude = total / norm
            else:
                grad_magnitude = torch.where(norm > 0, total / norm, 0.0)
            if wants_norm:
                grad_norm = -grad_magnitude * values
            grad_magnitude = grad_magnitude.to(magnitude.dtype)

        grad_rows = None
        if wants_x:
            weight = weight if again is None else again()
            left = None if into_gradient else ratio
            if update is not None and folds:
                weight = update.fold(weight, None if left is None else left.values, tensors)
            elif left is not None:
                weight = left.times_rows(weight, in_place=again is not None)
            grad_rows = through.input_gradient(passed.grad, weight, ctx.shape)
        grads: tuple[Tensor | None, ...] = (None,) * len(tensors)
        if update is not None and walks:
            # What came through dropout goes back through it, and so is gathered apart.
            apart = keep is not None and seen is through
            target = None if folds or grad_rows is None else torch.zeros_like(grad_rows) if apart else grad_rows
            grads = update.add_gradient(target, passed, fed, operands.tensors, seen)
            if keep is not None:
                grads = _scaled(grads, keep, tensors[-1].dtype)
            if grad_rows is not None and target is not None and keep is not None and apart:
                grad_rows.add_(keep.of(target))
        grad_x = None if grad_rows is None else grad_rows.reshape(ctx.shape)
        return grad_x, passed.bias if wants_bias else None, grad_magnitude, grad_norm, None, *grads


_ADVICE = (
    "trimtab: the output of a layer was changed in place, and the gradient of its magnitude is read from it. Set "
    "keep_product=True on the rule (it keeps one more activation), or make the operation that follows the layer out of "
    "place."
)
_WITNESS = 9  # the place of the output, or of the product, among what is saved


def _saved(ctx: Any) -> tuple[Sequence[Any], bool]:
    """What the forward pass saved, and whether the output among it is a way back to the product. Where the output was
    changed in place since (a block that adds to it, an activation with ``inplace=True``), it is left out."""
    try:
        return ctx.saved_tensors, ctx.readable
    except RuntimeError as error:
        if not ctx.readable or "inplace" not in str(error):
            raise
        if ctx.update is None:  # then the input was not kept
            raise RuntimeError(_ADVICE) from error
        each = enumerate(ctx._raw_saved_tensors)  # one by one: ``saved_tensors`` gives all or none
        return [None if place == _WITNESS else one.unpack() for place, one in each], False


def _kept(ctx: Any, kept: Tensor, rows: Tensor) -> Drawn:
    """What dropout kept of ``rows`` in the forward pass."""
    kind, number = ctx.drawn
    return drawn_again(kind, kept, number, rows)


def _product_again(ctx: Any, rows: Tensor, kept: Tensor | None, weight: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
    """``x (W + dV)^T`` once more."""
    weight, fed = weight if ctx.settings.again is None else ctx.settings.again(), rows
    operands = Operands(weight=weight, bias=None, ratio=None, update=ctx.update, tensors=tensors, through=ctx.through)
    if kept is not None:
        fed, operands = _dropped(operands, _kept(ctx, kept, rows), rows, rows)
    return factored(rows, fed, operands, True).output


def frozen_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    through: LinearMap = MATRIX,
    update: Update | None = None,
    tensors: tuple[Tensor, ...] = (),
    keep: Drawn | None = None,
    magnitude: Tensor | None = None,
    norm: Tensor | None = None,
    keep_product: bool = False,
    compute: Compute = "auto",
    again: Callable[[], Tensor] | None = None,
    ratios: dict[torch.dtype, Ratio] | None = None,
) -> Tensor:
    """``m / n * (x W^T + d dV^T) + bias`` with gradients for ``x``, ``bias``, ``magnitude``, ``norm`` and ``tensors``.

    Args:
        x: input, ``[..., in]`` in the dtype of ``weight`` for a plain matrix; else what ``through`` reads.
        weight: frozen ``[out, in]``; gets no gradient.
        bias: ``[out]``, added after the ratio.
        through: how ``x`` goes through a weight.
        update: how to multiply with ``dV``; None for none.
        tensors: the trained tensors of ``update``.
        keep: what the update sees of ``x`` (dropout): ``d = scale * of(x)``; None for all of it.
        magnitude: ``m [out]``; None for no ratio.
        norm: ``n [out]``, normally float32; given together with ``magnitude``. Where it is 0 the output is 0 and the
            magnitude gets no gradient.
        keep_product: keep the product itself for the gradient of ``magnitude`` instead of reading it off the output.
            Where the output is changed in place afterwards, the product is else computed again.
        compute: ``auto`` chooses between the two forms by their cost; ``folded`` and ``factored`` overrule it. Folding
            is left out where it cannot be exact: with dropout, with ``keep_product``, or with a ratio far from 1.
        again: gives ``weight`` once more in the backward pass, which then does not keep it: for a weight that was
            computed for this call (a dequantised one). Called once, and only if ``x`` wants a gradient; what it gives
            may be overwritten.
        ratios: where ``m / n`` is looked for, and left if it is not there, by the dtype of the computation; the caller
            empties it when ``magnitude`` or ``norm`` change.

    Differentiable once: a second derivative is refused by autograd. Transforms of ``torch.func`` do not come here.
    """
    if tensors and tensors[-1].is_meta and not weight.is_meta:
        # A product with a tensor that has no memory gives whatever lies in the memory of the product.
        raise RuntimeError("the tensors of the update are on the meta device, and the weight is not")
    dtype = autocast_dtype(weight) if through.follows_autocast else None
    if dtype is not None and weight.dtype != torch.float64:  # which it leaves alone, for a plain linear layer too
        x, weight = x.to(dtype) if x.is_floating_point() else x, weight.to(dtype)
    # A weight that is dequantised is in the dtype of the input, and its layer's bias need not be.
    bias = None if bias is None else cast(bias, weight.dtype)
    if update is None:
        keep = None  # there is nobody to see less of x
    elif update.only_built or not (
        update.takes_any_map or (through.takes_factors if update.is_thin else through.reads_features)
    ):
        update = BuiltUpdate(update)
    settings = Settings(keep, keep_product, compute, again)
    given = (x, bias, magnitude, norm, *tensors)
    with without_autocast(weight):
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given):
            ratio = None if magnitude is None or norm is None else _ratio(magnitude, norm, weight.dtype, ratios)
            # What gets a gradient is an argument of its own; bias and tensors join the operands again inside.
            operands = Operands(weight=weight, bias=None, ratio=ratio, update=update, tensors=(), through=through)
            inputs = x, bias, magnitude, norm, (operands, settings), *tensors
            output: Tensor = _FrozenLinear.apply(*inputs)  # type: ignore[no-untyped-call]
            return output
        # Nobody will ask for a gradient. (And torch.compile, outside of training, calls a function with exactly two
        # trailing tensors without its context.)
        with torch.no_grad():
            ratio = None if magnitude is None or norm is None else _ratio(magnitude, norm, weight.dtype, ratios)
            operands = Operands(weight=weight, bias=bias, ratio=ratio, update=update, tensors=tensors, through=through)
            return through.output(_compute(x, operands, settings)[0].output, x.shape)


def _ratio(magnitude: Tensor, norm: Tensor, dtype: torch.dtype, known: dict[torch.dtype, Ratio] | None) -> Ratio:
    """``m / n`` from what is ``known``, or computed and left there."""
    ratio = None if known is None else known.get(dtype)
    if ratio is None or (
        torch.is_grad_enabled() and ratio.values.is_inference()
    ):  # that mode's are no good for training
        ratio = ratio_of(magnitude, norm, dtype, quotients_for(norm))
        if known is not None:
            known[dtype] = ratio
    return ratio
