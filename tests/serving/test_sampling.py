"""A token is drawn as the formula says, by one number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.serving.sampling import draw


def plain(logits: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """The share of every token, in float64: the likeliest ``top_k``, then those that have ``top_p`` together."""
    shares = (logits.double() / temperature).softmax(-1)
    order = shares.argsort(descending=True)
    kept = order[: top_k or len(order)]
    shares = torch.zeros_like(shares).index_put((kept,), shares[kept])
    shares /= shares.sum()
    before = shares[order].cumsum(-1) - shares[order]
    shares[order[before >= top_p]] = 0
    return shares / shares.sum()


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.7, 0.9, 0), (1.5, 1.0, 5), (1.2, 0.8, 7), (1.0, 0.999, 0)]
)
@pytest.mark.parametrize("size", [9, 900])
def test_numbers_fall_on_tokens_by_their_shares(size: int, temperature: float, top_p: float, top_k: int) -> None:
    logits = 2 * torch.randn(size)
    shares = plain(logits, temperature, top_p, top_k)
    count = 1000
    options = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    drawn = torch.tensor([draw(logits, (at + 0.5) / count, **options) for at in range(count)])
    found = drawn.bincount(minlength=size) / count
    # Numbers that lie evenly miss the share of an interval by one at each of its ends.
    assert (found - shares).abs().max() <= 2 / count
    assert (drawn.diff() >= 0).all(), "tokens lie in the order of their ids"


def test_nothing_that_cannot_come_is_drawn() -> None:
    logits = torch.tensor([float("-inf"), 0.0, float("-inf"), 1.0, float("-inf")])
    for number in (0.0, 0.5, 1 - 2**-53):
        assert draw(logits, number, temperature=1.0) in (1, 3)
        assert draw(logits, number, temperature=1e-3) == 3
        assert draw(logits, number, temperature=1.0, top_p=1e-9) == 3
