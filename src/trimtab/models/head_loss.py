"""Cross-entropy through an output head, in chunks, so that the logits of a long text never exist all at once.

The gradient is computed in the forward pass, chunk by chunk, while the logits of the chunk are at hand. So nothing is
computed twice (as it would be under checkpointing), and what waits for the backward pass is the gradient of the hidden
states: as large as they are, and not as large as logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 1024
"""Positions whose logits exist at once: 200 MB in float32 for a vocabulary of 49,152."""

FROZEN_CHUNK = 128
"""The same where the head is not trained. What is near the processor is faster (1.0 s against 1.45 s for 2,048
positions, 576 features and that vocabulary, bfloat16, one core), but a trained head adds up its gradient every time
(3.1 s against 1.9 s)."""

DEVICE_CHUNK = 512
"""The same on another device than the processor, where each chunk is a dozen launches."""


def chunk_of(device: torch.device) -> int:
    """Positions whose logits exist at once where the head is not trained."""
    return FROZEN_CHUNK if device.type == "cpu" else DEVICE_CHUNK


def head_loss(head: nn.Module, hidden: Tensor, targets: Tensor, denominator: int | Tensor) -> Tensor:
    """Sum of the token cross-entropies over ``denominator``; a scalar, differentiable once.

    Args:
        head: maps hidden states ``[n, d]`` to logits ``[n, vocabulary]``, each row by itself.
        hidden: ``[n, d]``; ``n`` may be 0, and then the loss is 0.
        targets: ``[n]``, int64; every one of them counts.
        denominator: a number, or a scalar tensor on any device.
    """
    divisor = torch.as_tensor(denominator, dtype=_wide_type(hidden), device=hidden.device)
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    if torch.is_grad_enabled() and (hidden.requires_grad or parameters):
        loss: Tensor = _HeadLoss.apply(hidden, targets, divisor, head, *parameters)  # type: ignore[no-untyped-call]
        return loss
    total = hidden.new_zeros((), dtype=_wide_type(hidden))
    size = chunk_of(hidden.device)
    for states, wanted in zip(hidden.split(size), targets.split(size), strict=True):
        total += _summed(head, states, wanted)
    return total / divisor


def wide(logits: Tensor) -> Tensor:
    """At least float32, in which softmax and cross-entropy are computed."""
    return logits.to(_wide_type(logits))


def _wide_type(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _summed(head: nn.Module, states: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(wide(head(states)), targets, reduction="sum")


class _HeadLoss(torch.autograd.Function):
    """``head_loss`` with the gradients of ``hidden`` and of the head's trained parameters."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, divisor: Tensor, head: nn.Module, *parameters: Tensor
    ) -> Tensor:
        # Divided by thousands of labels, a gradient could fall below what float16 holds. So here it is divided by the
        # divisor's mantissa alone (0.5 to 1), and by its power of two, which costs no rounding, in the backward pass.
        mantissa, _ = torch.frexp(divisor)
        total = hidden.new_zeros((), dtype=_wide_type(hidden))
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_parameters = [torch.zeros_like(parameter, dtype=_wide_type(parameter)) for parameter in parameters]
        size = CHUNK if parameters else chunk_of(hidden.device)
        for start in range(0, hidden.shape[0], size):
            chunk = slice(start, start + size)
            states = hidden[chunk].detach().requires_grad_(of_hidden is not None)
            with torch.enable_grad():
                loss = _summed(head, states, targets[chunk])
                wanted = ([states] if of_hidden is not None else []) + list(parameters)
                gradients = list(torch.autograd.grad(loss / mantissa, wanted, allow_unused=True))
            total += loss.detach()
            if of_hidden is not None:
                of_hidden[chunk] = gradients.pop(0)
            for kept, gradient in zip(of_parameters, gradients, strict=True):
                if gradient is not None:
                    kept += gradient
        ctx.types = [parameter.dtype for parameter in parameters]
        ctx.save_for_backward(mantissa / divisor, of_hidden, *of_parameters)
        return total / divisor

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        factor, of_hidden, *of_parameters = ctx.saved_tensors
        factor = factor * outputs[0]
        # The factor is applied in float32: as bfloat16 it would itself be rounded, and every gradient with it.
        scaled = None if of_hidden is None else (wide(of_hidden) * factor).to(of_hidden.dtype)
        rest = [(kept * factor).to(kind) for kept, kind in zip(of_parameters, ctx.types, strict=True)]
        return (scaled, None, None, None, *rest)
