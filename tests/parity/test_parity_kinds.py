"""PEFT's folders over layers of every kind that both know, both ways and merged, in models of our own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

import trimtab
from adapter_tools import PEFT_FILES, assert_unchanged, state_of

CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(autouse=True)
def _missing_tensors_are_errors() -> Iterator[None]:
    """PEFT only warns of tensors that it misses or does not know, and of much else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(missing|unexpected|not initialized).*")
        yield


class Narrow(nn.Module):
    """Linear layers that rank 4 does not fit, of nn.Linear and of transformers' Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.gate, self.leave = nn.Linear(6, 9), Conv1D(1, 9), nn.Linear(9, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.enter(x))
        return self.leave(h * torch.sigmoid(self.gate(h)))

    @staticmethod
    def inputs() -> Tensor:
        return torch.randn(5, 6)


class Biased(nn.Module):
    """Linear layers with biases, of nn.Linear and of transformers' Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 9), Conv1D(4, 9)
        nn.init.normal_(self.leave.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.enter(x)))

    @staticmethod
    def inputs() -> Tensor:
        return torch.randn(5, 6)


class Mix(nn.Module):
    """A layer of the user's, whose matrix is ``[in, out]``."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.matrix, self.bias = nn.Parameter(torch.randn(inner, outer)), nn.Parameter(torch.randn(outer))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix + self.bias


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.mix, self.leave = nn.Linear(6, 9), Mix(9, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.mix(torch.tanh(self.enter(x)))))

    @staticmethod
    def inputs() -> Tensor:
        return torch.randn(5, 6)


class Encoder(nn.Module):
    """Two blocks of torch's own transformer, whose attention reads its projections."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)

    @staticmethod
    def inputs() -> Tensor:
        return torch.randn(3, 5, 8)


class Words(nn.Module):
    """A scaled look-up with a padding entry, a plain one, and convolutions over what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.words = BartScaledWordEmbedding(11, 8, 3, embed_scale=2.5)
        self.places = nn.Embedding(7, 8)
        self.scan = nn.Conv1d(8, 6, 3, stride=2, padding=1)
        self.same = nn.Conv1d(6, 6, 3, padding="same", bias=False)
        self.leave = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x) + self.places(torch.arange(x.shape[1]))
        return self.leave(self.same(torch.tanh(self.scan(h.transpose(1, 2)))).mean(-1))

    @staticmethod
    def inputs() -> Tensor:
        return torch.randint(11, (4, 7))


class Pictures(nn.Module):
    """Convolutions in two and three dimensions, one pointwise."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv3d(3, 6, (2, 4, 4), stride=(2, 4, 4))
        self.wide, self.point = nn.Conv2d(6, 5, (3, 2), padding=(1, 0)), nn.Conv2d(5, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.point(torch.tanh(self.wide(self.patch(x).mean(2))))

    @staticmethod
    def inputs() -> Tensor:
        return torch.randn(2, 3, 4, 12, 12)


ALL_WORDS = ["words", "places", "scan", "same"]
ALL_PICTURES = ["patch", "wide", "point"]
CASES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "ranks above the matrix": (Narrow, {"target_modules": ["enter", "gate", "leave"], "r": 4}),
    "ranks above the matrix, DoRA": (Narrow, {"target_modules": ["gate", "leave"], "r": 11, "use_dora": True}),
    "a bias in B": (Biased, {"target_modules": ["enter", "leave"], "r": 3, "lora_bias": True}),
    "a bias in B, rank-stabilised": (
        Biased,
        {"target_modules": ["leave"], "r": 2, "lora_bias": True, "use_rslora": True, "alpha_pattern": {"leave": 3}},
    ),
    "a parameter": (Own, {"target_modules": ["leave"], "target_parameters": ["mix.matrix"], "r": 3}),
    "a parameter of a layer": (Own, {"target_parameters": ["leave.weight"], "target_modules": ["enter"], "r": 2}),
    "attention": (Encoder, {"target_modules": ["self_attn"], "r": 3}),
    "attention and linear": (Encoder, {"target_modules": ["self_attn", "linear2"], "r": 2, "use_rslora": True}),
    "attention with a rank of its own": (
        Encoder,
        {"target_modules": ["self_attn", "linear1"], "r": 2, "rank_pattern": {"layers.1.self_attn": 5}},
    ),
    "look-ups and 1d": (Words, {"target_modules": ALL_WORDS, "r": 3}),
    "look-ups and 1d, DoRA": (Words, {"target_modules": ALL_WORDS, "r": 3, "use_dora": True, "use_rslora": True}),
    "look-ups beside a linear layer": (Words, {"target_modules": ["words", "leave"], "r": 2, "lora_dropout": 0.1}),
    "2d and 3d": (Pictures, {"target_modules": ALL_PICTURES, "r": 3, "rank_pattern": {"patch": 5}}),
    "1d and a bias in B": (Words, {"target_modules": ["scan", "leave"], "r": 2, "lora_bias": True}),
    "2d and 3d and a bias in B": (Pictures, {"target_modules": ["patch", "wide"], "r": 3, "lora_bias": True}),
    "2d and 3d, DoRA": (Pictures, {"target_modules": ALL_PICTURES, "r": 2, "use_dora": True}),
}


def folder_of_peft(kind: type[Any], settings: dict[str, Any], folder: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """A bare model, inputs, and the outputs of PEFT's adapter that is saved into ``folder``."""
    base = kind().double().eval()
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(**{"lora_alpha": 7, **settings})).eval()
    disturb(theirs)
    theirs.save_pretrained(str(folder))
    x = kind.inputs()
    x = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        return base, x, theirs(x)


def disturb(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


@pytest.fixture(autouse=True)
def _no_fused_encoder() -> Iterator[None]:
    """torch's fused encoder layer reads the weights, and PEFT's adapter on an attention does nothing there."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_a_folder_of_peft_gives_its_outputs_here_and_merged(case: str, tmp_path: Path) -> None:
    base, x, right = folder_of_peft(*CASES[case], tmp_path)
    assert not torch.allclose(base(x), right, atol=1e-3)
    model = copy.deepcopy(base)
    trimtab.load_adapter(model, tmp_path)
    assert torch.allclose(model(x), right, **CLOSE)
    trimtab.merge(model)
    assert torch.allclose(model(x), right, **CLOSE)
    assert model.state_dict().keys() == base.state_dict().keys()


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_our_folder_gives_our_outputs_in_peft_and_again_here(case: str, tmp_path: Path) -> None:
    base, x, _ = folder_of_peft(*CASES[case], tmp_path / "theirs")
    model = copy.deepcopy(base)
    trimtab.load_adapter(model, tmp_path / "theirs")
    disturb(model)
    trimtab.save_adapter(model, tmp_path / "ours")
    assert (tmp_path / "ours" / PEFT_FILES[0]).is_file()
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert torch.allclose(theirs(x), model(x), **CLOSE)
    again = copy.deepcopy(base)
    trimtab.load_adapter(again, tmp_path / "ours")
    assert torch.allclose(again(x), model(x), rtol=0, atol=0)
    trimtab.load_adapter(model, tmp_path / "ours")  # onto the adapters that it came from, as a resumed run does
    assert torch.allclose(again(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "rules",
    [
        [{"match": "*.in_proj_weight", "method": "lora", "rank": 2}],
        [{"match": "*.self_attn", "method": "dora", "rank": 2}],
        [{"match": "*.self_attn", "method": "lora", "rank": 2}, {"match": "*.out_proj", "method": "lora", "rank": 3}],
        [
            {"match": "*.self_attn", "method": "lora", "rank": 2, "alpha": 4},
            {"match": "*.out_proj", "method": "lora", "rank": 2, "alpha": 3},
        ],
        [
            {"match": "*.self_attn", "method": "lora", "rank": 2},
            {"match": "*.linear1", "method": "lora", "rank": 2, "dropout": 0.1},
        ],
    ],
    ids=["a part", "DoRA", "two ranks", "two scales", "dropout elsewhere"],
)
def test_attention_that_peft_cannot_express_is_kept_in_our_format(rules: list[Any], tmp_path: Path) -> None:
    base = Encoder().double().eval()
    model = copy.deepcopy(base)
    trimtab.attach(model, rules)
    disturb(model)
    trimtab.save_adapter(model, tmp_path)
    assert not (tmp_path / PEFT_FILES[0]).exists()
    trimtab.load_adapter(base, tmp_path)
    x = Encoder.inputs().double()
    assert torch.equal(base(x), model(x))


@torch.no_grad()
def test_an_output_projection_that_peft_had_by_itself_is_added_once(tmp_path: Path) -> None:
    """PEFT's model reads the layer's weight without that adapter, and its merged model has it."""
    base, x, _ = folder_of_peft(Encoder, {"target_modules": ["self_attn.out_proj", "linear1"], "r": 2}, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).merge_and_unload().eval()
    model = copy.deepcopy(base)
    trimtab.load_adapter(model, tmp_path)
    assert torch.allclose(model(x), theirs(x), **CLOSE)
    assert not torch.allclose(model(x), base(x), **CLOSE)
    trimtab.save_adapter(model, tmp_path / "ours")
    trimtab.load_adapter(again := copy.deepcopy(base), tmp_path / "ours")
    assert torch.allclose(again(x), theirs(x), **CLOSE)


@torch.no_grad()
def test_a_bias_in_b_of_a_layer_without_one_acts_and_is_not_merged(tmp_path: Path) -> None:
    base, x, right = folder_of_peft(Narrow, {"target_modules": ["leave", "enter"], "r": 2, "lora_bias": True}, tmp_path)
    model = copy.deepcopy(base)
    trimtab.load_adapter(model, tmp_path)
    assert torch.allclose(model(x), right, **CLOSE)
    with pytest.raises(trimtab.SurgeryError, match=r"the adapter of leave has a bias \(PEFT's lora_bias\)"):
        trimtab.merge(model)
    assert torch.allclose(model(x), right, **CLOSE)
    trimtab.save_adapter(model, tmp_path / "ours")
    trimtab.load_adapter(again := copy.deepcopy(base), tmp_path / "ours")
    assert torch.equal(again(x), model(x))
    before = state_of(base)
    trimtab.detach(model)
    assert torch.equal(model(x), base(x))
    assert_unchanged(base, before)


class Grouped(nn.Module):
    """Convolutions with groups, one of them depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.deep = nn.Conv2d(4, 6, 3, groups=2, padding=1), nn.Conv2d(6, 6, 3, stride=2, groups=6)

    def forward(self, x: Tensor) -> Tensor:
        return self.deep(torch.tanh(self.enter(x)))

    @staticmethod
    def inputs() -> Tensor:
        return torch.randn(2, 4, 7, 6)


@pytest.mark.parametrize("use_dora", [False, True])
def test_convolutions_with_groups_are_as_in_peft_and_cannot_be_merged(use_dora: bool, tmp_path: Path) -> None:
    settings = {"target_modules": ["enter", "deep"], "r": 6, "use_dora": use_dora}
    base, x, right = folder_of_peft(Grouped, settings, tmp_path / "theirs")
    model = copy.deepcopy(base)
    trimtab.load_adapter(model, tmp_path / "theirs")
    theirs: Any = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs", is_trainable=True)
    assert torch.allclose(model(x), right, **CLOSE)
    for one in (model, theirs):
        one(x).square().sum().backward()
    ours = {name: parameter.grad for name, parameter in trimtab.trainable_parameters(model).items()}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            place, key = name.removeprefix("base_model.model.").split(".lora_")
            own = {"A": "A", "B": "B", "m": "magnitude"}[key[0]]
            assert torch.allclose(ours[f"{place}.adapter.{own}"].flatten(), parameter.grad.flatten(), **CLOSE)
    with pytest.raises(trimtab.SurgeryError, match="across the 2 groups"):
        trimtab.merge(model)
    assert torch.allclose(model(x), right, **CLOSE)
    disturb(model)
    trimtab.save_adapter(model, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert torch.allclose(theirs(x), model(x), **CLOSE)


@pytest.mark.parametrize("layer", [{"padding_mode": "circular", "padding": 1}, {"dilation": 2, "padding": "same"}])
def test_where_peft_computes_something_else_its_folder_is_refused_and_ours_kept(layer: Any, tmp_path: Path) -> None:
    base = nn.Sequential(nn.Conv2d(3, 5, 3, **layer), nn.Flatten())
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["0"], r=2))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    with pytest.raises(trimtab.AdapterError, match=r"does not fit the model: 0: PEFT .*(circular|dilation \(2, 2\))"):
        trimtab.load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    model = copy.deepcopy(base)
    trimtab.attach(model, trimtab.Rule(match="0", method="lora", rank=2))
    disturb(model)
    trimtab.save_adapter(model, tmp_path / "ours")
    assert not (tmp_path / "ours" / PEFT_FILES[0]).exists()


def test_our_own_update_of_groups_merges_and_is_kept_in_our_format(tmp_path: Path) -> None:
    model = Grouped().double()
    x = Grouped.inputs().double()
    trimtab.attach(model, trimtab.Rule(match="*", method="dora", rank=3))
    disturb(model)
    right = model(x)
    trimtab.save_adapter(model, tmp_path)
    assert not (tmp_path / PEFT_FILES[0]).exists()
    trimtab.merge(model)
    assert torch.allclose(model(x), right, **CLOSE)


class Tied(nn.Module):
    """A look-up and a head of one weight; the head has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.leave = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7)
        self.leave.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.mix(self.words(tokens))))

    @staticmethod
    def inputs() -> Tensor:
        return torch.arange(7).reshape(1, 7)


@torch.no_grad()
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_head_whose_bias_alone_is_trained_keeps_the_weight_that_its_look_up_shares(
    use_dora: bool, tmp_path: Path
) -> None:
    settings = {"target_modules": ["words"], "r": 2, "bias": "all", "use_dora": use_dora}
    model, x, right = folder_of_peft(Tied, settings, tmp_path)
    trimtab.load_adapter(model, tmp_path)
    assert torch.allclose(model(x), right, **CLOSE)
    assert trimtab.merge(model).untied == ("words",)
    assert torch.allclose(model(x), right, **CLOSE)
