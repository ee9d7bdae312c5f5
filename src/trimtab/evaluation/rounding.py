"""How far the same score can be apart when it is computed in another batch, and so what counts as a tie."""

from __future__ import annotations

from typing import Any

import torch

STEPS = 80
"""A tie in units of the coarsest dtype's step at 1 (``torch.finfo.eps``), which makes 0.625 nats in bfloat16.

Measured on SmolLM2-135M in bfloat16: between a padded batch (of 8, 16, 32 or 64 rows) and the row alone, the difference
of two answers' log-likelihoods moves by 0.11 nats (standard deviation) and by at most 0.45, since each of its thirty
layers rounds differently. 0.625 is more than five standard deviations.
"""

SMALLEST = 1e-3
"""Never less than this many nats: a hundred times what float32 needs, and ties are as rare as before."""


def tie_margin(model: Any) -> float:
    """Nats below which the difference of two log-probabilities may be an accident of how the batch was made up."""
    types = {parameter.dtype for parameter in model.parameters()}
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        types.add(torch.get_autocast_dtype(device))
    if torch.get_float32_matmul_precision() != "highest":
        types.add(torch.bfloat16)
    # Weights stored in fewer bits are multiplied in one of these; the other parameters tell which.
    computed = types & {torch.bfloat16, torch.float16, torch.float32, torch.float64}
    return max(SMALLEST, STEPS * max((torch.finfo(kind).eps for kind in computed), default=0.0))
