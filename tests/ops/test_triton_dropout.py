"""Dropout inside of Triton's products, in the interpreter: what is kept is drawn as it should be, by every program the
same, and layers compute what they compute with a mask that was written down."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab
from trimtab.ops import kernels
from trimtab.ops.dropout import Keep, Seeded, draw_keep, dropout

pytest.importorskip("trimtab.ops.kernels.triton", reason="triton is not installed", exc_type=ImportError)
from trimtab.ops.kernels import triton_dropout as programs

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


def seed_of(number: int) -> Tensor:
    return torch.tensor([number * 0x9E3779B97F4A7C1 - 2**60])


def kept(seed: int, shape: tuple[int, ...], probability: float) -> Tensor:
    return programs.kept_of(torch.ones(shape), seed_of(seed), round(probability * 2**32)).double()


def test_elements_are_dropped_as_often_as_said_and_apart_from_each_other() -> None:
    rows, columns, p = 200, 300, 0.3
    found, other = kept(1, (rows, columns), p), kept(2, (rows, columns), p)
    deviations = (found - (1 - p)) / (p * (1 - p)) ** 0.5
    assert abs(float(deviations.mean())) < 5 / (rows * columns) ** 0.5
    # The sums of rows and of columns spread as those of draws apart from each other do: within five deviations.
    assert float(deviations.sum(0).abs().max()) < 5 * rows**0.5
    assert float(deviations.sum(1).abs().max()) < 5 * columns**0.5
    neighbours = [(deviations[:-1], deviations[1:]), (deviations[:, :-1], deviations[:, 1:])]
    neighbours += [(deviations[:, :-64], deviations[:, 64:]), (deviations, (other - (1 - p)) / (p * (1 - p)) ** 0.5)]
    for one, two in neighbours:
        assert abs(float((one * two).mean())) < 5 / one.numel() ** 0.5
    assert torch.equal(found, kept(1, (rows, columns), p))


@pytest.mark.parametrize(("probability", "threshold"), [(0.25, 2**30), (0.3, 1288490189), (1 - 2**-40, 2**32 - 1)])
def test_a_seed_is_drawn_with_its_threshold_and_its_scale(probability: float, threshold: int) -> None:
    with kernels.using("triton"):
        found = [draw_keep(torch.ones(3, 4), probability) for _ in range(400)]
    assert all(isinstance(one, Seeded) and one.threshold == threshold for one in found)
    assert found[0].scale == pytest.approx(2**32 / (2**32 - threshold))
    assert found[0].seed.shape == (1,)
    # Of a uniform draw from -1 to 1 the mean has a standard deviation of 0.029 here, that of the square 0.015.
    seeds = torch.cat([one.seed for one in found]).double() / 2**63
    assert abs(float(seeds.mean())) < 0.15
    assert float(seeds.square().mean()) == pytest.approx(1 / 3, abs=0.08)


@pytest.mark.parametrize("dtype", list(EPS), ids=str)
@pytest.mark.parametrize(("tokens", "features", "rank"), [(37, 150, 5), (1, 257, 16), (70, 128, 32)])
def test_every_program_drops_the_same(dtype: torch.dtype, tokens: int, features: int, rank: int) -> None:
    torch.manual_seed(0)
    x, a, h = (torch.randn(*shape).to(dtype) for shape in ((tokens, features), (rank, features), (tokens, rank)))
    drawn = seed_of(3), round(0.25 * 2**32)
    mask = programs.kept_of(torch.ones_like(x), *drawn).double()
    assert 0 < mask.mean() < 1
    d, tolerance = x.double() * mask, 4 * EPS[dtype]

    def close(found: Tensor, expected: Tensor) -> None:
        assert float((found.double() - expected).abs().max()) <= tolerance * float(expected.abs().max() + 1)

    assert torch.equal(programs.kept_of(x, *drawn).double(), d)
    close(programs.product(x, a, *drawn), d @ a.double().t())
    close(programs.weight_gradient(h, x, *drawn), h.double().t() @ d)
    target = torch.randn(tokens, features).to(dtype)
    expected = target.double() + mask * (h.double() @ a.double())
    programs.add_input_gradient(target, h, a, *drawn)
    close(target, expected)


def test_the_gradient_passes_where_the_value_did() -> None:
    x = torch.randn(20, 30, requires_grad=True)
    with kernels.using("triton"):
        y = dropout(x, 0.25)
    y.sum().backward()
    assert x.grad is not None
    assert 0 < float((y == 0).double().mean()) < 0.5
    assert torch.equal(x.grad == 0, y == 0)
    torch.testing.assert_close(y, x.detach() * x.grad)
    torch.testing.assert_close(x.grad[y != 0], torch.full_like(x.grad[y != 0], 1 / 0.75))


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("linear", {"method": "lora", "rank": 4}),
        ("linear", {"method": "dora", "rank": 4}),
        ("linear", {"method": "dora", "rank": 40}),
        ("linear", {"method": "mora", "rank": 4, "magnitude": True}),
        ("linear", {"method": "dora", "rank": 4, "magnitude_axis": "input"}),
        ("convolution", {"method": "dora", "rank": 4}),
    ],
    ids=str,
)
def test_a_layer_computes_what_it_does_with_a_mask_written_down(
    kind: str, rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    convolves = kind == "convolution"
    layer = nn.Conv1d(72, 100, 3, padding=1) if convolves else nn.Linear(72, 100)
    model = nn.Sequential(layer.double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trimtab.attach(model, trimtab.Rule(match="*", dropout=0.25, **rule))
    for parameter in trimtab.trainable_parameters(model).values():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    x, upstream = (torch.randn(2, 9, features, dtype=torch.float64) for features in (72, 100))
    if convolves:
        x, upstream = x.mT.contiguous(), upstream.mT.contiguous()
    drawn: list[Seeded] = []

    def draw(x: Tensor, probability: float) -> Seeded | Keep:
        if not drawn:
            found = draw_keep(x, probability)
            assert isinstance(found, Seeded)
            drawn.append(found)
            return found
        mask = programs.kept_of(torch.ones_like(x), drawn[0].seed, drawn[0].threshold)
        return Keep(mask.to(torch.int8).neg_(), drawn[0].scale)

    monkeypatch.setattr("trimtab.methods._weight.draw_keep", draw)

    def step() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        kept_bytes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            kept_bytes.append(tensor.numel() * tensor.element_size() * (tensor.dtype == torch.int8))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(leaf)
        assert bool(sum(kept_bytes)) == (kernels.kernels_for(x[0]) is kernels.plain)
        trained = list(trimtab.trainable_parameters(model).values())
        with kernels.using("plain"):  # another set, by then: the same is dropped all the same
            return [output.detach(), *torch.autograd.grad(output, [leaf, *trained], upstream)]

    with kernels.using("triton"):
        found = step()
    for one, other in zip(found, step(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
