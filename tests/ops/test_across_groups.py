"""PEFT's update of a convolution with groups, against the one kernel over all channels that it is."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import trimtab
from trimtab.ops.across_groups import squared_norms

GROUPS, RANK, INNER, OUTER, WIDTH = 2, 4, 6, 10, 3


def kernel(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``dV [out, channels, kernel]``, output by output: one of group j takes the ranks of group j."""
    ranks, outputs = RANK // GROUPS, OUTER // GROUPS
    rows = []
    for place in range(OUTER):
        group = place // outputs
        rows.append(scale * sum(b[place, one] * a[group * ranks + one] for one in range(ranks)))
    return torch.stack(rows).view(OUTER, INNER, WIDTH)


@pytest.mark.parametrize("magnitude", [False, True])
def test_it_is_a_convolution_of_all_channels_beside_the_grouped_one(magnitude: bool) -> None:
    layer = nn.Conv1d(INNER, OUTER, WIDTH, groups=GROUPS, padding=1, bias=False).double()
    weight = layer.weight.detach().clone()
    model = nn.Sequential(layer)
    rule = trimtab.Rule(match="*", method="lora", rank=RANK, alpha=2.8, across_groups=True, magnitude=magnitude)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trimtab.attach(model, rule)
    trained = {name.rpartition(".")[2]: one for name, one in trimtab.trainable_parameters(model).items()}
    for one in trained.values():
        one.data.add_(0.3 * torch.randn_like(one))
    x = torch.randn(2, INNER, 8, dtype=torch.float64, requires_grad=True)
    a, b = trained["A"], trained["B"]
    total = nn.functional.conv1d(x, weight, groups=GROUPS, padding=1)
    total = total + nn.functional.conv1d(x, kernel(a, b, 0.7), padding=1)
    if magnitude:
        norm = squared_norms(weight.flatten(1), weight.flatten(1).square().sum(1), a, b, 0.7).detach().sqrt()
        total = total * (trained["magnitude"] / norm)[:, None]
    found, upstream = model(x), torch.randn_like(total)
    torch.testing.assert_close(found, total)
    leaves = [x, *trained.values()]
    grads = [torch.autograd.grad(one, leaves, upstream) for one in (found, total)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
    (a_alone,) = torch.autograd.grad(model(x.detach()), a, upstream)
    torch.testing.assert_close(a_alone, grads[1][1 + list(trained).index("A")])


def test_the_norms_are_pefts() -> None:
    """Which multiplies B and A as if there were no groups, and lays the product into the weight's shape anew."""
    weight, a = torch.randn(OUTER, INNER // GROUPS * WIDTH), torch.randn(RANK, INNER * WIDTH)
    b = torch.randn(OUTER, RANK // GROUPS)
    product = b.double().reshape(OUTER // GROUPS, RANK) @ a.double()
    want = (weight.double() + 0.7 * product.reshape(weight.shape)).norm(dim=1).square()
    torch.testing.assert_close(squared_norms(weight, want, a, b, 0.7), want)
    assert squared_norms(weight, weight.square().sum(1), a, b, 0.7).dtype == torch.float32
