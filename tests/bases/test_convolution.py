"""Convolutions in one, two and three dimensions: what each method computes on one, whatever its stride, padding,
dilation and groups are, against the layer itself with the effective kernel in it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plain_formula
import sampling
import trimtab
from trimtab import bases

METHODS: list[dict[str, Any]] = [
    {"method": "lora", "rank": 2},
    {"method": "lora", "rank": 2, "compute": "factored"},
    {"method": "lora", "rank": 2, "compute": "folded"},
    {"method": "dora", "rank": 2},
    {"method": "dora", "rank": 2, "compute": "factored"},
    {"method": "dora", "rank": 0},
    {"method": "dora", "rank": 2, "magnitude_axis": "input"},
    {"method": "dora", "rank": 2, "detach_norm": False, "keep_product": True},
    {"method": "mora", "rank": 2},
    {"method": "mora", "rank": 2, "form": "sharing", "magnitude": True, "compute": "factored"},
    {"method": "lora", "rank": 2, "bias": True},
    {"method": "full", "magnitude": True},
]
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
# The layer and the places of an image for it.
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "1d, stride and zeros": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (9,)),
    "1d, depthwise, replicated": (lambda: nn.Conv1d(6, 6, 5, padding=2, groups=6, padding_mode="replicate"), (9,)),
    "1d, same, an even kernel": (lambda: nn.Conv1d(4, 6, 4, padding="same", bias=False), (9,)),
    "2d, uneven kernel": (lambda: nn.Conv2d(3, 6, (2, 3), stride=(1, 2), padding=(1, 0)), (5, 7)),
    "2d, pointwise": (lambda: nn.Conv2d(5, 6, 1, bias=False), (4, 4)),
    "2d, patches": (lambda: nn.Conv2d(3, 8, 4, stride=4), (8, 8)),
    "2d, dilated and same": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), (6, 5)),
    "2d, valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (6, 5)),
    "2d, groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2, stride=2), (6, 5)),
    "2d, circular": (lambda: nn.Conv2d(3, 6, 3, padding=(1, 2), padding_mode="circular"), (6, 5)),
    "2d, reflected": (lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect", groups=3), (6, 5)),
    "3d, patches": (lambda: nn.Conv3d(3, 8, (2, 3, 3), stride=(2, 3, 3)), (4, 6, 6)),
    "3d, groups": (lambda: nn.Conv3d(4, 6, 2, padding=1, groups=2, bias=False), (3, 4, 2)),
}
# Every second pair, as on a chessboard: each layer meets half of the methods, and each method half of the layers.
BOTH = [
    (kind, options)
    for row, kind in enumerate(LAYERS)
    for options in (METHODS if sampling.everything else METHODS[row % 2 :: 2])
]


def stir(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in trimtab.trainable_parameters(model).values():
            parameter.add_(0.1 * torch.rand_like(parameter))


def with_kernel(layer: Any, kernel: Tensor, bias: Tensor | None = None) -> Any:
    """What the layer gives with ``kernel`` and ``bias`` in place of its own."""
    own = {"weight": kernel.reshape(layer.weight.shape)} | ({} if bias is None else {"bias": bias})
    return lambda x: torch.func.functional_call(layer, own, (x,))


@pytest.mark.parametrize(("kind", "options"), BOTH, ids=str)
def test_outputs_and_gradients_are_those_of_the_effective_kernel(kind: str, options: dict[str, Any]) -> None:
    make, places = LAYERS[kind]
    layer = make().double()
    if "bias" in options and layer.bias is None:
        options = {**options, "bias": False}
    x = torch.randn(2, layer.in_channels, *places, dtype=torch.float64, requires_grad=True)
    model: Any = nn.Sequential(layer)
    start = model(x).detach()
    trimtab.attach(model, trimtab.Rule(match="0", **options))
    assert type(model[0].handle) is bases.find(layer).__class__
    torch.testing.assert_close(model(x), start, rtol=1e-12, atol=1e-12)
    stir(model)
    trained = trimtab.trainable_parameters(model)

    tensors = {name: value.detach().double().requires_grad_() for name, value in model[0].adapter.named_parameters()}
    weight = layer.weight.detach().flatten(1)
    total = weight + plain_formula.update(options["method"], options, tensors, weight)
    axis, detach = options.get("magnitude_axis", "output"), options.get("detach_norm", True)
    effective = plain_formula.effective(total, tensors.get("magnitude"), axis, detach)
    wanted = with_kernel(layer, effective, tensors.get("bias"))(x)
    got = model(x)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(wanted)
    found = torch.autograd.grad(got, [x, *trained.values()], upstream)
    for one, want in zip(found, torch.autograd.grad(wanted, [x, *tensors.values()], upstream), strict=True):
        torch.testing.assert_close(one, want, rtol=1e-9, atol=1e-9)

    with torch.no_grad():
        alone = model(x[0])  # without a batch
        torch.testing.assert_close(alone, wanted[0], rtol=1e-10, atol=1e-10)
    trimtab.merge(model)
    assert type(model[0]) is type(layer)
    torch.testing.assert_close(model(x), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LAYERS)
def test_step_zero_is_bit_for_bit_the_layer(kind: str, dtype: torch.dtype) -> None:
    make, places = LAYERS[kind]
    layer = make().to(dtype)
    x = torch.randn(2, layer.in_channels, *places).to(dtype)
    model: Any = nn.Sequential(layer)
    start = model(x)
    trimtab.attach(model, trimtab.Rule(match="0", method="lora", rank=2))
    assert torch.equal(model(x), start)


@pytest.mark.parametrize("kind", ["2d, uneven kernel", "2d, groups", "2d, circular", "2d, pointwise", "2d, reflected"])
@pytest.mark.parametrize("method", ["lora", "dora", "mora"])
def test_the_order_in_memory_is_that_of_the_bare_layer(kind: str, method: str) -> None:
    make, places = LAYERS[kind]
    layer = make().to(memory_format=torch.channels_last)
    model: Any = nn.Sequential(layer)
    x = torch.randn(2, layer.in_channels, *places)
    start = model(x)
    trimtab.attach(model, trimtab.Rule(match="0", method=method, rank=2))
    assert method == "dora" or torch.equal(model(x), start)
    stir(model)
    for form in (torch.channels_last, torch.contiguous_format):
        x = torch.randn(2, layer.in_channels, *places).contiguous(memory_format=form).requires_grad_()
        got, bare = model(x), layer(x)
        assert got.stride() == bare.stride()
        got.square().sum().backward()
        exact = torch.autograd.grad(with_kernel(layer, trimtab.effective_weight(model, "0"))(x).square().sum(), x)
        torch.testing.assert_close(x.grad, exact[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora", "mora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_updates_are_not_lost_in_half_precision(method: str, dtype: torch.dtype) -> None:
    layer = nn.Conv2d(6, 8, 3, padding=1).to(dtype)
    x = torch.randn(2, 6, 7, 7).to(dtype)
    model: Any = nn.Sequential(layer)
    trimtab.attach(model, trimtab.Rule(match="0", method=method, rank=2))
    stir(model)
    exact = with_kernel(copy.deepcopy(layer).double(), trimtab.effective_weight(model, "0").double())(x.double())
    eps = torch.finfo(dtype).eps
    assert float((model(x).detach().double() - exact).abs().max() / exact.abs().max()) <= 3 * eps


def test_autocast_is_that_of_the_bare_layer() -> None:
    layer = nn.Conv2d(6, 8, 3, padding=1)
    x = torch.randn(2, 6, 7, 7)
    model: Any = nn.Sequential(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        start = model(x)
        trimtab.attach(model, trimtab.Rule(match="0", method="lora", rank=2))
        assert torch.equal(model(x), start)
        stir(model)
        got = model(x)
    assert got.dtype == start.dtype == torch.bfloat16
    got.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in trimtab.trainable_parameters(model).values())


@pytest.mark.parametrize("kind", ["2d, uneven kernel", "2d, circular", "2d, groups"])
def test_dropout_takes_from_the_input_of_the_update(kind: str) -> None:
    make, places = LAYERS[kind]
    layer = make()
    x = torch.randn(2, layer.in_channels, *places)
    model: Any = nn.Sequential(layer)
    trimtab.attach(model, trimtab.Rule(match="0", method="dora", rank=2, dropout=0.5))
    stir(model)
    model.train()
    torch.manual_seed(1)
    got = model(x)
    torch.manual_seed(1)
    kept = trimtab.ops.dropout.dropout(x, 0.5)
    bare = copy.deepcopy(layer)
    bare.bias.data.zero_()
    adapter = model[0].adapter
    update = adapter.delta(torch.float32)
    ratio = (adapter.magnitude / (layer.weight.flatten(1) + update).norm(dim=1)).view(1, -1, 1, 1)
    wanted = (bare(x) + with_kernel(bare, update)(kept)) * ratio + layer.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


COMPILED = [
    (kind, training)
    for kind in ("2d, uneven kernel", "2d, groups", "1d, depthwise, replicated")
    for training in (True, False)
]


@pytest.mark.parametrize(
    ("kind", "training"), sampling.sample(COMPILED, len(COMPILED), [("1d, depthwise, replicated", True)])
)
def test_compiled_in_one_graph(kind: str, training: bool) -> None:
    make, places = LAYERS[kind]
    model: Any = nn.Sequential(make()).train(training)
    x = torch.randn(2, model[0].in_channels, *places, requires_grad=True)
    trimtab.attach(model, trimtab.Rule(match="0", method="dora", rank=2))
    stir(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    want, got = model(x), compiled(x)
    torch.testing.assert_close(got, want)
    parameters = [x, *trimtab.trainable_parameters(model).values()]
    upstream = torch.randn_like(want)
    for one, other in zip(
        torch.autograd.grad(got, parameters, upstream), torch.autograd.grad(want, parameters, upstream), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_an_output_may_be_changed_in_place() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True))
    trimtab.attach(model, trimtab.Rule(match="0", method="lora", rank=2))
    stir(model)
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    assert model[0].adapter.A.grad is not None


class Shifted(nn.Conv1d):
    """A causal convolution, as audio models have them: it pads on the left alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (self.kernel_size[0] - 1, 0)))


class Renamed(nn.Conv1d):
    """A convolution under another name."""


def test_derived_classes_are_asked_what_they_compute() -> None:
    assert bases.find(Shifted(3, 4, 3)) is None
    assert bases.find(nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 4, 3))) is None
    model: Any = nn.Sequential(Renamed(3, 4, 3, padding=1))
    trimtab.attach(model, trimtab.Rule(match="*", method="lora", rank=2))
    stir(model)
    x = torch.randn(2, 3, 8)
    want = with_kernel(model[0].base, trimtab.effective_weight(model, "0"))(x)
    torch.testing.assert_close(model(x), want)
    with pytest.raises(trimtab.PlanError, match=r"no base knows \(Shifted"):
        trimtab.attach(nn.Sequential(Shifted(3, 4, 3)), trimtab.Rule(match="0", method="lora", rank=2))


@pytest.mark.parametrize(
    ("layer", "places"),
    [
        (nn.Conv2d(6, 6, 7, padding=3, groups=6), (9, 8)),
        (nn.Conv2d(4, 12, (3, 2), stride=(2, 3), padding=(1, 0), groups=4), (8, 9)),
        (nn.Conv2d(4, 4, 3, dilation=2, stride=2, groups=4), (9, 10)),
        (nn.Conv1d(5, 10, 4, stride=3, groups=5), (13,)),
        (nn.Conv3d(3, 3, 2, padding=1, groups=3), (3, 4, 5)),
    ],
    ids=str,
)
def test_gradients_of_a_depthwise_kernel_are_torchs_own(layer: Any, places: tuple[int, ...]) -> None:
    x = torch.randn(3, layer.in_channels, *places)
    handle: Any = bases.find(layer)
    y = layer(x)
    upstream = torch.randn_like(y)
    (want,) = torch.autograd.grad(y, layer.weight, upstream)
    through = handle.through
    got = through.weight_gradient(through.product_gradient(upstream), through.rows(x), handle.shape)
    torch.testing.assert_close(got, want.flatten(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora", "mora"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_batch_of_no_images(kind: str, method: str) -> None:
    make, places = LAYERS[kind]
    model: Any = nn.Sequential(make())
    shape = model(torch.zeros(0, model[0].in_channels, *places)).shape
    trimtab.attach(model, trimtab.Rule(match="0", method=method, rank=2))
    x = torch.zeros(0, model[0].in_channels, *places, requires_grad=True)
    output = model(x)
    assert output.shape == shape
    output.sum().backward()
    for tensor in (x, *trimtab.trainable_parameters(model).values()):
        assert tensor.grad is not None
        assert not bool(tensor.grad.any())


@pytest.mark.parametrize("magnitude", [False, True])
def test_an_update_across_groups_reads_all_channels(magnitude: bool) -> None:
    """PEFT's: A as a convolution without groups, B as one with them. Its norm takes both as if there were none."""
    layer = nn.Conv2d(4, 6, 3, padding=1, groups=2).double()
    model: Any = nn.Sequential(layer)
    rule = trimtab.Rule(match="0", method="lora", rank=4, alpha=6, across_groups=True, magnitude=magnitude)
    trimtab.attach(model, rule)
    stir(model)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    tensors = [*trimtab.trainable_parameters(model).values()]
    own = {name: value.detach().clone().requires_grad_() for name, value in model[0].adapter.named_parameters()}
    inner = nn.functional.conv2d(x, own["A"].view(4, 4, 3, 3), padding=1)
    wanted = nn.functional.conv2d(x, layer.weight, padding=1, groups=2)
    wanted = wanted + 1.5 * nn.functional.conv2d(inner, own["B"].view(6, 2, 1, 1), groups=2)
    if magnitude:
        together = own["B"].reshape(3, 4) @ own["A"]
        norm = (layer.weight + 1.5 * together.view(6, 2, 3, 3)).flatten(1).norm(dim=1).detach()
        wanted = wanted * (own["magnitude"] / norm).view(6, 1, 1)
    wanted = wanted + layer.bias.view(6, 1, 1)
    torch.testing.assert_close(model(x), wanted, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(wanted)
    found = torch.autograd.grad(model(x), tensors, upstream)
    for one, want in zip(found, torch.autograd.grad(wanted, list(own.values()), upstream), strict=True):
        torch.testing.assert_close(one, want, rtol=1e-9, atol=1e-9)
    with pytest.raises(trimtab.SurgeryError, match=r"across the 2 groups of a convolution .* fits into no kernel"):
        trimtab.effective_weight(model, "0")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 3}, "rank 3 cannot be divided among 2 groups"),
        ({"compute": "folded"}, "no weight to be folded into"),
        ({"magnitude": True, "magnitude_axis": "input"}, "nor columns for magnitudes"),
    ],
    ids=str,
)
def test_what_an_update_across_groups_cannot_do_is_refused(options: dict[str, Any], words: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    with pytest.raises(trimtab.PlanError, match=words):
        trimtab.attach(model, trimtab.Rule(match="0", method="lora", across_groups=True, **{"rank": 2, **options}))
