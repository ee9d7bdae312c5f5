"""What the inputs of a layer are like: their second moments, as its weight meets them."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.bases import _base


def second_moments(base: _base.WeightBase, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, int] | None:
    """``sum x x^T [in, in]`` in float64 over the vectors that go through the weight of ``base`` for the batch ``x``,
    and how many they are. The diagonal ``[in]`` is all there is of a look-up: how often each entry was named.

    ``mask [batch, length]`` says which tokens count, where the input has such axes. None where the vectors are not
    known: a weight that is only read, a stack of them, a convolution with groups.
    """
    if not base.is_called or base.stack or base.groups > 1:
        return None
    through, x = base.through, x.detach()
    names_entries = not x.is_floating_point()
    if mask is not None and (names_entries or through.reads_features) and x.shape[: mask.dim()] == mask.shape:
        x = x[mask.to(x.device, torch.bool)]
    rows = through.rows(base.prepared(x))
    if names_entries:
        return torch.bincount(rows, minlength=base.shape[1]).double(), rows.numel()
    rows = rows.double()
    if not through.reads_features:  # the vectors are what the kernel covers at each place
        every = torch.eye(base.shape[1], dtype=rows.dtype, device=rows.device)
        rows = through.product(rows, every).transpose(1, 2).flatten(0, 1)
    return rows.mT @ rows, rows.shape[0]
