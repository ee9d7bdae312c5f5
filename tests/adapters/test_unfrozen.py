"""What was unfrozen by hand after attach is in the adapter's folder and comes back with it, or is refused in words."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import trimtab
from sampling import sample

X = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(8))


class Cosines(nn.Module):
    """A kind of its own, with parameters in a list and one of no axis."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(8)), nn.Parameter(torch.tensor(0.5))])

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.cos(x * self.scales[0]) * self.scales[1]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.convolution = nn.Conv1d(3, 3, 3, padding=1)
        self.batches = nn.BatchNorm1d(3)
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.own = Cosines()
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
        self.shift = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.batches(self.convolution(self.first(x)))
        h, _ = self.recurrent(h)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.head(self.own(self.norm(h))) + self.shift


def train(model: nn.Module, steps: int = 3) -> nn.Module:
    """Steps in training mode, at a rate that changes everything that trains."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    model.train()
    for _ in range(steps):
        model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


UNFREEZE: dict[str, Callable[[Any], Any]] = {
    "a head of several layers": lambda net: net.head.requires_grad_(True),
    "a norm": lambda net: net.norm.requires_grad_(True),
    "a bias of a layer without an adapter": lambda net: net.head[2].bias.requires_grad_(True),
    "a convolution": lambda net: net.convolution.requires_grad_(True),
    "a batch norm": lambda net: net.batches.requires_grad_(True),
    "the scale of a batch norm": lambda net: net.batches.weight.requires_grad_(True),
    "nothing, but a batch norm has counted": lambda net: None,
    "a recurrent layer": lambda net: net.recurrent.requires_grad_(True),
    "a module of a kind that no base knows": lambda net: net.own.requires_grad_(True),
    "a number in a list": lambda net: net.own.scales[1].requires_grad_(True),
    "the bias of an adapted layer": lambda net: net.first.bias.requires_grad_(True),
    "attention": lambda net: net.attention.requires_grad_(True),
    "biases everywhere": lambda net: [
        parameter.requires_grad_(True)
        for name, parameter in net.named_parameters()
        if "bias" in name.rsplit(".", 1)[-1] and ".adapter" not in name
    ],
}


@pytest.mark.parametrize(("what", "method"), sample(list(itertools.product(UNFREEZE, ["lora", "dora", "mora"])), 2))
def test_what_was_unfrozen_comes_back(what: str, method: str, tmp_path: Path) -> None:
    base = Net()
    rule = trimtab.Rule(match="first", method=method, rank=2)
    model = copy.deepcopy(base)
    trimtab.attach(model, rule)
    UNFREEZE[what](model)
    right = train(model)(X).detach()
    trimtab.save_adapter(model, tmp_path)
    fresh = copy.deepcopy(base).eval()
    trimtab.load_adapter(fresh, tmp_path)
    assert torch.allclose(fresh(X), right, atol=1e-6)
    # The trained model is as it was, and takes its own folder again.
    assert torch.equal(model(X), right)
    trimtab.load_adapter(model, tmp_path)
    assert torch.allclose(model(X), right, atol=1e-6)
    # So does another one that was unfrozen in the same way, as training that is resumed.
    again = copy.deepcopy(base)
    trimtab.attach(again, rule)
    UNFREEZE[what](again)
    train(again, steps=1)
    trimtab.load_adapter(again, tmp_path)
    assert torch.allclose(again(X), right, atol=1e-6)
    trimtab.merge(fresh)
    assert torch.allclose(fresh(X), right, atol=1e-6)
    trimtab.merge(again)
    assert torch.allclose(again(X), right, atol=1e-6)


def test_what_is_loaded_is_saved_again(tmp_path: Path) -> None:
    base = Net()
    model = copy.deepcopy(base)
    trimtab.attach(model, trimtab.Rule(match="first", method="dora", rank=2))
    model.head.requires_grad_(True)
    model.first.bias.requires_grad_(True)
    right = train(model)(X).detach()
    trimtab.save_adapter(model, tmp_path / "one")
    for place, earlier in (("two", "one"), ("three", "two")):
        model = copy.deepcopy(base).eval()
        trimtab.load_adapter(model, tmp_path / earlier)
        trimtab.save_adapter(model, tmp_path / place)
        assert torch.allclose(model(X), right, atol=1e-6)


def test_a_copy_that_stands_for_the_module_is_all_there_is(tmp_path: Path) -> None:
    """Where method full trains a copy, the module's own tensors do nothing, whether frozen or not."""
    base = Net()
    model = copy.deepcopy(base)
    rules = [
        trimtab.Rule(match="head", method="full"),
        trimtab.Rule(match=["first", "norm"], method="full", tensors=["weight"]),
    ]
    trimtab.attach(model, rules)
    for module in (model.head, model.first, model.norm):  # of the last two the bias, and the weight's copy
        module.requires_grad_(True)
    right = train(model)(X).detach()
    trimtab.save_adapter(model, tmp_path)
    fresh = copy.deepcopy(base).eval()
    trimtab.load_adapter(fresh, tmp_path)
    assert torch.allclose(fresh(X), right, atol=1e-6)


@pytest.mark.parametrize(
    ("unfreeze", "name", "why"),
    [
        (lambda net: net.first.requires_grad_(True), r"first\.weight", "method lora on this module"),
        (lambda net: net.shift.requires_grad_(True), "shift", "it hangs on the model itself"),
    ],
)
def test_what_no_folder_can_say_is_refused(unfreeze: Callable[[Any], Any], name: str, why: str, tmp_path: Path) -> None:
    model = Net()
    trimtab.attach(model, trimtab.Rule(match="first", method="lora", rank=2))
    unfreeze(model)
    with pytest.raises(trimtab.AdapterError, match=f"{name} is trained or counted itself.*{why}.*trimtab.merge"):
        trimtab.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_embedding_beside_its_trained_rows_is_refused(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_llama()
    trimtab.attach(model, trimtab.Rule(match="*.embed_tokens", method="full", rows=[3, 5]))
    trimtab.save_adapter(model, tmp_path)
    model.model.embed_tokens.requires_grad_(True)
    with pytest.raises(trimtab.AdapterError, match=r"embed_tokens\.weight is trained or counted itself"):
        trimtab.save_adapter(model, tmp_path)


def test_another_head_than_the_stored_one_is_refused(tmp_path: Path) -> None:
    model = Net()
    rule = trimtab.Rule(match="first", method="lora", rank=2)
    trimtab.attach(model, rule)
    model.norm.requires_grad_(True)
    trimtab.save_adapter(model, tmp_path)
    frozen = Net()
    trimtab.attach(frozen, rule)
    with pytest.raises(trimtab.AdapterError, match="differ at 1 modules, such as norm"):
        trimtab.load_adapter(frozen, tmp_path)


def test_tied_weights_that_were_unfrozen_stay_tied(
    tiny_gpt2: Callable[..., Any], tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    for number, make in enumerate((tiny_gpt2, lambda: tiny_llama(tie_word_embeddings=True))):
        base = make()
        ids = torch.tensor([[1, 5, 3, 2]])
        model = copy.deepcopy(base)
        trimtab.attach(model, trimtab.Rule(match=["*.c_proj", "*.o_proj"], method="lora", rank=2))
        model.get_input_embeddings().requires_grad_(True)
        with torch.no_grad():
            for parameter in trimtab.trainable_parameters(model).values():
                parameter.add_(0.05 * torch.randn_like(parameter))
        right = model(ids).logits.detach()
        trimtab.save_adapter(model, tmp_path / str(number))
        fresh = copy.deepcopy(base)
        trimtab.load_adapter(fresh, tmp_path / str(number))
        assert torch.allclose(fresh(ids).logits, right, atol=1e-6)


def test_a_layer_of_transformers_own_kind_that_keeps_its_weight_the_other_way_round(
    tiny_gpt2: Callable[..., Any], tmp_path: Path
) -> None:
    base = tiny_gpt2()
    ids = torch.tensor([[1, 5, 3, 2]])

    def unfrozen() -> Any:
        model = copy.deepcopy(base)
        trimtab.attach(model, trimtab.Rule(match="*.c_attn", method="dora", rank=2))
        model.transformer.h[1].mlp.requires_grad_(True)
        model.transformer.ln_f.requires_grad_(True)
        return model

    model, again = unfrozen(), unfrozen()
    with torch.no_grad():
        for parameter in trimtab.trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    right = model(ids).logits.detach()
    trimtab.save_adapter(model, tmp_path)
    fresh = copy.deepcopy(base)
    for other in (fresh, again):
        trimtab.load_adapter(other, tmp_path)
        assert torch.allclose(other(ids).logits, right, atol=1e-6)


@pytest.mark.parametrize(
    "unfreeze",
    [
        lambda model: model.transformer.ln_f.requires_grad_(True),
        lambda model: [one.requires_grad_(True) for name, one in model.named_parameters() if name.endswith("bias")],
    ],
    ids=["a norm", "all biases"],
)
def test_peft_reads_it_too(unfreeze: Callable[[Any], Any], tiny_gpt2: Callable[..., Any], tmp_path: Path) -> None:
    from peft import PeftModel

    base = tiny_gpt2()
    ids = torch.tensor([[1, 5, 3, 2]])
    model = copy.deepcopy(base)
    trimtab.attach(model, trimtab.Rule(match="*.c_attn", method="lora", rank=2))
    unfreeze(model)
    with torch.no_grad():
        for parameter in trimtab.trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    trimtab.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.allclose(theirs(ids).logits, model(ids).logits, atol=1e-6)


def test_biases_beside_adapted_experts(tmp_path: Path) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "head_dim": 8, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    base = GptOssForCausalLM(GptOssConfig(**sizes, **heads)).eval()
    ids = torch.tensor([[1, 5, 3, 2]])

    def unfrozen() -> Any:
        model = copy.deepcopy(base)
        trimtab.attach(model, trimtab.Rule(match="*.experts", method="lora", rank=2))
        for name, parameter in model.named_parameters():
            if "bias" in name.rsplit(".", 1)[-1] or "sinks" in name:
                parameter.requires_grad_(True)
        return model

    model, again = unfrozen(), unfrozen()
    with torch.no_grad():
        for parameter in trimtab.trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    trimtab.save_adapter(model, tmp_path)
    for other in (copy.deepcopy(base), again):
        trimtab.load_adapter(other, tmp_path)
        assert torch.allclose(other(ids).logits, model(ids).logits, atol=1e-6)


def test_a_bias_of_two_modules(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = BertForMaskedLM(BertConfig(vocab_size=40, **sizes)).eval()
    ids = torch.tensor([[1, 5, 3, 2]])
    model = copy.deepcopy(base)
    trimtab.attach(model, trimtab.Rule(match="*.query", method="lora", rank=2))
    model.cls.predictions.bias.requires_grad_(True)  # that of the decoder, too
    with torch.no_grad():
        model.cls.predictions.bias.add_(torch.randn(40))
    trimtab.save_adapter(model, tmp_path)
    fresh = copy.deepcopy(base)
    trimtab.load_adapter(fresh, tmp_path)
    assert torch.allclose(fresh(ids).logits, model(ids).logits, atol=1e-6)


def test_the_bias_of_a_quantised_layer(tmp_path: Path) -> None:
    from trimtab.bases import find, quantise

    layers = []
    for _ in range(2):
        dense = find(nn.Linear(64, 64))
        assert dense is not None
        layers.append(quantise(dense, "int8"))
    base = nn.Sequential(*layers)
    model = copy.deepcopy(base)
    trimtab.attach(model, trimtab.Rule(match="0", method="lora", rank=2))
    model[0].bias.requires_grad_(True)  # type: ignore[union-attr]
    model[1].bias.requires_grad_(True)
    with torch.no_grad():
        for parameter in trimtab.trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(3, 64)
    trimtab.save_adapter(model, tmp_path)
    fresh = copy.deepcopy(base)
    trimtab.load_adapter(fresh, tmp_path)
    with torch.no_grad():
        assert torch.allclose(fresh[0](x), model[0](x), atol=1e-6)
        assert torch.allclose(fresh[1].bias, model[1].bias)


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A process group of this process alone; its meeting point is in memory."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def _sharded(model: nn.Module) -> nn.Module:
    sharded: nn.Module = fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return sharded


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("wrap", [DistributedDataParallel, _sharded], ids=["ddp", "fsdp2"])
def test_wrapped_models_save_it_too(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    base = Net()
    base.own.scales[1] = nn.Parameter(torch.ones(1))  # fully_shard takes no scalars
    rule = trimtab.Rule(match="head.0", method="dora", rank=2)

    def unfrozen() -> Any:
        model = copy.deepcopy(base)
        trimtab.attach(model, rule)
        model.norm.requires_grad_(True)
        model.head[2].requires_grad_(True)
        model.head[0].bias.requires_grad_(True)
        return model

    model = unfrozen()
    right = train(model)(X).detach()
    trimtab.save_adapter(wrap(model), tmp_path)
    again = unfrozen()
    trimtab.load_adapter(wrap(again), tmp_path)
    for other in (again, copy.deepcopy(base)):
        trimtab.load_adapter(other, tmp_path)
        assert torch.allclose(other.eval()(X), right, atol=1e-6)
