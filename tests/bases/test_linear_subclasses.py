"""Classes derived from ``nn.Linear``: those that compute what it computes are taken, and all others are told apart and
named, with the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrizations, prune
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledLinear

import trimtab
from contract_cases import stir
from trimtab import bases

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Named(nn.Linear):
    """A forward pass that is left as it is."""

    style = "plain"


class Counting(nn.Linear):
    """It keeps books on its calls in three ways."""

    def __init__(self, *features: int) -> None:
        super().__init__(*features)
        self.calls, self.shapes = 0, [()]
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.shapes.append(x.shape)  # type: ignore[arg-type]
        self.seen += 1
        return F.linear(x, self.weight, self.bias)


class Transposed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return (self.weight @ x.mT).mT + self.bias


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.03


class Dropping(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.2, self.training))


class Clipping(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-20, 20))


class Switched(nn.Linear):
    """It does nothing of its own until its buffer says so."""

    def __init__(self, *features: int) -> None:
        super().__init__(*features)
        self.register_buffer("on", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.relu() if self.on else y


class Bounded(nn.Linear):
    def __init__(self, *features: int) -> None:
        super().__init__(*features)
        self.register_buffer("most", torch.tensor(float("inf")))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(max=self.most)


class Apart(nn.Linear):
    """The bias is handed on beside the product, as some parallel layers do."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, self.weight), self.bias


class WithFactors(nn.Linear):
    """A low-rank layer of another library, at its start."""

    def __init__(self, *features: int) -> None:
        super().__init__(*features)
        self.down, self.up = nn.Parameter(torch.randn(2, 20)), nn.Parameter(torch.zeros(12, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.t() @ self.up.t()


class WithMask(nn.Linear):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x) * mask


class Rounding(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        step = self.weight.detach().abs().max() / 7
        return F.linear(x, (self.weight / step).round() * step, self.bias)


def with_function(function: Callable[[Tensor], Tensor]) -> nn.Linear:
    layer = nn.Linear(20, 12)
    own = layer.forward
    layer.forward = lambda x: function(own(x))  # type: ignore[method-assign]
    return layer


TAKEN: dict[str, Callable[[], nn.Linear]] = {
    "a class with a name of its own": lambda: Named(20, 12),
    "an output projection of attention": lambda: NonDynamicallyQuantizableLinear(20, 12),
    "Falcon": lambda: FalconLinear(20, 12),
    "Falcon without a bias": lambda: FalconLinear(20, 12, bias=False),
    "Idefics without additional features": lambda: IdeficsDecoupledLinear(20, 12),
    "counting": lambda: Counting(20, 12),
    "transposed": lambda: Transposed(20, 12),
    "a function around forward that changes nothing": lambda: with_function(lambda y: y),
}
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "Idefics": (lambda: IdeficsDecoupledLinear(20, 12, 2), "other parameters than weight and bias (additional_fc"),
    "DeepSeek's groups": (lambda: DeepseekV4GroupedLinear(20, 12, 2), "something else than x W^T"),
    "DeepSeek's group": (lambda: DeepseekV4GroupedLinear(20, 12, 1), "something else than x W^T"),
    "scaled": (lambda: Scaled(20, 12), "something else than x W^T"),
    "dropping": (lambda: Dropping(20, 12), "something else than x W^T + bias in training mode"),
    "clipping": (lambda: Clipping(20, 12), "something else than x W^T"),
    "switched": (lambda: Switched(20, 12), "depends on its buffer on"),
    "bounded": (lambda: Bounded(20, 12), "depends on its buffer most"),
    "apart": (lambda: Apart(20, 12), "gives a tuple"),
    "with factors": (lambda: WithFactors(20, 12), "other parameters than weight and bias (down, up)"),
    "with a mask": (lambda: WithMask(20, 12), "cannot be tried with a batch (TypeError"),
    "rounding": (lambda: Rounding(20, 12), "something else than x W^T"),
    "a function around forward": (lambda: with_function(torch.relu), "something else than x W^T"),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(20, 12)), "its weight is parametrised"),
    "an old weight norm": (lambda: torch.nn.utils.weight_norm(nn.Linear(20, 12)), "computed from weight_g, weight_v"),
    "an old spectral norm": (lambda: torch.nn.utils.spectral_norm(nn.Linear(20, 12)), "computed from weight_orig"),
    "pruned": (lambda: prune.random_unstructured(nn.Linear(20, 12), "weight", 0.5), "computed from weight_orig"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", TAKEN)
def test_what_computes_the_same_is_taken(kind: str, dtype: torch.dtype) -> None:
    layer = TAKEN[kind]().to(dtype)
    assert type(bases.find(layer)).__name__ == "LinearBase"


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", REFUSED)
def test_what_computes_something_else_is_not(kind: str, dtype: torch.dtype) -> None:
    make, reason = REFUSED[kind]
    layer = make().to(dtype)
    assert bases.find(layer) is None
    assert reason in bases.named(layer)
    assert bases.named(layer).startswith(type(layer).__name__)


@pytest.mark.parametrize("make", [Scaled, FalconLinear])
def test_a_weight_of_zeros_hides_nothing(make: type[nn.Linear]) -> None:
    layer = make(20, 12, bias=False)
    nn.init.zeros_(layer.weight)
    assert (bases.find(layer) is None) == (make is Scaled)


def test_a_trial_leaves_no_trace() -> None:
    layer = Counting(20, 12).train()
    layer.register_forward_hook(lambda *_: pytest.fail("a hook was called"))
    state, random = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    assert bases.find(layer) is not None
    assert (layer.calls, layer.shapes, layer.training) == (0, [()], True)
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    dropping, random = Dropping(20, 12), torch.get_rng_state()
    assert bases.find(dropping) is None
    assert torch.equal(torch.get_rng_state(), random)


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        assert bases.find(FalconLinear(20, 12)) is not None
        assert bases.find(Named(20, 12)) is not None
        assert bases.find(Scaled(20, 12)) is None
        counting = Counting(20, 12)
    assert "with buffers on the meta device it cannot be tried" in bases.named(counting)
    counting.to_empty(device="cpu")
    nn.init.normal_(counting.weight)
    assert bases.find(counting) is not None, "what was found on the meta device is not remembered"


@pytest.mark.parametrize("method", ["lora", "dora", "mora", "full"])
@pytest.mark.parametrize("kind", TAKEN)
def test_an_adapter_on_it(kind: str, method: str) -> None:
    layer = TAKEN[kind]().double()
    model = nn.Sequential(nn.Linear(7, 20), layer).double()
    x = torch.randn(5, 7, dtype=torch.float64)
    outputs, own = model(x), type(layer)
    options = {} if method == "full" else {"rank": 3}
    report = trimtab.attach(model, trimtab.Rule(match="all-linear", method=method, **options))
    assert [module.name for module in report.modules] == ["0", "1"]
    assert torch.allclose(model(x), outputs, atol=1e-12)
    stir(model)
    moved = model(x)
    assert not torch.allclose(moved, outputs, atol=1e-3)
    trimtab.merge(model)
    assert model[1] is layer
    assert type(layer) is own
    assert torch.allclose(model(x), moved, atol=1e-12)


def test_what_is_not_taken_is_named() -> None:
    model = nn.Sequential(
        nn.Linear(8, 20), Scaled(20, 12), torch.nn.utils.parametrizations.weight_norm(nn.Linear(12, 4))
    )
    report = trimtab.attach(model, trimtab.Rule(match="all-linear", method="lora", rank=2))
    assert [module.name for module in report.modules] == ["0"]
    scaled = "Scaled (its forward gives something else than x W^T + bias)"
    assert report.unreached[scaled] == 240
    assert any("parametrised" in kind for kind in report.unreached)
    trimtab.detach(model)
    with pytest.raises(trimtab.PlanError, match=r"Scaled \(its forward gives something else.*can be named: '1.weight'"):
        trimtab.attach(model, trimtab.Rule(match="1", method="lora", rank=2))


@pytest.mark.parametrize("kind", ["scaled", "clipping", "apart", "with factors", "rounding"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_weight_of_any_layer_is_adapted_by_its_own_name(kind: str, method: str) -> None:
    """Whatever the layer does with its weight, it reads the effective one."""
    model = nn.Sequential(REFUSED[kind][0]()).double()
    x = torch.randn(5, 20, dtype=torch.float64)
    before = model(x)
    report = trimtab.attach(model, trimtab.Rule(match="0.weight", method=method, rank=2))
    assert [module.name for module in report.modules] == ["0.weight"]
    torch.testing.assert_close(model(x), before)
    stir(model)
    outputs = model(x)
    (outputs[0] if isinstance(outputs, tuple) else outputs).square().sum().backward()
    assert all(parameter.grad is not None for parameter in trimtab.trainable_parameters(model).values())
    trimtab.merge(model)
    torch.testing.assert_close(model(x), outputs)
