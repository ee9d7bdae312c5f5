"""``nn.MultiheadAttention`` in the models that are built of it: their outputs and gradients are held against the bare
model with the effective weights, by the plain formula, in the places of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call

import plain_formula
import trimtab
from contract_cases import stir
from trimtab.surgery.adapted import adapted_modules

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "dora": {"rank": 3, "alpha": 5},
    "mora": {"rank": 2},
}


class ResidualAttention(nn.Module):
    """The block of CLIP's towers: pre-norm, attention with a mask, and an MLP in a sequence."""

    def __init__(self, width: int, heads: int, mask: Tensor | None) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        mask = None if self.mask is None else self.mask.to(x.dtype)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    """Tokens in, one vector out, as CLIP's text side."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(11, 12)
        self.positional_embedding = nn.Parameter(torch.randn(6, 12) / 4)
        mask = torch.full((6, 6), float("-inf")).triu(1)
        self.resblocks = nn.Sequential(*(ResidualAttention(12, 2, mask) for _ in range(2)))
        self.text_projection = nn.Parameter(torch.randn(12, 5) / 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.positional_embedding
        return self.resblocks(x.transpose(0, 1))[-1] @ self.text_projection


class WithWeights(nn.Module):
    """An attention that is asked for its weights, over padded keys, with a bias for keys and one more key of zeros."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.look = nn.MultiheadAttention(
            12, 3, batch_first=batch_first, add_bias_kv=True, add_zero_attn=True, kdim=7, vdim=9
        )
        self.keys, self.values = torch.randn(4, 4, 7), torch.randn(4, 4, 9)

    def forward(self, x: Tensor) -> Tensor:
        padded = torch.arange(4).expand(4, 4) > 2
        keys, values = self.keys.to(x.dtype), self.values.to(x.dtype)
        attended, weights = self.look(x, keys, values, key_padding_mask=padded, average_attn_weights=False)
        return torch.cat([attended.flatten(), weights.flatten()])


class Own(nn.MultiheadAttention):
    """A user's attention, without biases, that scales its query."""

    def forward(self, query: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(2 * query, query, query, need_weights=False)[0]


def sequences(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(8))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "an encoder layer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(12, 2, 20, dropout=0.0, batch_first=True)),
        lambda: (sequences(3, 5, 12),),
    ),
    "an encoder, pre-norm, by tokens first": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(12, 2, 20, dropout=0.0, norm_first=True), 2, enable_nested_tensor=False
        ),
        lambda: (sequences(5, 3, 12),),
    ),
    "a decoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(12, 2, 20, dropout=0.0, batch_first=True), 2),
        lambda: (sequences(3, 5, 12), sequences(3, 4, 12)),
    ),
    "a transformer": (
        lambda: nn.Transformer(12, 2, 1, 1, 20, dropout=0.0, batch_first=True, bias=False),
        lambda: (sequences(3, 5, 12), sequences(3, 4, 12)),
    ),
    "CLIP's tower": (Tower, lambda: (torch.arange(18).reshape(3, 6) % 11,)),
    "with weights, batch first": (lambda: WithWeights(True), lambda: (sequences(4, 5, 12),)),
    "with weights, tokens first": (lambda: WithWeights(False), lambda: (sequences(4, 4, 12),)),
    "a user's own": (lambda: nn.Sequential(Own(12, 4, bias=False, batch_first=True)), lambda: (sequences(2, 5, 12),)),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*API of nested tensors is in prototype stage:UserWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but self.use_nested_tensor is False:UserWarning"),
]
CASES = pytest.mark.parametrize("kind", MODELS)


def made(kind: str) -> nn.Module:
    torch.default_generator.manual_seed(6)
    model = MODELS[kind][0]().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)  # torch begins with biases of zero
    return model


def effective(model: nn.Module, bare: nn.Module, method: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every effective weight under the name of the bare weight; and what it is made of, by the names in ``model``."""
    weights, leaves = {}, {}
    place = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, module in adapted_modules(model):
        tensors = {key: value.detach().requires_grad_() for key, value in module.adapter.named_parameters()}
        key = name if name.endswith("_weight") else f"{name}.weight"
        frozen = bare.get_parameter(key).detach()
        total = frozen + plain_formula.update(method, METHODS[method], tensors, frozen)
        weights[key] = plain_formula.effective(total, tensors.get("magnitude"))
        leaves |= {place[id(value)]: tensors[name] for name, value in module.adapter.named_parameters()}
    return weights, leaves


@CASES
def test_all_linear_takes_every_projection(kind: str) -> None:
    model = made(kind)
    inputs = MODELS[kind][1]()
    before = model(*inputs)
    report = trimtab.attach(model, trimtab.Rule(match="all-linear", method="lora", rank=2))
    assert torch.equal(model(*inputs), before)
    assert not {"MultiheadAttention", "Own"} & report.unreached.keys()
    attentions = [name for name, module in made(kind).named_modules() if isinstance(module, nn.MultiheadAttention)]
    own = kind.startswith("with weights")
    held = ["q_proj_weight", "k_proj_weight", "v_proj_weight"] if own else ["in_proj_weight"]
    assert attentions
    for attention in attentions:
        assert [one.name for one in report.modules if one.name.startswith(f"{attention}.")] == [
            f"{attention}.{name}" for name in [*held, "out_proj"]
        ]


@CASES
@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_gradients(kind: str, method: str) -> None:
    model, bare = made(kind), made(kind)
    inputs = MODELS[kind][1]()
    trimtab.attach(model, trimtab.Rule(match="all-linear", method=method, **METHODS[method]))
    stir(model)
    weights, leaves = effective(model, bare, method)
    expected = functional_call(bare, weights, inputs)
    outputs = model(*inputs)
    assert torch.allclose(outputs, expected, atol=1e-11)
    assert not torch.allclose(outputs, bare(*inputs), atol=1e-3)
    sign = torch.randn_like(expected)
    (outputs * sign).sum().backward()
    (expected * sign).sum().backward()
    trained = trimtab.trainable_parameters(model)
    assert trained.keys() == leaves.keys()
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert torch.allclose(parameter.grad, leaves[name].grad, atol=1e-10), name


@CASES
def test_the_fused_paths_of_inference(kind: str) -> None:
    """In eval mode and without gradients torch computes an attention, or a whole encoder layer, in one function."""
    model, bare = made(kind), made(kind)
    inputs = MODELS[kind][1]()
    trimtab.attach(model, trimtab.Rule(match="all-linear", method="dora", **METHODS["dora"]))
    stir(model)
    weights, _ = effective(model, bare, "dora")
    expected = functional_call(bare, weights, inputs)
    model.eval()
    for context in (torch.no_grad, torch.inference_mode):
        with context(), trimtab.for_inference(model):
            assert torch.allclose(model(*inputs), expected, atol=1e-11)


def test_nested_tensors_of_an_encoder() -> None:
    """With padding, an encoder in inference packs its batch into a nested tensor."""

    def make() -> nn.TransformerEncoder:
        torch.default_generator.manual_seed(2)
        layer = nn.TransformerEncoderLayer(12, 2, 20, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 2).eval()

    model, bare = make(), make()
    x, padded = sequences(3, 5, 12).float(), torch.arange(5).expand(3, 5) > torch.tensor([[2], [4], [3]])
    trimtab.attach(model, trimtab.Rule(match="all-linear", method="lora", rank=2))
    stir(model)
    expected = model(x, src_key_padding_mask=padded)
    with torch.no_grad():
        got = model(x, src_key_padding_mask=padded)
        plain = bare(x, src_key_padding_mask=padded)
    kept = ~padded[:, : got.shape[1]]
    assert torch.allclose(got[kept], expected[:, : got.shape[1]][kept], atol=1e-5)
    assert not torch.allclose(got[kept], plain[kept], atol=1e-3)


@CASES
@pytest.mark.parametrize("method", METHODS)
def test_merged(kind: str, method: str) -> None:
    model = made(kind)
    names = list(model.state_dict())
    inputs = MODELS[kind][1]()
    trimtab.attach(model, trimtab.Rule(match="all-linear", method=method, **METHODS[method]))
    stir(model)
    outputs = model(*inputs)
    trimtab.merge(model)
    assert list(model.state_dict()) == names
    assert torch.allclose(model(*inputs), outputs, atol=1e-11)


def test_an_attention_alone_is_a_model() -> None:
    model = nn.MultiheadAttention(8, 2).double()
    x = sequences(3, 2, 8)
    before = model(x, x, x)[0]
    report = trimtab.attach(model, trimtab.Rule(match="all-linear", method="dora", rank=2))
    assert [module.name for module in report.modules] == ["in_proj_weight", "out_proj"]
    assert torch.allclose(model(x, x, x)[0], before, atol=1e-12)
    trimtab.detach(model)
    assert type(model) is nn.MultiheadAttention
    assert torch.equal(model(x, x, x)[0], before)


def test_training_brings_an_encoder_to_its_target() -> None:
    model = made("an encoder layer")
    (x,) = MODELS["an encoder layer"][1]()
    target = made("an encoder layer")
    with torch.no_grad():
        target[0].self_attn.in_proj_weight.add_(torch.randn(36, 1).double() @ torch.randn(1, 12).double() / 4)
    trimtab.attach(model, trimtab.Rule(match="*.in_proj_weight", method="lora", rank=2))
    optimiser = torch.optim.Adam(trimtab.trainable_parameters(model).values(), lr=0.02)
    losses = []
    for _ in range(150):
        loss = (model(x) - target(x).detach()).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 20


def test_under_autocast_and_in_half_precision() -> None:
    model = made("an encoder layer").float()
    (x,) = MODELS["an encoder layer"][1]()
    trimtab.attach(model, trimtab.Rule(match="all-linear", method="dora", rank=2))
    stir(model)
    expected = model(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(model(x.float()).float(), expected, atol=0.1)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert torch.allclose(half(x.bfloat16()).float(), expected, atol=0.2)


@pytest.mark.parametrize("method", ["serial", "parallel"])
def test_a_block_around_an_attention(method: str) -> None:
    model = made("an encoder layer")
    (x,) = MODELS["an encoder layer"][1]()
    before = model(x)
    report = trimtab.attach(model, trimtab.Rule(match="*.self_attn", method=method, bottleneck=3))
    assert [(module.name, module.out_features) for module in report.modules] == [("0.self_attn", 12)]
    assert torch.allclose(model(x), before, atol=1e-12)


def test_a_folder_of_peft_with_dropout_on_a_layer_that_is_only_read(tmp_path: Path) -> None:
    """PEFT's all-linear takes an attention's output projection for any other linear layer."""
    (x,) = MODELS["an encoder layer"][1]()
    config = LoraConfig(r=2, target_modules=["out_proj", "linear1"], lora_dropout=0.1)
    theirs = get_peft_model(made("an encoder layer"), config).double()
    stir_peft(theirs, "linear1")
    theirs.save_pretrained(tmp_path)
    model = made("an encoder layer").eval()
    report = trimtab.load_adapter(model, tmp_path)
    assert [module.name for module in report.modules] == ["0.self_attn.out_proj", "0.linear1"]
    with fast_path(False), torch.no_grad():
        assert torch.allclose(model(x), theirs.eval()(x), atol=1e-6)  # PEFT writes float32
    assert model[0].linear1.adapter.options.dropout == 0.1


def stir_peft(model: nn.Module, name: str) -> None:
    with torch.no_grad():
        for place, parameter in model.named_parameters():
            if parameter.requires_grad and name in place:
                parameter.add_(0.1 * torch.randn_like(parameter))


@contextmanager
def fast_path(on: bool) -> Iterator[None]:
    """PEFT's layers are not seen by torch's function for a whole encoder layer."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(on)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
