"""Code that reads ``layer.weight`` and does not call the layer: what it computes, and how the adapter trains."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

import trimtab
from sampling import sample
from trimtab.errors import SurgeryError
from trimtab.ops.read_weight import ReadWeight

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 2},
    "rank stabilised": {"method": "lora", "rank": 3, "rank_stabilised": True},
    "dora": {"method": "dora", "rank": 2},
    "dora, exact gradient": {"method": "dora", "rank": 2, "detach_norm": False},
    "dora of columns": {"method": "dora", "rank": 2, "magnitude_axis": "input"},
    "dora of columns, exact gradient": {
        **{"method": "dora", "rank": 2, "magnitude_axis": "input", "detach_norm": False},
    },
    "magnitude alone": {"method": "dora", "rank": 0},
    "mora": {"method": "mora", "rank": 2},
    "mora of magnitudes": {"method": "mora", "rank": 2, "magnitude": True},
    "full": {"method": "full"},
    "full of magnitudes": {"method": "full", "magnitude": True},
}
every_method = pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)


def adapted(options: dict[str, Any], dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.Sequential:
    """A layer of 6 -> 8 with an adapter that is no longer at its start."""
    model = nn.Sequential(nn.Linear(6, 8, bias=bias).to(dtype))
    trimtab.attach(model, trimtab.Rule(match="0", **options))
    with torch.no_grad():
        for parameter in model[0].adapter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def by_hand(layer: Any) -> Tensor:
    """The effective weight in terms of the layer's tensors, for autograd to differentiate."""
    adapter, options, weight = layer.adapter, layer.adapter.options, layer.base.weight.detach()
    names = dict(adapter.named_parameters())
    total = weight
    if "weight" in names:
        total = adapter.weight
    elif "M" in names:
        total = weight + adapter.delta(weight.dtype)
    elif "A" in names:
        total = weight + options.scale * adapter.B @ adapter.A
    if getattr(adapter, "magnitude", None) is None:
        return total
    along = 1 if options.magnitude_axis == "output" else 0
    norm = total.square().sum(along, keepdim=True).sqrt()
    return adapter.magnitude.unsqueeze(along) * total / (norm.detach() if options.detach_norm else norm)


def trained(layer: Any) -> list[nn.Parameter]:
    """What the weight is computed from."""
    return [parameter for name, parameter in layer.adapter.named_parameters() if name != "bias"]


def gradients(loss: Tensor, layer: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, trained(layer)))


TOKENS = torch.tensor([[1, 7, 2], [0, 0, 5]])
USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "F.linear": lambda w, x: F.linear(x, w),
    "F.linear with a bias": lambda w, x: F.linear(x, w, w[:, 0]),
    "@ of the transposed": lambda w, x: x @ w.t(),
    "mT": lambda w, x: x @ w.mT,
    "first in the product": lambda w, x: w @ x.t(),
    "einsum": lambda w, x: torch.einsum("ti,oi->to", x, w),
    "two in one": lambda w, x: F.linear(x, torch.cat([w, 2 * w])),
    "a list": lambda w, x: torch.stack([w, w.exp()]).sum(0) @ x.t(),
    "a look-up": lambda w, x: F.embedding(TOKENS, w),
    "a row": lambda w, x: x @ w[3],
    "rows": lambda w, x: w[2:5, ::2] * 3,
    "in pieces": lambda w, x: w.chunk(3)[1].relu() + w.split([2, 6])[0].sum(),
    "another shape": lambda w, x: w.view(2, 4, 6).permute(1, 0, 2).reshape(4, 12),
    "a convolution": lambda w, x: F.conv1d(x.t().unsqueeze(0), w.unsqueeze(-1)),
    "copied": lambda w, x: torch.zeros(8, 6, dtype=w.dtype).copy_(w),
    "cloned": lambda w, x: w.clone().mul_(2),
    "in another dtype": lambda w, x: w.to(torch.float32).double(),
    "a norm": lambda w, x: F.normalize(w, dim=-1),
}


@pytest.mark.parametrize(("method", "name"), sample([(method, use) for use in USES for method in METHODS], 2))
def test_a_weight_that_is_read_has_the_value_and_the_gradient_of_the_formula(method: str, name: str) -> None:
    layer, use = adapted(METHODS[method])[0], USES[name]
    x = torch.randn(5, 6, dtype=torch.float64)
    got, want = use(layer.weight, x), use(by_hand(layer), x)
    assert type(got) is not nn.Parameter
    assert torch.allclose(got, want, rtol=1e-6 if use is USES["in another dtype"] else 1e-12, atol=1e-12)
    upstream = torch.randn_like(want)
    found = gradients((got * upstream).sum(), layer)
    for one, other in zip(found, gradients((want * upstream).sum(), layer), strict=True):
        assert torch.allclose(one, other, rtol=1e-5 if use is USES["in another dtype"] else 1e-11, atol=1e-11)


@every_method
def test_reading_gives_what_calling_gives(options: dict[str, Any]) -> None:
    layer = adapted(options)[0]
    x = torch.randn(5, 6, dtype=torch.float64)
    upstream = torch.randn(5, 8, dtype=torch.float64)
    called, read = layer(x), F.linear(x, layer.weight, layer.bias)
    assert torch.allclose(called, read, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        gradients((called * upstream).sum(), layer), gradients((read * upstream).sum(), layer), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["lora", "dora, exact gradient", "dora of columns, exact gradient", "mora", "full"])
def test_the_gradient_is_what_differences_say(name: str) -> None:
    layer = adapted(METHODS[name])[0]
    x = torch.randn(5, 6, dtype=torch.float64)

    def loss() -> Tensor:
        return torch.tanh(F.linear(x, layer.weight)).square().sum()

    for parameter, gradient in zip(trained(layer), gradients(loss(), layer), strict=True):
        direction, values = torch.randn_like(parameter), []
        with torch.no_grad():
            for step in (1e-6, -1e-6):
                parameter.add_(direction, alpha=step)
                values.append(float(loss()))
                parameter.sub_(direction, alpha=step)
        assert abs((values[0] - values[1]) / 2e-6 - float((gradient * direction).sum())) < 1e-7


def test_one_look_computes_the_weight_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = adapted(METHODS["dora"])[0]
    calls: list[int] = []
    own = layer.adapter.acting_weight
    monkeypatch.setattr(layer.adapter, "acting_weight", lambda handle: calls.append(1) or own(handle))
    weight = layer.weight
    looked = (weight.dtype, weight.device, weight.shape, weight.ndim, weight.dim(), weight.size(), weight.numel())
    assert looked == (torch.float64, torch.device("cpu"), (8, 6), 2, 2, (8, 6), 48)
    assert (weight.is_cuda, weight.layout, weight.requires_grad, weight.stride()) == (
        False,
        torch.strided,
        True,
        (6, 1),
    )
    assert (weight.is_contiguous(), weight.element_size(), weight.is_floating_point(), len(weight)) == (
        True,
        8,
        True,
        8,
    )
    assert weight.data.dtype == weight.detach().dtype == torch.float64
    assert isinstance(weight, Tensor)
    assert not calls, "a look at what the weight is computes nothing"
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        F.linear(x, weight), weight.sum(), weight.t() @ weight
    assert len(calls) == 1, "however much is done with it"


def test_the_weight_asks_for_a_gradient_as_long_as_something_of_it_is_trained() -> None:
    layer = adapted(METHODS["lora"])[0]
    with torch.no_grad():
        assert layer.weight.requires_grad, "as a parameter does, where gradients are off"
        assert not F.linear(torch.randn(2, 6).double(), layer.weight).requires_grad
    assert not layer.weight.detach().requires_grad
    assert not layer.weight.data.requires_grad
    layer.weight.requires_grad_(False)  # it is frozen already
    assert layer.weight.requires_grad
    layer.adapter.requires_grad_(False)
    assert not layer.weight.requires_grad
    assert not (layer.weight * 2).requires_grad
    with pytest.raises(trimtab.SurgeryError, match="asking for its gradient would have no effect"):
        layer.weight.requires_grad = True


WRITES: dict[str, Callable[[Any], Any]] = {
    "mul_": lambda layer: layer.weight.mul_(2),
    "a row": lambda layer: layer.weight.__setitem__(1, 0.0),
    "a view": lambda layer: layer.weight.t()[0].zero_(),
    "a piece": lambda layer: layer.weight.detach().chunk(2)[0].fill_(1),
    "data": lambda layer: layer.weight.data.mul_(2),
    "rows of data": lambda layer: layer.weight.data.__setitem__(slice(2), 1.0),
    "detached": lambda layer: layer.weight.detach().view(-1).add_(1),
    "copy_": lambda layer: layer.weight.copy_(torch.zeros(8, 6)),
    "init": lambda layer: nn.init.normal_(layer.weight),
    "out": lambda layer: torch.mul(torch.ones(8, 6).double(), 2, out=layer.weight.data),
    "foreach": lambda layer: torch._foreach_mul_([layer.weight.data], 2.0),
    "a hook": lambda layer: layer.weight.register_hook(lambda grad: grad),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writing_to_it_is_refused(write: Callable[[Any], Any]) -> None:
    layer = adapted(METHODS["dora"])[0]
    before = trimtab.effective_weight(nn.Sequential(layer), "0")
    with pytest.raises(
        trimtab.SurgeryError, match=r"would have no effect. Change the frozen weight \(layer.base.weight"
    ):
        write(layer)
    assert torch.equal(trimtab.effective_weight(nn.Sequential(layer), "0"), before)


def test_what_is_made_of_it_can_be_written_to() -> None:
    layer = adapted(METHODS["lora"])[0]
    copied = layer.weight.clone()
    copied[0] = 0
    assert not copied[0].any()
    array = layer.weight.detach().numpy()
    assert array.shape == (8, 6)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0
    assert layer.weight.tolist()[0] == array[0].tolist()


def test_it_is_copied_pickled_and_printed_as_numbers() -> None:
    layer = adapted(METHODS["dora"])[0]
    want = trimtab.effective_weight(nn.Sequential(layer), "0")
    for other in (copy.deepcopy(layer.weight), pickle.loads(pickle.dumps(layer.weight))):
        assert type(other) is Tensor
        assert torch.equal(other, want)
    assert repr(layer.weight) == repr(want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_under_autocast_and_in_half_precision_the_gradient_arrives(dtype: torch.dtype) -> None:
    layer = adapted(METHODS["dora"], dtype)[0]
    x = torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(F.linear(x, layer.weight).float().square().sum(), layer)
        want = gradients(F.linear(x, by_hand(layer).to(dtype)).float().square().sum(), layer)
    for one, other in zip(found, want, strict=True):
        assert torch.allclose(one, other, rtol=0.02, atol=0.02 * float(other.abs().max()))


def test_under_checkpointing_the_gradient_arrives() -> None:
    layer = adapted(METHODS["dora"])[0]
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)

    def part(x: Tensor) -> Tensor:
        return F.linear(x, layer.weight, layer.bias).tanh()

    want = gradients(part(x).square().sum(), layer)
    for reentrant in (False, True):
        found = gradients_of_backward(checkpoint(part, x, use_reentrant=reentrant).square().sum(), layer)
        assert all(torch.allclose(one, other) for one, other in zip(found, want, strict=True))


def gradients_of_backward(loss: Tensor, layer: Any) -> list[Tensor]:
    layer.zero_grad()
    loss.backward()
    return [parameter.grad for parameter in layer.adapter.parameters()]


def test_a_function_of_autograd_passes_the_gradient_on() -> None:
    """Fused layers of state-space models are such functions, and take the weight as an argument."""

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return x @ weight.t()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            x, weight = ctx.saved_tensors
            return grad @ weight, grad.t() @ x

    layer = adapted(METHODS["dora"])[0]
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    found = gradients(Fused.apply(x, layer.weight).square().sum(), layer)
    want = gradients((x @ by_hand(layer).t()).square().sum(), layer)
    assert all(torch.allclose(one, other, rtol=1e-11) for one, other in zip(found, want, strict=True))


def test_backward_may_be_called_twice_and_a_change_in_between_is_noticed() -> None:
    layer = adapted(METHODS["dora"])[0]
    loss = layer.weight.square().sum()
    first = torch.autograd.grad(loss, list(layer.adapter.parameters()), retain_graph=True)
    again = torch.autograd.grad(loss, list(layer.adapter.parameters()), retain_graph=True)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    with torch.no_grad():
        layer.adapter.A.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Reader(nn.Module):
    """A model that reads the weights of two layers, as fused projections do, and calls neither."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.cat([self.one.weight, self.two.weight])
        return F.linear(x, weight, torch.cat([self.one.bias, self.two.bias]))


@pytest.mark.parametrize("method", sample(list(METHODS), len(METHODS), ["dora, exact gradient", "mora of magnitudes"]))
def test_compiled_in_one_piece_it_is_the_same(method: str) -> None:
    model = Reader()
    trimtab.attach(model, trimtab.Rule(match="*", **METHODS[method]))
    x = torch.randn(5, 6)
    want = model(x)
    grads = torch.autograd.grad(
        want.square().sum(), [one for name, one in model.named_parameters() if one.requires_grad]
    )
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(x)
    found = torch.autograd.grad(
        got.square().sum(), [one for name, one in model.named_parameters() if one.requires_grad]
    )
    assert torch.allclose(got, want, atol=1e-5)
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(found, grads, strict=True))


def test_functional_call_reads_the_tensors_that_it_is_given() -> None:
    model = Reader().double()
    trimtab.attach(model, trimtab.Rule(match="*", method="dora", rank=2))
    x = torch.randn(5, 6, dtype=torch.float64)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    given = {name: parameter.detach().requires_grad_() for name, parameter in other.named_parameters()}
    got = torch.func.functional_call(model, given, (x,))
    assert torch.allclose(got, other(x), rtol=1e-12)
    trained = [name for name in given if ".adapter." in name]
    found = torch.autograd.grad(got.square().sum(), [given[name] for name in trained])
    want = torch.autograd.grad(other(x).square().sum(), [dict(other.named_parameters())[name] for name in trained])
    assert all(torch.allclose(one, it, rtol=1e-10) for one, it in zip(found, want, strict=True))


def test_a_copy_of_the_model_reads_its_own_tensors() -> None:
    model = nn.Sequential(adapted(METHODS["dora"])[0])
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].adapter.B.add_(1)
        other[0].base.weight.add_(1)
    assert torch.equal(other[0].weight, trimtab.effective_weight(other, "0"))
    assert torch.equal(model[0].weight, trimtab.effective_weight(model, "0"))
    assert not torch.equal(model[0].weight, other[0].weight)


@pytest.mark.parametrize("kind", ["int8", "nf4", "torchao_int8"])
@pytest.mark.parametrize("options", [METHODS["lora"], METHODS["dora"]], ids=["lora", "dora"])
def test_on_a_quantised_weight_the_gradient_arrives(kind: str, options: dict[str, Any]) -> None:
    from trimtab import bases

    base = bases.find(nn.Linear(64, 16))
    assert base is not None
    model = nn.Sequential(bases.quantise(base, kind))
    trimtab.attach(model, trimtab.Rule(match="0", **options))
    layer: Any = model[0]
    with torch.no_grad():
        layer.adapter.B.normal_()
    x, upstream = torch.randn(5, 64), torch.randn(5, 16)
    assert layer.weight.shape == (16, 64)
    found = gradients((F.linear(x, layer.weight, layer.bias) * upstream).sum(), layer)
    want = gradients((layer(x) * upstream).sum(), layer)
    assert all(torch.allclose(one, other, rtol=1e-3, atol=1e-3) for one, other in zip(found, want, strict=True))


def test_a_row_of_zeros_gives_no_gradient_that_is_not_a_number() -> None:
    for options in ({"method": "dora", "rank": 2}, {"method": "dora", "rank": 2, "detach_norm": False}):
        model = nn.Sequential(nn.Linear(6, 8).double())
        with torch.no_grad():
            model[0].weight[3] = 0
        trimtab.attach(model, trimtab.Rule(match="0", **options))
        for gradient in gradients(model[0].weight.square().sum() + model[0].weight.sum(), model[0]):
            assert bool(gradient.isfinite().all())


def test_other_attributes_are_the_frozen_layers() -> None:
    layer = nn.Linear(6, 8)
    layer.scaling = 0.5  # type: ignore[assignment]
    model = nn.Sequential(layer)
    trimtab.attach(model, trimtab.Rule(match="0", method="lora", rank=2))
    adapted_layer: Any = model[0]
    assert (adapted_layer.in_features, adapted_layer.out_features, adapted_layer.scaling) == (6, 8, 0.5)
    assert adapted_layer.bias is layer.bias
    adapted_layer.scaling = 2.0
    assert layer.scaling == 2.0
    with pytest.raises(AttributeError, match="'Linear' object has no attribute 'padding_idx'"):
        _ = adapted_layer.padding_idx


def test_an_assigned_weight_is_the_frozen_one() -> None:
    model = nn.Sequential(nn.Linear(6, 8))
    trimtab.attach(model, trimtab.Rule(match="0", method="dora", rank=2))
    layer: Any = model[0]
    with torch.no_grad():
        layer.adapter.B.normal_()
    x = torch.randn(5, 6)
    for tensor in (torch.randn(8, 6), torch.randn(8, 6)):
        layer.weight = nn.Parameter(tensor, requires_grad=False)
        assert layer.base.weight is not tensor
        assert torch.equal(layer.base.weight, tensor)
        assert torch.allclose(layer(x), F.linear(x, trimtab.effective_weight(model, "0"), layer.bias), atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_weight_that_may_have_the_adapter_in_it_is_not_assigned_in_silence(method: str) -> None:
    """What torch.nn.utils.fusion does to a layer and the batch norm behind it would have the adapter act twice."""
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        for tensor in (norm.running_mean, norm.running_var, norm.weight):
            assert tensor is not None
            tensor.uniform_(0.5, 2)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm).eval()
    trimtab.attach(model, trimtab.Rule(match="0", method=method, rank=2))
    with torch.no_grad():
        for parameter in trimtab.trainable_parameters(model).values():
            parameter.add_(0.1 * torch.rand_like(parameter))
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    with pytest.warns(trimtab.TrimtabWarning, match=r"Conv2d \[4, 3, 3, 3\].*acts twice: call trimtab.merge before"):
        fuse_conv_bn_eval(model[0], model[1])
    trimtab.merge(model)
    torch.testing.assert_close(fuse_conv_bn_eval(model[0], model[1])(x), expected, rtol=1e-4, atol=1e-5)


def test_a_tensor_that_is_trained_whole_is_not_replaced() -> None:
    model: Any = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    trimtab.attach(model, trimtab.Rule(match="0", method="full"))
    with pytest.raises(
        trimtab.SurgeryError, match="the weight of this LayerNorm is trained by an adapter of method full"
    ):
        model[0].weight = nn.Parameter(torch.ones(4))


def test_a_weight_that_asks_for_a_gradient_under_an_adapter_is_told_of() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4))
    trimtab.attach(model, trimtab.Rule(match="0", method="lora", rank=2))
    model.requires_grad_(True)
    with torch.no_grad():
        model(torch.randn(2, 4))
    with pytest.warns(
        trimtab.TrimtabWarning, match=r"Linear \[4, 4\] under an adapter of method lora.*gets none"
    ) as told:
        model(torch.randn(2, 4)), model(torch.randn(2, 4))
    assert len(told) == 1


def test_a_stand_in_is_a_tensor_of_its_own_kind() -> None:
    assert isinstance(adapted(METHODS["lora"])[0].weight, ReadWeight)


@every_method
def test_what_would_keep_the_weight_among_the_layers_own_is_refused_and_nothing_changes(
    options: dict[str, Any],
) -> None:
    model = adapted(options)
    x, names = torch.randn(3, 6, dtype=torch.float64), list(model.state_dict())
    before = model(x)
    with pytest.raises(SurgeryError, match=r"cannot hold its weight as weight_orig: .* Call trimtab\.merge before"):
        prune.l1_unstructured(model[0], "weight", amount=0.5)
    assert list(model.state_dict()) == names
    assert model(x).equal(before)
    model[0].scale = nn.Parameter(torch.ones(1))  # what is no weight of its own may be added
    assert model[0].scale.requires_grad
