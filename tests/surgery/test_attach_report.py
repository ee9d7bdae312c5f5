"""What the report of an attachment says besides the adapted modules: ranks that were lowered, what no rule
reached, and layers that are tied to an adapted one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trimtab
from adapter_tools import trained
from trimtab import Rule, bases
from trimtab.methods import lora
from trimtab.runs.records import PlanRecord
from trimtab.surgery.attach_report import OUTPUT_HEAD, usually_frozen

Make = Callable[..., Any]


class Gated(nn.Module):
    """A projection, a gate with one output, and a narrow layer, of which only the first has rank 4."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.gate, self.narrow = nn.Linear(12, 12), nn.Linear(12, 1), nn.Linear(3, 12, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.gate(x)) * self.wide(x) + self.narrow(x[..., :3])


# Ranks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_all_linear_takes_the_largest_rank_that_fits_and_keeps_the_scale(method: str, stabilised: bool) -> None:
    model = Gated()
    rule = Rule(match="all-linear", method=method, rank=4, alpha=6, rank_stabilised=stabilised)
    report = trimtab.attach(model, rule)
    assert report.lowered_ranks == report.to_dict()["lowered_ranks"] == {"gate": 1, "narrow": 3}
    assert PlanRecord.of(report).remarks() == ["rank lowered to the largest that fits: gate 1, narrow 3"]
    assert model.gate.adapter.B.shape == (1, 1)
    assert model.narrow.adapter.A.shape == (3, 3)
    for layer in (model.wide, model.gate, model.narrow):
        assert isinstance(options := layer.adapter.options, lora.Options)
        assert options.scale == pytest.approx(6 / (math.sqrt(4) if stabilised else 4), rel=1e-12)


def test_all_linear_takes_the_largest_square_that_fits() -> None:
    """For every shape: a square of the next rank would be too large."""
    for out, inner, asked in [(1, 32, 8), (12, 12, 9), (3, 12, 3), (2, 100, 50)]:
        model = nn.Sequential(nn.Linear(inner, out))
        report = trimtab.attach(model, Rule(match="all-linear", method="mora", rank=asked, form="sharing"))
        took = report.lowered_ranks.get("0", asked)
        assert model[0].adapter.M.shape[0] <= max(out, inner)
        if took < asked:
            with pytest.raises(trimtab.PlanError, match=f"rank {took + 1} is larger"):
                trimtab.attach(
                    nn.Sequential(nn.Linear(inner, out)), Rule(match="0", method="mora", rank=took + 1, form="sharing")
                )


def test_a_rule_that_names_the_layer_is_told_of_the_rank() -> None:
    with pytest.raises(trimtab.PlanError, match=r"gate \(rule 2\): rank 2 is larger .* lower the rank for this module"):
        trimtab.attach(
            Gated(), [Rule(match="all-linear", method="lora", rank=4), Rule(match="g*", method="lora", rank=2)]
        )


@pytest.mark.parametrize("method", ["lora", "dora", "mora"])
def test_lowered_ranks_survive_saving_merging_and_loading(method: str, tmp_path: Path) -> None:
    model = Gated().double()
    fresh = copy.deepcopy(model)
    trained(model, Rule(match="all-linear", method=method, rank=4))
    x = torch.randn(5, 12, dtype=torch.float64)
    right = model(x)
    trimtab.save_adapter(model, tmp_path)
    trimtab.merge(model)
    assert torch.allclose(model(x), right, rtol=0, atol=1e-12)
    trimtab.load_adapter(fresh, tmp_path)
    assert torch.allclose(fresh(x), right, rtol=0, atol=1e-12)


# Unreached -----------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Matrices of many kinds: bare parameters, an embedding, a convolution, attention, linear layers, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, 7, 8))
        self.words = nn.Embedding(11, 8)
        self.patch = nn.Conv2d(3, 8, 2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.up, self.down = nn.Linear(8, 20), nn.Linear(20, 8)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 11, bias=False)


def test_what_no_rule_reached_is_counted_by_kind() -> None:
    report = trimtab.attach(Mixed(), Rule(match="up", method="lora", rank=2))
    kinds = {"Mixed": 56, "Embedding": 88, "Conv2d": 96, "Linear": 160, "MultiheadAttention": 256, OUTPUT_HEAD: 88}
    assert report.unreached == report.to_dict()["unreached"] == kinds
    assert "unreached" in repr(report)


@pytest.mark.parametrize(("match", "left"), [("attention", 0), ("attention.in_proj_weight", 64), ("*.out_proj", 192)])
def test_of_attention_the_part_that_is_left_is_counted(match: str, left: int) -> None:
    report = trimtab.attach(Mixed(), Rule(match=match, method="lora", rank=2))
    assert report.unreached.get("MultiheadAttention", 0) == left


def test_the_largest_kind_comes_first_in_one_line() -> None:
    report = trimtab.attach(Mixed(), Rule(match=["up", "down"], method="lora", rank=2))
    assert list(report.unreached.values()) == sorted(report.unreached.values(), reverse=True)
    (line,) = PlanRecord.of(report).remarks()
    numbers = sum(report.unreached.values())
    kinds = len(report.unreached)
    assert line.startswith(f"not reached by any rule: {numbers:,} numbers in {kinds} kinds: ")
    assert "Conv2d 96" in line


def test_embeddings_of_any_name_and_the_head_are_usually_frozen() -> None:
    kinds = {"Embedding": True, "GemmaTextScaledWordEmbedding": True, OUTPUT_HEAD: True, "Conv2d": False}
    assert {kind: usually_frozen(kind) for kind in kinds} == kinds
    report = trimtab.attach(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)), Rule(match="1", method="lora", rank=2))
    assert len(PlanRecord.of(report).remarks()) == 1
    assert PlanRecord.of(report).remarks(usual=False) == []


def test_what_every_rule_reached_says_nothing(tiny_llama: Make) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    report = trimtab.attach(model, Rule(match="*", method="lora", rank=2))
    assert report.unreached == {}
    assert PlanRecord.of(report).remarks() == []


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_is_told_apart_and_a_tied_one_counts_once(tied: bool, tiny_llama: Make) -> None:
    report = trimtab.attach(tiny_llama(tie_word_embeddings=tied), Rule(match="all-linear", method="lora", rank=2))
    assert report.unreached == {"Embedding": 40 * 16} | ({} if tied else {OUTPUT_HEAD: 40 * 16})


def test_a_block_with_an_adapter_is_reached(tiny_llama: Make) -> None:
    report = trimtab.attach(tiny_llama(), Rule(match="*.mlp", method="serial", bottleneck=2))
    attention = 2 * (16 * 16 * 2 + 16 * 8 * 2)  # two blocks of q and o, k and v
    assert report.unreached == {"Embedding": 640, OUTPUT_HEAD: 640, "Linear": attention}


def test_quantised_weights_count_as_the_numbers_they_hold(tiny_llama: Make) -> None:
    pytest.importorskip("bitsandbytes")
    layer = nn.Linear(64, 64, bias=False)
    base = bases.find(layer)
    assert base is not None
    model = nn.Sequential(nn.Linear(8, 64), bases.quantise(base, "nf4"))
    assert trimtab.attach(model, Rule(match="0", method="lora", rank=2)).unreached == {type(model[1]).__name__: 64 * 64}


def test_loading_tells_it_too_and_what_is_trained_by_hand_is_reached(tiny_llama: Make, tmp_path: Path) -> None:
    model = trained(tiny_llama(), Rule(match="all-linear", method="dora", rank=2))
    trimtab.save_adapter(model, tmp_path)
    fresh = tiny_llama()
    assert trimtab.load_adapter(fresh, tmp_path).unreached == {"Embedding": 640, OUTPUT_HEAD: 640}
    fresh.lm_head.weight.requires_grad_(True)
    trimtab.save_adapter(fresh, tmp_path / "with the head")
    assert trimtab.load_adapter(tiny_llama(), tmp_path / "with the head").unreached == {"Embedding": 640}


def test_a_layer_without_memory_is_not_told_to_have_rows_of_zeros() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3))
        report = trimtab.attach(model, trimtab.Rule(match="0", method="dora", rank=1))
    assert report.zero_rows == {}


# Ties ----------------------------------------------------------------------------------------------------------------


def test_a_layer_that_is_tied_to_an_adapted_one_and_left_out_is_told(tiny_llama: Make, tmp_path: Path) -> None:
    """Loading tells it, too."""
    words, head = "model.embed_tokens", "lm_head"
    each: list[dict[str, Any]] = [{"method": "dora", "rank": 2}, {"method": "full"}]
    for settings in each:
        for match, left in [(words, {head: words}), (head, {words: head})]:
            model = tiny_llama(tie_word_embeddings=True)
            report = trimtab.attach(model, Rule(match=match, **settings))
            assert report.frozen_ties == report.to_dict()["frozen_ties"] == left
            (line,) = [line for line in PlanRecord.of(report).remarks(usual=False) if "weight of" in line]
            assert line.startswith("lm_head has" if match == words else "model.embed_tokens has")
            trimtab.save_adapter(model, tmp_path)
            assert trimtab.load_adapter(tiny_llama(tie_word_embeddings=True), tmp_path).frozen_ties == left
        both = trimtab.attach(tiny_llama(tie_word_embeddings=True), Rule(match=[words, head], **settings))
        alone = trimtab.attach(tiny_llama(tie_word_embeddings=False), Rule(match=words, **settings))
        assert both.frozen_ties == alone.frozen_ties == {}


def test_what_lies_inside_of_an_adapted_module_is_tied_to_nothing(tiny_llama: Make) -> None:
    rules = [Rule(match="*.mlp", method="full"), Rule(match="*.self_attn", method="serial", bottleneck=2)]
    assert trimtab.attach(tiny_llama(tie_word_embeddings=True), rules).frozen_ties == {}
    for match in ("attention", "*.in_proj_weight", "*.out_proj", "words"):
        assert trimtab.attach(Mixed(), Rule(match=match, method="lora", rank=2)).frozen_ties == {}


def test_one_module_of_two_names_is_not_tied_to_itself() -> None:
    model = nn.ModuleDict({"one": (layer := nn.Linear(4, 4)), "other": nn.ModuleDict({"same": layer})})
    assert trimtab.attach(model, Rule(match="other.same", method="lora", rank=2)).frozen_ties == {}
