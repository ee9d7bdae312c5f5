"""Rules and plans: which module gets what, and what is said where none does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import trimtab
from trimtab.surgery.adapted import bare_modules
from trimtab.surgery.targets import find_targets


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "v_proj": nn.Linear(8, 4)})
        self.mlp = nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)})
        self.norm = nn.LayerNorm(8)


class Toy(nn.Module):
    """Six blocks, an embedding, a convolution, attention, and a head."""

    def __init__(self, blocks: int = 6) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(10, 8)
        self.patch = nn.ConvTranspose2d(3, 8, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.look = nn.MultiheadAttention(8, 2)
        self.pool = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 10)


def chosen(*rules: dict[str, Any], model: nn.Module | None = None) -> dict[str, int]:
    """Module name -> number of the rule that decides it."""
    plan = trimtab.Plan([{"method": "lora", "rank": 2, **rule} for rule in rules])
    return {target.name: target.rule for target in find_targets(model or Toy(), plan)}


def test_a_glob_takes_every_layer_that_a_base_knows_and_all_linear_does_not() -> None:
    model = nn.ModuleDict(
        {"words": nn.Embedding(9, 6), "patch": nn.Conv2d(3, 6, 2), "scan": nn.Conv1d(6, 6, 3), "up": nn.Linear(6, 6)}
    )
    assert list(chosen({"match": "*"}, model=model)) == ["words", "patch", "scan", "up"]
    assert list(chosen({"match": "all-linear"}, model=model)) == ["up"]


def q(*blocks: int) -> set[str]:
    return {f"blocks.{block}.attn.q_proj" for block in blocks}


def refusal(*rules: dict[str, Any], model: nn.Module | None = None) -> str:
    with pytest.raises(trimtab.PlanError) as caught:
        chosen(*rules, model=model)
    return str(caught.value)


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [
        ("all", range(6)),
        ("outer:1", [0, 5]),
        ("outer:2", [0, 1, 4, 5]),
        ("outer:9", range(6)),
        ("inner:1", [1, 2, 3, 4]),
        ("inner:2", [2, 3]),
        ("0-1,4", [0, 1, 4]),
        ("3", [3]),
        (3, [3]),
        ("0 - 1, 5", [0, 1, 5]),
    ],
)
def test_layer_selectors(layers: str | int, blocks: list[int]) -> None:
    assert set(chosen({"match": "*.q_proj", "layers": layers})) == q(*blocks)


def test_blocks_are_counted_apart_in_each_stack() -> None:
    """An encoder of 2 blocks beside a decoder of 6: the outer block of each is its own."""
    model = nn.ModuleDict({"encoder": Toy(2), "decoder": Toy(6)})
    got = set(chosen({"match": "*.q_proj", "layers": "outer:1"}, model=model))
    assert got == {f"encoder.{name}" for name in q(0, 1)} | {f"decoder.{name}" for name in q(0, 5)}


def test_a_module_outside_any_block_is_taken_by_all_only() -> None:
    assert set(chosen({"match": "*pool"})) == {"pool"}
    assert "in no block that 'layers' selects" in refusal({"match": "*pool", "layers": "outer:2"})


def test_globs() -> None:
    assert set(chosen({"match": ["*.up", "*.down"], "layers": "0"})) == {"blocks.0.mlp.up", "blocks.0.mlp.down"}
    assert set(chosen({"match": "blocks.[12].attn.?_proj"})) == {
        f"blocks.{block}.attn.{name}_proj" for block in (1, 2) for name in "qv"
    }
    assert set(chosen({"match": "pool"})) == {"pool"}
    assert "nothing has such a name" in refusal({"match": "POOL"})


def test_all_linear_leaves_the_head_alone() -> None:
    got = set(chosen({"match": "all-linear"}))
    assert got == {
        *(f"blocks.{block}.{name}" for block in range(6) for name in ("attn.q_proj", "attn.v_proj", "mlp.up")),
        *(f"blocks.{block}.mlp.down" for block in range(6)),
        *("look.in_proj_weight", "look.out_proj", "pool"),
    }
    assert "lm_head" in chosen({"match": "all-linear"}, {"match": "lm_head"}), "by its name it can be had"


@pytest.mark.parametrize("match", ["look", "*look", "look.*", ["look.in_proj_weight", "*.out_proj"]])
def test_an_attention_is_named_by_itself_or_by_what_it_holds(match: str | list[str]) -> None:
    assert set(chosen({"match": match})) == {"look.in_proj_weight", "look.out_proj"}
    assert set(chosen({"match": "*.in_proj_weight"})) == {"look.in_proj_weight"}


def test_the_last_rule_that_matches_decides() -> None:
    rules = [{"match": "all-linear"}, {"match": "*.q_proj", "layers": "0-2"}, {"match": "*.1.*"}]
    got = chosen(*rules)
    assert {name for name, rule in got.items() if rule == 2} == q(0, 2)
    assert {name for name, rule in got.items() if rule == 3} == {name for name in got if name.startswith("blocks.1.")}
    assert got["pool"] == 1
    for found in (got, chosen({"match": "pool"}, {"match": "*.up"}, {"match": "*.q_proj"})):
        assert list(found) == [name for name, _ in bare_modules(Toy()) if name in found], "in the model's order"


def test_heads_of_real_models(tiny_llama: Callable[..., nn.Module], tiny_gpt2: Callable[..., nn.Module]) -> None:
    llama = set(chosen({"match": "all-linear"}, model=tiny_llama()))
    assert len(llama) == 2 * 7
    assert not any("lm_head" in name for name in llama)
    gpt2 = set(chosen({"match": "all-linear"}, model=tiny_gpt2()))
    assert gpt2 == {
        f"transformer.h.{block}.{name}"
        for block in (0, 1)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    wrapped = nn.ModuleDict({"inner": tiny_llama()})
    assert set(chosen({"match": "all-linear"}, model=wrapped)) == {f"inner.{name}" for name in llama}


def test_the_head_of_a_classifier() -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=0
    )
    got = chosen({"match": "all-linear"}, model=LlamaForSequenceClassification(config))
    assert len(got) == 7
    assert not any("score" in name for name in got)


# What is refused, and how -------------------------------------------------------------------------------------------


def test_near_misses() -> None:
    message = refusal({"match": "*.q_prj"})
    assert message.startswith("rule 1 (match='*.q_prj', layers='all') ends with no module")
    assert "Near misses: *.q_proj" in message
    assert "blocks.*.attn.q_proj" in refusal({"match": "blocks.*.atn.q_proj"})
    far = refusal({"match": "xyz"})
    assert "Names that could be matched: blocks.*.attn.q_proj" in far
    assert "rule 2" in refusal({"match": "*.q_proj"}, {"match": "nowhere"})


@pytest.mark.parametrize(
    ("match", "kind"),
    [
        ("patch", "ConvTranspose2d"),
        ("embed", "EmbeddingBag"),
        ("blocks.0", "Block"),
        ("*.norm", "LayerNorm"),
    ],
)
def test_other_kinds_are_refused_by_name(match: str, kind: str) -> None:
    message = refusal({"match": match})
    assert "of kinds that no base knows" in message
    assert kind in message
    assert "linear" in message
    assert "conv1d" in message


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({"match": "r.weight_hh_l0"}, "r.weight_hh_l0 is a parameter, and how LSTM reads.*match='r', method='full'"),
        ({"match": "*.bias"}, "l.bias is a parameter, and rules name modules: Rule.match='l', "),
        ({"match": "r.weight_hh_l0", "method": "full"}, "match='r', tensors=.'weight_hh_l0'."),
    ],
)
def test_parameters_that_are_no_targets_are_told_from_misspelt_names(rule: dict[str, Any], told: str) -> None:
    model = nn.ModuleDict({"r": nn.LSTM(4, 4), "l": nn.Linear(4, 4)})
    options = {} if rule.get("method") == "full" else {"method": "lora", "rank": 2}
    with pytest.raises(trimtab.PlanError, match=told):
        trimtab.attach(model, trimtab.Rule(**rule, **options))


def test_other_kinds_beside_known_ones_are_passed_over() -> None:
    assert set(chosen({"match": "blocks.0.*"})) == {
        f"blocks.0.{name}" for name in ("attn.q_proj", "attn.v_proj", "mlp.up", "mlp.down")
    }


def test_a_rule_that_a_later_one_takes_everything_from() -> None:
    message = refusal({"match": "*.q_proj"}, {"match": "*.0.*"}, {"match": "all-linear"})
    assert "rule 1 (match='*.q_proj'" in message
    assert "all 6 that it matches, such as blocks.0.attn.q_proj, are decided by a later rule (rule 3)" in message


def test_blocks_out_of_range() -> None:
    assert "names block 9, and the model has blocks 0 to 5" in refusal({"match": "*.q_proj", "layers": "4-9"})
    lone = nn.ModuleDict({"a": nn.Linear(4, 4)})
    assert "the model has no numbered blocks" in refusal({"match": "a", "layers": "0"}, model=lone)
    assert "in no block" in refusal({"match": "*.q_proj", "layers": "inner:3"})
    assert "in no block" in refusal({"match": "all-linear", "layers": "inner:3"})


@pytest.mark.parametrize("layers", ["some", "outer:0", "outer:-1", "outer", "1-", "-1", "1,,2", "", None])
def test_wrong_selectors(layers: Any) -> None:
    with pytest.raises(trimtab.PlanError, match=r"expected 'all', 'outer:K', 'inner:K' or ranges"):
        trimtab.Rule(match="*", method="lora", layers=layers)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"match": "*", "method": "lora", "rnk": 8}, "unknown option 'rnk' for method lora. Did you mean 'rank'?"),
        ({"match": "*", "method": "mora", "alpha": 8}, "unknown option 'alpha' for method mora"),
        ({"match": "*", "method": "lora", "r": 8}, "unknown option 'r' for method lora. Known here: dropout, "),
        ({"match": "*", "method": "lora", "options": {"rank": 8}}, "unknown option 'options' for method lora"),
        ({"match": "*", "method": "dorra"}, "unknown method 'dorra'"),
        ({"match": "*"}, "'method' is missing: expected one of dora, full, lora, mora"),
        ({"method": "lora"}, "match: Field required"),
        ({"match": "", "method": "lora"}, "expected a glob over module names"),
        ({"match": [], "method": "lora"}, "expected a glob over module names"),
        ({"match": 3, "method": "lora"}, "match"),
        ({"match": "*", "method": "lora", "rank": -1}, "rank: Input should be greater than or equal to 0, got -1"),
        ({"match": "*", "method": "lora", "rank": 0}, "rank: 0 leaves nothing to train"),
    ],
    ids=str,
)
def test_wrong_rules(said: dict[str, Any], words: str) -> None:
    with pytest.raises(trimtab.PlanError) as caught:
        trimtab.Rule(**said)
    assert words in str(caught.value)


def test_wrong_plans() -> None:
    with pytest.raises(trimtab.PlanError, match="the plan is empty"):
        trimtab.Plan([])
    with pytest.raises(trimtab.PlanError, match="rule 2: expected a Rule or a mapping, got str"):
        trimtab.Plan([{"match": "*", "method": "lora"}, "dora"])  # type: ignore[list-item]


def test_a_rule_says_itself_again() -> None:
    for said in (
        {"match": "*.q_proj", "layers": "outer:2", "method": "dora", "rank": 4, "alpha": 8.0},
        {"match": ["a", "b"], "layers": "all", "method": "mora", "form": "sharing", "magnitude": True},
    ):
        rule = trimtab.Rule(**said)
        assert rule.describe() == said
        assert trimtab.Rule(**rule.describe()) == rule


def test_one_rule_may_not_split_tied_modules() -> None:
    model = Toy()
    model.blocks[0].attn["q_proj"].weight = model.pool.weight
    message = refusal({"match": "*.q_proj"}, {"match": "pool"}, model=model)
    assert "blocks.0.attn.q_proj and pool share one weight" in message
    assert "different rules (1 and 2)" in message


def test_resolving_changes_nothing() -> None:
    model = Toy()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    chosen({"match": "all-linear"}, model=model)
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
