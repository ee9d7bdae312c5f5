"""Attach, detach, and looking at what is attached."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

import trimtab
from tiny_encoders import write_encoder
from trimtab.runs.records import PlanRecord
from trimtab.surgery.adapted import Adapted


def stack() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.LayerNorm(4))


def lora(match: str | list[str] = "*", **options: Any) -> trimtab.Rule:
    return trimtab.Rule(match=match, method="lora", **{"rank": 2, **options})


def portrait(model: nn.Module) -> tuple[Any, ...]:
    """Everything that a failed attachment must leave as it was."""
    return (
        [(name, type(module), module.training) for name, module in model.named_modules(remove_duplicate=False)],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)],
        {name: value.clone() for name, value in model.state_dict().items()},
        set(vars(model)),
    )


def assert_unchanged(model: nn.Module, before: tuple[Any, ...]) -> None:
    after = portrait(model)
    assert after[:2] == before[:2]
    assert after[3] == before[3]
    assert after[2].keys() == before[2].keys()
    for name, value in before[2].items():
        assert torch.equal(after[2][name], value), name


def test_the_example_of_the_design() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.v_proj = nn.Linear(16, 16), nn.Linear(16, 8)

    model = nn.Module()
    model.layers = nn.ModuleList(Layer() for _ in range(10))
    plan = trimtab.Plan(
        rules=[
            trimtab.Rule(match="*.q_proj", method="dora", rank=8, alpha=16),
            trimtab.Rule(match="*.v_proj", layers="outer:4", method="mora", rank=2),
        ]
    )
    report = trimtab.attach(model, plan)
    assert [module.name for module in report.modules if module.rule == 2] == [
        f"layers.{number}.v_proj" for number in (0, 1, 2, 3, 6, 7, 8, 9)
    ]
    dora, mora = 8 * (16 + 16) + 16, 6 * 6  # k = floor(sqrt(24 * 2) + 0.5) = 7, even: 6
    assert report.counts == {
        "modules": 18,
        "trainable": 10 * dora + 8 * mora,
        "total": 10 * (16 * 17 + 8 * 17),
        "zero_rows": 0,
    }
    assert type(model.layers[4].v_proj) is nn.Linear
    names = trimtab.trainable_parameters(model)
    assert set(names) >= {"layers.0.q_proj.adapter.A", "layers.0.q_proj.adapter.magnitude", "layers.9.v_proj.adapter.M"}
    assert sum(parameter.numel() for parameter in names.values()) == report.trainable_parameters


def test_the_report() -> None:
    model = stack()
    with torch.no_grad():
        model[2].weight[1] = 0
    report = trimtab.attach(model, trimtab.Plan([lora("0"), trimtab.Rule(match="2", method="dora", rank=1, alpha=3)]))
    first, second = report.modules
    assert (first.name, first.method, first.rule, first.out_features, first.in_features) == ("0", "lora", 1, 8, 6)
    assert (first.parameters, first.zero_rows) == (2 * (6 + 8), 0)
    assert (second.name, second.parameters, second.zero_rows) == ("2", 8 + 4 + 4, 1)
    assert report.zero_rows == {"2": 1}
    assert report.counts == {"modules": 2, "trainable": 28 + 16, "total": 56 + 36 + 8, "zero_rows": 1}
    assert PlanRecord.of(report).plain() == {
        "total_parameters": 100,
        "trainable_parameters": 44,
        "zero_rows": {"2": 1},
        "rules": [
            {
                "rule": 1,
                "method": "lora",
                "match": "0",
                "layers": "all",
                "options": {"rank": 2},
                "modules": 1,
                "parameters": 28,
            },
            {
                "rule": 2,
                "method": "dora",
                "match": "2",
                "layers": "all",
                "options": {"rank": 1, "alpha": 3.0},
                "modules": 1,
                "parameters": 16,
            },
        ],
        "modules": [
            {"module": "0", "method": "lora", "rule": 1, "out": 8, "in": 6, "parameters": 28},
            {"module": "2", "method": "dora", "rule": 2, "out": 4, "in": 8, "parameters": 16},
        ],
    }


@pytest.mark.parametrize("plan", [lora(), [lora()], [{"match": "*", "method": "lora", "rank": 2}]])
def test_a_rule_or_a_list_will_do(plan: Any) -> None:
    model = stack()
    assert trimtab.attach(model, plan).counts["modules"] == 2


def test_everything_else_is_frozen_and_given_back() -> None:
    model = stack().eval()
    model[0].bias.requires_grad_(False)
    before = portrait(model)
    trimtab.attach(model, lora("0"))
    assert set(trimtab.trainable_parameters(model)) == {"0.adapter.A", "0.adapter.B"}
    assert isinstance(model[0], Adapted)
    assert not model[0].training
    assert (model[0].in_features, model[0].out_features) == (6, 8)
    assert trimtab.detach(model) == 1
    assert_unchanged(model, before)


def test_the_training_mode_survives_the_detour() -> None:
    model = stack().train()
    trimtab.attach(model, lora(dropout=0.5))
    assert model[0].adapter.training
    model.eval()
    assert not model[0].adapter.training
    trimtab.detach(model)
    assert not model[0].training


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (lora("nowhere"), "ends with no module"),
        (lora("*", rank=5), "2 (rule 1): rank 5 is larger than the matrix: a weight of 4 x 8 has rank at most 4"),
        ([lora("0"), lora("2", rank=5)], "2 (rule 2): rank 5 is larger"),  # the first adapter is built by then
        ({"match": "*", "method": "lora"}, "expected a Plan, a Rule or a list of rules, got dict"),
        ("lora", "expected a Plan, a Rule or a list of rules, got str"),
        ([], "the plan is empty"),
        (["lora"], "rule 1: expected a Rule or a mapping, got str"),
    ],
    ids=str,
)
def test_a_failed_attachment_changes_nothing(plan: Any, words: str) -> None:
    model = stack().eval()
    model[2].weight.requires_grad_(False)
    before = portrait(model)
    with pytest.raises(trimtab.PlanError) as caught:
        trimtab.attach(model, plan)
    assert words in str(caught.value)
    assert_unchanged(model, before)


def test_attaching_twice() -> None:
    model = stack()
    trimtab.attach(model, lora("0"))
    before = portrait(model)
    with pytest.raises(trimtab.SurgeryError, match=r"already has adapters on 1 modules, such as 0.*merge.*detach"):
        trimtab.attach(model, lora("2"))
    assert_unchanged(model, before)
    with pytest.raises(trimtab.SurgeryError, match="already has adapters"):
        trimtab.attach(nn.Sequential(model), lora())
    with pytest.raises(trimtab.SurgeryError, match="such as the model itself"):
        trimtab.attach(model[0], lora())
    trimtab.detach(model)
    trimtab.attach(model, lora("2"))


def test_what_cannot_be_attached_to() -> None:
    with pytest.raises(trimtab.SurgeryError, match=r"bare Linear.*Sequential\(layer\)"):
        trimtab.attach(nn.Linear(4, 4), lora())
    with pytest.raises(trimtab.SurgeryError, match=r"expected a torch.nn.Module, got dict"):
        trimtab.attach({}, lora())  # type: ignore[arg-type]
    with pytest.raises(trimtab.PlanError, match="The model has no layer of a kind that a base knows"):
        trimtab.attach(nn.Sequential(nn.ReLU()), lora("xyz"))


@pytest.mark.parametrize("verb", [trimtab.detach, trimtab.merge])
def test_nothing_to_take_off(verb: Any) -> None:
    with pytest.raises(trimtab.SurgeryError, match="the model has no adapters; attach some first"):
        verb(stack())


@pytest.mark.parametrize("verb", [trimtab.detach, trimtab.merge])
def test_an_adapted_layer_alone_is_not_a_model(verb: Any) -> None:
    """It cannot be replaced inside itself; folding it without removing its adapter would count the update twice."""
    model = stack()
    trimtab.attach(model, lora("0"))
    nn.init.normal_(model[0].adapter.B)
    before = model[0].base.weight.clone()
    with pytest.raises(trimtab.SurgeryError, match="this is one adapted layer"):
        verb(model[0])
    assert torch.equal(model[0].base.weight, before)


def test_detach_after_training_gives_the_outputs_back() -> None:
    model = stack()
    x = torch.randn(5, 6)
    before = model(x)
    for method in ("lora", "dora", "mora", "full"):
        options = {} if method == "full" else {"rank": 2}
        trimtab.attach(model, trimtab.Rule(match="*", method=method, **options))
        for _ in range(2):
            optimiser = torch.optim.AdamW(trimtab.trainable_parameters(model).values(), lr=0.1)
            model(x).square().sum().backward()
            optimiser.step()
        assert not torch.allclose(model(x), before)
        trimtab.detach(model)
        assert torch.equal(model(x), before), method


def test_effective_weight() -> None:
    model = stack().to(torch.bfloat16)
    trimtab.attach(model, lora("0"))
    with torch.no_grad():
        model[0].adapter.B.normal_()
    adapter = model[0].adapter
    expected = model[0].base.weight.float() + 2 * adapter.B @ adapter.A
    got = trimtab.effective_weight(model, "0")
    assert got.dtype == torch.float32
    assert not got.requires_grad
    assert torch.allclose(got, expected, rtol=1e-6)
    bare = trimtab.effective_weight(model, "2")  # without an adapter: its own weight, as a copy
    assert torch.equal(bare, model[2].weight.float())
    bare.zero_()
    assert bool(model[2].weight.any())
    double = nn.Sequential(nn.Linear(3, 3).double())
    trimtab.effective_weight(double, "0").zero_()
    assert bool(double[0].weight.any())


def test_effective_weight_of_something_else() -> None:
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    with pytest.raises(trimtab.SurgeryError, match=r"'frist' is not in the model. Did you mean 'first'\?"):
        trimtab.effective_weight(model, "frist")
    with pytest.raises(trimtab.SurgeryError, match="'norm' is a LayerNorm, which no base knows"):
        trimtab.effective_weight(model, "norm")
    nested = nn.Sequential(model)
    with pytest.raises(trimtab.SurgeryError, match=r"Did you mean '0.first'\?"):
        trimtab.effective_weight(nested, "first")


def test_code_that_reads_the_weight_sees_what_the_layer_does() -> None:
    from transformers.pytorch_utils import Conv1D

    for layer in (nn.Linear(6, 8), Conv1D(8, 6)):
        model = nn.Sequential(layer)
        stored = layer.weight.shape
        trimtab.attach(model, trimtab.Rule(match="0", method="dora", rank=2))
        with torch.no_grad():
            model[0].adapter.B.normal_()
        x = torch.randn(3, 6)
        weight, bias = model[0].weight, model[0].bias
        assert isinstance(weight, Tensor)
        assert weight.shape == stored, "laid out as the layer stores it"
        dense = weight if isinstance(layer, nn.Linear) else weight.t()
        assert torch.allclose(nn.functional.linear(x, dense, bias), model(x), atol=1e-5)


def test_the_printed_model_says_what_is_attached() -> None:
    model = stack()
    trimtab.attach(model, trimtab.Rule(match="0", method="dora", rank=2))
    text = repr(model)
    assert "method=dora, rule=1" in text
    assert "6 -> 8, rank=2" in text


def test_shared_modules_get_one_adapter() -> None:
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    report = trimtab.attach(model, lora("a"))
    assert [(module.name, module.aliases) for module in report.modules] == [("a", ("b.0",))]
    assert model["a"] is model["b"][0]
    assert report.trainable_parameters == 2 * 8
    assert report.total_parameters == 20
    assert trimtab.detach(model) == 1
    assert model["a"] is layer
    assert model["b"][0] is layer


def test_seeded_attachments_are_equal() -> None:
    seen = []
    for _ in range(2):
        torch.default_generator.manual_seed(4)
        model = stack()
        trimtab.attach(model, lora())
        seen.append(model.state_dict())
    assert all(torch.equal(value, seen[1][name]) for name, value in seen[0].items())


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ([lora("*.query")], ["bert.pooler.dense", "classifier"]),
        ([lora("*.dense")], ["bert.pooler.dense", "classifier"]),
        ([lora("*.query"), trimtab.Rule(match="classifier", method="full")], ["bert.pooler.dense"]),
        ([lora("*.query"), trimtab.Rule(match=["classifier", "*.pooler.dense"], method="full")], []),
    ],
)
def test_layers_that_were_drawn_and_stay_frozen_are_warned_of(tmp_path: Path, plan: Any, told: list[str]) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = write_encoder(tmp_path / "bert", kind="BertForMaskedLM")
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trimtab.attach(model, plan)
    assert [f"Rule(match={told}" in str(one.message) for one in caught] == [True] * bool(told)


def test_a_classifier_whose_files_have_its_head_is_attached_without_a_word(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

    folder = write_encoder(tmp_path / "bert", kind="BertForSequenceClassification")
    trimtab.attach(AutoModelForSequenceClassification.from_pretrained(folder), lora("*.query"))  # warnings are errors
    trimtab.attach(BertForSequenceClassification(AutoConfig.from_pretrained(folder)), lora("*.query"))


def test_a_lazy_layer_is_told_of_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(6))
    with pytest.raises(trimtab.SurgeryError, match=r"1\.weight has no shape before its lazy layer has seen a batch"):
        trimtab.attach(model, lora())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not trimtab.adapters(model)
    model(torch.randn(2, 4))
    trimtab.attach(model, lora())


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_what_comes_in_inference_mode_can_be_trained(method: str, tmp_path: Path) -> None:
    options = {} if method == "full" else {"rank": 2}
    model, other = (nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)) for _ in range(2))
    with torch.inference_mode():
        trimtab.attach(model, trimtab.Rule(match="*", method=method, **options))
        trimtab.save_adapter(model, tmp_path)
        trimtab.load_adapter(other, tmp_path)
        if method != "full":
            trimtab.convert_to_lora(other, rank=2)
    for one in (model, other):
        one(torch.randn(5, 4)).square().sum().backward()
        assert all(parameter.grad is not None for parameter in trimtab.trainable_parameters(one).values())


def test_the_parts_of_pefts_layers_are_no_targets() -> None:
    """``all-linear`` would put adapters on the factors of PEFT's own."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4)}), LoraConfig(target_modules=["q"])
    )
    before = portrait(model)
    with pytest.raises(trimtab.SurgeryError, match=r"q\.base_layer is a part of one of PEFT's layers.*unload"):
        trimtab.attach(model, lora("all-linear"))
    assert_unchanged(model, before)
    assert trimtab.attach(model, lora("*.v")).counts["modules"] == 1


@pytest.mark.parametrize("method", ["lora", "full"])
def test_pefts_layers_inside_of_adapted_ones_are_refused(method: str) -> None:
    """As a trainer's ``peft_config`` puts them there: PEFT freezes the adapters, and the pass would train its own."""
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    trimtab.attach(model, trimtab.Rule(match="*", method=method, **({"rank": 2} if method == "lora" else {})))
    get_peft_model(model, LoraConfig(target_modules=["base"], r=2))
    with pytest.raises(trimtab.SurgeryError, match=r"PEFT put one of its layers under an adapter.*peft_config"):
        model(torch.randn(1, 4))
