"""How one token is chosen.

A request draws from a stream of numbers of its own, one number for each token, and its tokens lie on the unit interval
in the order of their ids. So neither the other rows of the batch nor the rounding of two nearly equal logits changes
what a seed gives, unless a number falls right onto the border between two tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIKELY = 256  # so many of the likeliest tokens mostly have the whole share that is wanted, and are quickly found


def draw(logits: Tensor, number: float, *, temperature: float, top_p: float = 1.0, top_k: int = 0) -> int:
    """A token drawn from ``logits`` [vocabulary] by ``number``, which is uniform in [0, 1).

    Logits are divided by the temperature; of the likeliest ``top_k`` tokens (0: of all), those are drawn from that have
    the share ``top_p`` together, the likeliest always among them.
    """
    scaled = logits.to("cpu", torch.float64)
    scaled = (scaled - scaled.max()) / temperature
    size = scaled.shape[-1]
    count = min(top_k or size, size)
    if count == size and top_p >= 1:
        return _at(scaled.exp(), number)
    # The likeliest tokens, all that may be drawn from; in order of their probability.
    total = scaled.exp().sum() if count == size else None
    for few in (min(count, _LIKELY), count):
        best, ids = scaled.topk(few)
        weights = best.exp()
        share = weights.cumsum(-1) / (total if total is not None else scaled.topk(count).values.exp().sum())
        if few == count or share[-1] >= top_p:
            break
    kept = 1 + int((share < top_p).sum())
    ids, order = ids[:kept].sort()
    return int(ids[_at(weights[:kept][order], number)])


def _at(weights: Tensor, number: float) -> int:
    """On which of the intervals, as long as ``weights``, the number falls once they fill the unit interval."""
    ends = weights.cumsum(-1)
    at = int(torch.searchsorted(ends, ends[-1:] * number, right=True))
    while at >= len(weights) or weights[at] == 0:  # the sum was rounded; or what cannot come stands at the end
        at -= 1
    return at
