"""The product of a batch with a frozen weight, an update beside it, and a scale per output: one autograd function.

``y = c * (x W^T + d dV^T) + bias``: ``x [..., in]`` the input, ``d`` the same or after dropout, ``W [out, in]``
frozen, ``dV`` an update that knows how to multiply without being built, ``c [out]`` the ratio of magnitude to norm.

Why one function: the update is added in place to the product (no second ``[tokens, out]`` tensor), the gradient of the
input likewise, and the gradient of ``c`` is read off the output, ``dc = sum_t dy (y - bias) / c``, so no activation
is kept that a plain linear layer followed by a nonlinearity would not keep.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.ops.autocast import autocast_dtype, without_autocast

# Within this distance of 1, ``c - 1`` in half precision is a more exact multiplier than ``c`` itself, and ``y / c``
# is a safe way back to the product. Magnitudes stay near the norms they start from, so this is the ordinary case.
_NEAR_ONE = 0.5
_HALF = (torch.bfloat16, torch.float16)


class Update(Protocol):
    """An update ``dV [out, in]`` in factored form. ``tensors`` are its trained tensors, in their own dtype."""

    def add_product(self, product: Tensor, x: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Add ``x dV^T`` to ``product [tokens, out]`` in place; return what the backward pass needs besides ``x``."""

    def add_gradient(
        self, grad_x: Tensor | None, grad: Tensor, x: Tensor, kept: tuple[Tensor, ...], tensors: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Add ``grad dV`` to ``grad_x [tokens, in]`` in place where it is wanted; return the gradients of
        ``tensors``."""


def scale_outputs(values: Tensor, scale: Tensor, near_one: bool, in_place: bool = False) -> Tensor:
    """``values [tokens, out] * scale [out]`` in the dtype of ``values``, with the digits of a float32 ``scale``.

    A half-precision copy of ``c = 1 + e`` would lose ``e`` below 2^-9; ``v + v * e`` computed inside one kernel does
    not.
    """
    if values.dtype in _HALF:
        if near_one:
            excess = (scale - 1).to(values.dtype)
            return values.addcmul_(values, excess) if in_place else torch.addcmul(values, values, excess)
        return (values * scale).to(values.dtype)
    scale = scale.to(values.dtype)
    return values.mul_(scale) if in_place else values * scale


class _Computed(NamedTuple):
    output: Tensor
    fed: Tensor  # what the update saw, [tokens, in]
    kept: tuple[Tensor, ...]  # what the update wants to see again
    witness: tuple[Tensor, ...]  # from which the gradient of the scale is read
    near_one: bool
    reuse_output: bool


def _compute(
    x: Tensor,
    dropped: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    keep_product: bool,
    update: Update | None,
    tensors: tuple[Tensor, ...],
) -> _Computed:
    # Without a scale the bias goes into the product, exactly as the bare layer does it: step 0 is then bit for bit.
    whole = F.linear(x, weight, bias if scale is None else None)
    product = whole.reshape(-1, whole.shape[-1])
    fed = (x if dropped is None else dropped).reshape(-1, x.shape[-1])
    kept = () if update is None else update.add_product(product, fed, tensors)

    near_one = reuse_output = False
    if scale is not None:
        # A look at the values would make an accelerator wait, and a compiler break its graph: there the product is
        # kept.
        if scale.device.type == "cpu" and not torch.compiler.is_compiling():
            near_one = bool(((scale - 1).abs() <= _NEAR_ONE).all())
        # In half precision a bias larger than the product swallows the product's digits: the output is no way back.
        readable = bias is None or product.dtype not in _HALF
        reuse_output = near_one and readable and not keep_product
        output = scale_outputs(product, scale, near_one, in_place=reuse_output)
        if bias is not None:
            output = output.add_(bias)
    else:
        output = product
    # Not a view: autograd refuses to change a view that a custom function returned in place, and models do that.
    result = torch.ops.aten._unsafe_view(output, [*x.shape[:-1], weight.shape[0]])
    witness = () if scale is None else (result if reuse_output else product,)
    return _Computed(result, fed, kept, witness, near_one, reuse_output)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        keep_product: bool,
        update: Update | None,
        *tensors: Tensor,
    ) -> Tensor:
        done = _compute(x, dropped, weight, bias, scale, keep_product, update, tensors)
        ctx.update, ctx.near_one, ctx.reuse_output = update, done.near_one, done.reuse_output
        ctx.has = (dropped is not None, bias is not None, scale is not None)
        ctx.counts = (len(tensors), len(done.kept))
        ctx.shape = x.shape
        optional = [t for t in (bias, scale) if t is not None]
        ctx.save_for_backward(weight, done.fed, *optional, *tensors, *done.kept, *done.witness)
        return done.output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        try:
            saved = list(ctx.saved_tensors)
        except RuntimeError as error:
            if ctx.reuse_output and "inplace" in str(error):
                raise RuntimeError(
                    "trimtab: a tensor that the backward pass of an adapted layer needs was changed in place. If it "
                    "was the layer's output (an activation with inplace=True, for instance), from which the gradient "
                    "of the magnitude is read: set keep_product=True on the rule (it keeps one more activation), or "
                    "make the operation that follows the layer out of place."
                ) from error
            raise
        has_dropped, has_bias, has_scale = ctx.has
        weight, fed = saved[:2]
        rest = saved[2:]
        bias = rest.pop(0) if has_bias else None
        scale = rest.pop(0) if has_scale else None
        n_tensors, n_kept = ctx.counts
        tensors, kept, witness = rest[:n_tensors], rest[n_tensors : n_tensors + n_kept], rest[n_tensors + n_kept :]

        wants_x, wants_dropped, _, wants_bias, wants_scale = ctx.needs_input_grad[:5]
        wants_tensors = any(ctx.needs_input_grad[7:])
        upstream = grad_output.reshape(-1, grad_output.shape[-1])

        grad_bias = grad_scale = None
        if wants_bias or (wants_scale and bias is not None and ctx.reuse_output):
            grad_bias = upstream.sum(0)
        grad = upstream
        if scale is not None:
            if wants_scale:
                seen = witness[0].reshape(upstream.shape)
                grad_scale = (upstream * seen).sum(0).to(scale.dtype)
                if ctx.reuse_output:
                    if bias is not None and grad_bias is not None:
                        grad_scale = grad_scale - bias.to(scale.dtype) * grad_bias.to(scale.dtype)
                    grad_scale = grad_scale / scale
            grad = scale_outputs(upstream, scale, ctx.near_one)

        grad_x = grad.matmul(weight) if wants_x else None
        grad_dropped = torch.zeros_like(fed) if has_dropped and wants_dropped else None
        grads: tuple[Tensor | None, ...] = (None,) * n_tensors
        if ctx.update is not None and (wants_tensors or wants_x or wants_dropped):
            target = grad_dropped if has_dropped else grad_x
            grads = ctx.update.add_gradient(target, grad, fed, tuple(kept), tuple(tensors))
        return (
            None if grad_x is None else grad_x.reshape(ctx.shape),
            None if grad_dropped is None else grad_dropped.reshape(ctx.shape),
            None,
            grad_bias if wants_bias else None,
            grad_scale,
            None,
            None,
            *grads,
        )


def frozen_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    update: Update | None = None,
    tensors: tuple[Tensor, ...] = (),
    dropped: Tensor | None = None,
    scale: Tensor | None = None,
    keep_product: bool = False,
) -> Tensor:
    """``scale * (x W^T + dropped dV^T) + bias`` with gradients for ``x``, ``dropped``, ``bias``, ``scale`` and
    ``tensors``.

    Args:
        x: input ``[..., in]``, in the dtype of ``weight``.
        weight: frozen ``[out, in]``; gets no gradient.
        bias: ``[out]``, added after the scale.
        update: how to multiply with ``dV``; None for none.
        tensors: the trained tensors of ``update``.
        dropped: what the update sees instead of ``x`` (dropout), same shape.
        scale: ``[out]``, normally float32: magnitude over norm; None for 1.
        keep_product: keep the product itself for the gradient of ``scale`` instead of reading it off the output. Needed
            where the output is changed in place afterwards.

    Differentiable once: a second derivative is refused by autograd, and ``torch.func`` transforms are not supported.
    """
    dtype = autocast_dtype(x)
    if dtype is not None and weight.dtype != torch.float64:  # which it leaves alone, for a plain linear layer too
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        dropped = None if dropped is None else dropped.to(dtype)
    given = (x, dropped, bias, scale, *tensors)
    with without_autocast(x):
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given):
            return _FrozenLinear.apply(x, dropped, weight, bias, scale, keep_product, update, *tensors)
        # Nobody will ask for a gradient. (And torch.compile, outside of training, calls a function with exactly two
        # trailing tensors without its context.)
        with torch.no_grad():
            return _compute(x, dropped, weight, bias, scale, keep_product, update, tensors).output
