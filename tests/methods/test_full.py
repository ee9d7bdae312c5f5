"""Full fine-tuning as a method: a copy in full digits, the base untouched until the merge."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab
from adapter_tools import forge
from contract_cases import stir
from trimtab.surgery.attach import trained_tensors


def test_small_steps_on_a_bfloat16_base_add_up() -> None:
    """A thousand steps of a thousandth of a unit: bfloat16 would lose each one of them."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False).bfloat16())
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    trimtab.attach(model, trimtab.Rule(match="0", method="full"))
    weight = model[0].adapter.weight
    assert weight.dtype == torch.float32
    step = 2.0**-7 / 1000
    optimiser = torch.optim.SGD([weight], lr=step)
    for _ in range(1000):
        weight.grad = -torch.ones_like(weight)
        optimiser.step()
    assert torch.equal(model[0].base.weight, torch.ones(3, 4, dtype=torch.bfloat16)), "the base stays as it was"
    trimtab.merge(model)
    assert torch.equal(model[0].weight, torch.full((3, 4), 1 + 2.0**-7, dtype=torch.bfloat16))


def test_it_counts_all_of_the_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    report = trimtab.attach(model, trimtab.Rule(match="0", method="full", magnitude=True))
    assert report.trainable_parameters == 12 + 3 + 3
    assert report.total_parameters == 12 + 3
    trimtab.detach(model)
    assert model[0].weight.requires_grad


class Polynomial(nn.Module):
    """A module of a model's own: a number, a vector, two matrices in a list, and a layer inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.options = nn.Parameter(torch.tensor(0.7))  # a name that an adapter has, too
        self.shift = nn.Parameter(torch.randn(width))
        self.powers = nn.ParameterList([torch.randn(3, width), torch.randn(3, width)])
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor, *, sharpness: float = 1.0) -> Tensor:
        terms = (x @ power.t() @ power for power in self.powers)
        return self.inner(sum(terms, x)) * self.options * sharpness + self.shift


class Zoo(nn.Module):
    """Every kind of module that has tensors in a way of its own."""

    def __init__(self, width: int = 4, tokens: int = 11) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, width, padding_idx=3)
        self.norm = nn.LayerNorm(width)
        self.rms = nn.RMSNorm(width)
        self.batch = nn.BatchNorm1d(width)
        self.polynomial = Polynomial(width)
        self.recurrent = nn.GRU(width, width, batch_first=True)
        self.convolution = nn.Conv1d(width, width, 3, padding=1, groups=2)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(width, width))
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, tokens))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.polynomial(self.rms(self.norm(self.embed(ids))), sharpness=0.5)
        x = self.batch(x.transpose(1, 2))
        x = self.recurrent(self.convolution(x).transpose(1, 2))[0]
        x = self.normed(x)
        return self.head(self.attention(x, x, x)[0])


def steps(model: nn.Module, ids: Tensor, count: int = 3) -> None:
    optimiser = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.05)
    for _ in range(count):
        model(ids).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()


PARTS = [
    "embed",
    "norm",
    "rms",
    "batch",
    "polynomial",
    "recurrent",
    "convolution",
    "normed",
    "attention",
    "head",
    "*",
]


@pytest.mark.parametrize("part", PARTS)
def test_any_module_trains_as_it_would_by_itself(part: str, tmp_path: Path) -> None:
    """Against the same steps of the bare model with these parameters unfrozen; and saved, loaded, merged, detached."""
    torch.manual_seed(0)
    bare = Zoo().double()
    ids = torch.randint(0, 11, (3, 5))
    model, reference = copy.deepcopy(bare), copy.deepcopy(bare)
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_(part == "*" or name.startswith(f"{part}."))
    report = trimtab.attach(model, trimtab.Rule(match=part, method="full"))
    wanted = sum(parameter.numel() for parameter in reference.parameters() if parameter.requires_grad)
    assert report.trainable_parameters == wanted
    steps(model, ids)
    steps(reference, ids)
    model.eval()
    reference.eval()
    if part not in ("*", "batch"):  # whose statistics are the base's own, which the copy keeps apart
        model.batch.load_state_dict(reference.batch.state_dict())
    trained = model(ids)
    torch.testing.assert_close(trained, reference(ids), rtol=1e-12, atol=1e-12)

    trimtab.save_adapter(model, tmp_path)
    again = copy.deepcopy(bare).eval()
    again.batch.load_state_dict(reference.batch.state_dict())
    trimtab.load_adapter(again, tmp_path)
    torch.testing.assert_close(again(ids), trained, rtol=1e-12, atol=1e-12)
    trimtab.merge(model)
    torch.testing.assert_close(model(ids), trained, rtol=1e-12, atol=1e-12)
    for (name, value), (other, expected) in zip(
        model.state_dict().items(), reference.state_dict().items(), strict=True
    ):
        assert name == other
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    trimtab.detach(again)
    again.batch.load_state_dict(bare.batch.state_dict())
    for name, value in bare.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert trimtab.trainable_parameters(again).keys() == trimtab.trainable_parameters(bare).keys()


def test_an_adapter_of_before_has_the_weight_alone(tiny_gpt2: Callable[..., nn.Module], tmp_path: Path) -> None:
    """Before `tensors` was an option, the weight of a layer was trained, and its bias was not."""
    bare = tiny_gpt2()
    model = copy.deepcopy(bare)
    trimtab.attach(model, trimtab.Rule(match="*.c_fc", method="full", tensors=["weight"]))
    stir(model)
    trimtab.save_adapter(model, tmp_path)

    def as_before(modules: dict[str, Any]) -> None:
        for entry in modules.values():
            for option in ("tensors", "rows", "bias"):
                del entry["options"][option]

    forge(tmp_path, as_before)
    again = copy.deepcopy(bare)
    report = trimtab.load_adapter(again, tmp_path)
    assert report.rules[0].options.tensors == ("weight",)
    ids = torch.randint(0, 40, (2, 6))
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("match", ["lm_head", "*.embed_tokens", ["lm_head", "*.embed_tokens"]])
def test_a_tied_weight(match: Any, tiny_llama: Callable[..., nn.Module], tmp_path: Path) -> None:
    """One rule for both keeps the tie; a rule for one of them unties it, and the merge says so."""
    model: Any = tiny_llama(tie_word_embeddings=True)
    bare = copy.deepcopy(model)
    report = trimtab.attach(model, trimtab.Rule(match=match, method="full"))
    assert report.trainable_parameters == 40 * 16
    stir(model)
    ids = torch.randint(0, 40, (2, 6))
    wanted = model(ids).logits
    trimtab.save_adapter(model, tmp_path / "adapter")
    trimtab.load_adapter(bare, tmp_path / "adapter")
    assert torch.equal(bare(ids).logits, wanted)
    untied = trimtab.merge(model).untied
    assert bool(untied) == isinstance(match, str)
    torch.testing.assert_close(model(ids).logits, wanted)
    model.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(type(model).from_pretrained(tmp_path / "merged")(ids).logits, wanted)


def test_a_magnitude_and_the_tensors_that_it_goes_with() -> None:
    """By itself a magnitude decomposes nothing, and a tensor that the layer has not is named."""
    layer = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3, bias=False))
    trimtab.attach(layer, trimtab.Rule(match="0", method="full", magnitude=True, tensors=["weight", "bias"]))
    assert {name for name, _ in layer[0].adapter.named_parameters()} == {"weight", "bias", "magnitude"}
    with pytest.raises(trimtab.PlanError, match=r"no tensor 'bias'; a Linear has weight$"):
        trimtab.attach(
            nn.Sequential(nn.Linear(3, 3, bias=False)),
            trimtab.Rule(match="0", method="full", magnitude=True, tensors=["weight", "bias"]),
        )
    with pytest.raises(trimtab.PlanError, match="no tensor 'scale'; a LayerNorm has weight, bias"):
        trimtab.attach(nn.Sequential(nn.LayerNorm(4)), trimtab.Rule(match="0", method="full", tensors=["scale"]))
    with pytest.raises(trimtab.PlanError, match="trains the weight, too, which 'tensors' leaves out"):
        trimtab.Rule(match="0", method="full", magnitude=True, tensors=["bias"])


def test_what_is_trained_of_a_module_is_its_effective_weight_and_vectors_do_not_decay() -> None:
    model: Any = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3), nn.Linear(3, 3))
    rules = [trimtab.Rule(match="?", method="full"), trimtab.Rule(match="3", method="full", tensors=["bias"])]
    trimtab.attach(model, trimtab.Plan(rules))
    stir(model)
    for place in range(3):
        effective, adapter = trimtab.effective_weight(model, str(place)), model[place].adapter
        assert torch.equal(effective, adapter.weight)
        assert torch.equal(model[place].weight + 0, adapter.weight)
        assert effective.data_ptr() != adapter.weight.data_ptr(), "a copy, which may be changed"
        assert not torch.equal(adapter.weight, model[place].base.weight)
        assert adapter.double() is adapter
        adapter.float()
    assert torch.equal(trimtab.effective_weight(model, "3"), model[3].base.weight)
    x = torch.randn(2, 3)
    assert torch.allclose(model[3](x), x @ model[3].base.weight.t() + model[3].adapter.bias)
    assert {name.replace("adapter.", ""): one.group for name, one in trained_tensors(model).items()} == {
        "0.weight": "weight",
        "1.weight": "bias",
        "1.bias": "bias",
        "2.weight": "weight",
        "2.bias": "bias",
        "3.bias": "bias",
    }


def test_counts_of_a_module_built_without_memory_start_at_zero() -> None:
    with torch.device("meta"):
        model: Any = nn.Sequential(nn.BatchNorm1d(4))
        trimtab.attach(model, trimtab.Rule(match="0", method="full"))
    torch.use_deterministic_algorithms(True)  # which fills new memory with the largest number
    try:
        model.to_empty(device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    assert int(model[0].adapter.num_batches_tracked) == 0


def test_layers_with_one_bias_between_them_train_one_copy_of_it() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias = model[0].bias
    trimtab.attach(model, trimtab.Rule(match="*", method="full", magnitude=True))
    assert model[0].adapter.bias is model[1].adapter.bias
    assert model[0].adapter.weight is not model[1].adapter.weight


@pytest.mark.parametrize("table", [nn.Embedding, nn.EmbeddingBag])
def test_a_table_with_sparse_gradients_is_trained_in_another_dtype(table: Any) -> None:
    model = nn.Sequential(table(5, 3, sparse=True).bfloat16())
    trimtab.attach(model, trimtab.Rule(match="0", method="full"))
    output = model(torch.tensor([[1, 4], [4, 0]]))
    output.sum().backward()
    (trained,) = trimtab.trainable_parameters(model).values()
    assert trained.dtype == torch.float32
    assert trained.grad is not None
    share = 1.0 if table is nn.Embedding else 0.5
    assert trained.grad[:, 0].tolist() == [share, share, 0.0, 0.0, 2 * share]
    bare: Any = model[0].base
    assert bare.sparse
