"""Saving and loading through our own code alone: bit for bit, whatever the mix; which layout is chosen; what is left in
the folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import trimtab
from adapter_tools import (
    OUR_FILES,
    PEFT_FILES,
    adapter_tensors,
    assert_unchanged,
    edit_json,
    read_json,
    same_tensors,
    state_of,
    trained,
)
from trimtab import AdapterError, Rule, SurgeryError
from trimtab.formats.untrusted import read_tensors
from trimtab.surgery.adapted import adapted_modules

Make = Callable[..., Any]
TOKENS = torch.arange(24).reshape(2, 12)

PEFT_PLANS: dict[str, list[Rule]] = {
    "lora": [Rule(match="all-linear", method="lora", rank=4)],
    "lora-scaled": [Rule(match="all-linear", method="lora", rank=4, alpha=0.7, rank_stabilised=True)],
    "dora": [Rule(match="all-linear", method="dora", rank=3, alpha=5)],
    "lora-with-magnitude": [Rule(match="*_proj", method="lora", rank=3, magnitude=True)],
    "dora-in-many-ranks": [
        Rule(match="all-linear", method="dora", rank=4, alpha=8),
        Rule(match="*.q_proj", method="dora", rank=2, alpha=16),
        Rule(match="*.down_proj", layers="1", method="dora", rank=1, alpha=3),
    ],
    "training-options": [
        Rule(match="*.q_proj", method="dora", rank=2, detach_norm=False, dropout=0.25),
        Rule(match="*.v_proj", method="dora", rank=2, init="gaussian", init_std=0.5, keep_product=True),
    ],
    "bfloat16": [Rule(match="*.q_proj", method="lora", rank=2, dtype="bfloat16")],
    "head": [Rule(match="lm_head", method="lora", rank=2)],
}
OUR_PLANS: dict[str, list[Rule]] = {
    "mora": [Rule(match="all-linear", method="mora", rank=4)],
    "mora-sharing": [Rule(match="all-linear", method="mora", rank=4, form="sharing")],
    "mora-magnitude": [Rule(match="all-linear", method="mora", rank=4, magnitude=True)],
    "lora-and-dora": [
        Rule(match="*.q_proj", method="lora", rank=4),
        Rule(match="*.v_proj", method="dora", rank=4),
    ],
    "lora-and-mora": [
        Rule(match="*.q_proj", method="lora", rank=4),
        Rule(match="*.v_proj", method="mora", rank=4),
    ],
    "input-axis": [Rule(match="*.q_proj", method="dora", rank=4, magnitude_axis="input")],
    "magnitude-alone": [Rule(match="*.q_proj", method="dora", rank=0)],
    "full": [Rule(match="*.q_proj", method="full")],
    "full-magnitude": [Rule(match="*.q_proj", method="full", magnitude=True, dtype="float64")],
    "two-scalings": [
        Rule(match="*.q_proj", method="lora", rank=4),
        Rule(match="*.v_proj", method="lora", rank=4, rank_stabilised=True),
    ],
    "everything": [
        Rule(match="all-linear", method="lora", rank=2),
        Rule(match="*.k_proj", method="dora", rank=2, magnitude_axis="input"),
        Rule(match="*.o_proj", method="mora", rank=3, form="sharing", magnitude=True),
        Rule(match="*.down_proj", layers="0", method="full"),
        Rule(match="*.down_proj", layers="1", method="dora", rank=0),
    ],
}
PLANS = PEFT_PLANS | OUR_PLANS


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_round_trip_keeps_every_bit(
    plan: str, architecture: str, tiny_llama: Make, tiny_gpt2: Make, tmp_path: Path
) -> None:
    swap = {"*.q_proj": "*.c_attn", "*.v_proj": "*.c_fc", "*.k_proj": "*.attn.c_proj", "*_proj": "*.c_*"}
    swap |= {"*.o_proj": "*.mlp.c_proj", "*.down_proj": "*.c_fc"}
    rules = PLANS[plan]
    if architecture == "gpt2":
        rules = [Rule(**{**rule.describe(), "match": swap.get(rule.match[0], rule.match[0])}) for rule in rules]
    make = {"llama": tiny_llama, "gpt2": tiny_gpt2}[architecture]
    torch.manual_seed(1)
    model = trained(make(), *rules)
    torch.manual_seed(1)
    fresh = make()

    assert trimtab.save_adapter(model, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    files = PEFT_FILES if plan in PEFT_PLANS else OUR_FILES
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(files)
    report = trimtab.load_adapter(fresh, tmp_path / "new" / "folder")

    assert same_tensors(adapter_tensors(fresh), adapter_tensors(model))
    assert torch.equal(run(fresh), run(model))
    ours, theirs = dict(adapted_modules(model)), dict(adapted_modules(fresh))
    assert {name: (one.method, one.adapter.options) for name, one in theirs.items()} == {
        name: (one.method, one.adapter.options) for name, one in ours.items()
    }
    assert report.trainable_parameters == sum(tensor.numel() for tensor in adapter_tensors(model).values())
    assert sum(rule["modules"] for rule in report.to_dict()["rules"]) == len(ours)


def test_a_loaded_adapter_can_be_trained_on_and_saved_the_same(tiny_llama: Make, tmp_path: Path) -> None:
    for number, plan in enumerate([PLANS["dora-in-many-ranks"], PLANS["everything"]]):
        trimtab.save_adapter(trained(tiny_llama(), *plan), tmp_path / f"{number}")
        model = tiny_llama()
        trimtab.load_adapter(model, tmp_path / f"{number}")
        trimtab.save_adapter(model, tmp_path / f"{number}again")
        first, again = tmp_path / f"{number}", tmp_path / f"{number}again"
        for path in first.glob("*.json"):
            assert path.read_bytes() == (again / path.name).read_bytes(), path.name
        for path in first.glob("*.safetensors"):  # the entries of its header come in any order
            tensors, header = read_tensors(path)
            assert same_tensors(tensors, read_tensors(again / path.name)[0])
            assert header == read_tensors(again / path.name)[1]
        assert set(trimtab.trainable_parameters(model)) == {
            name for name, _ in model.named_parameters() if ".adapter." in name
        }


def test_the_other_base_dtypes(tiny_llama: Make, tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = trained(tiny_llama().to(dtype), Rule(match="*_proj", method="dora", rank=2))
        fresh = tiny_llama().to(dtype)
        trimtab.save_adapter(model, tmp_path)
        trimtab.load_adapter(fresh, tmp_path)
        assert same_tensors(adapter_tensors(fresh), adapter_tensors(model))


@pytest.mark.parametrize(("first", "second"), [("dora", "mora"), ("mora", "dora"), ("dora", "lora"), ("full", "mora")])
def test_nothing_of_an_earlier_save_stays(first: str, second: str, tiny_llama: Make, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    trimtab.save_adapter(trained(tiny_llama(), *PLANS[first]), tmp_path)
    model = trained(tiny_llama(), *PLANS[second])
    trimtab.save_adapter(model, tmp_path)
    files = PEFT_FILES if second in PEFT_PLANS else OUR_FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*files, "README.md"])
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "mine"
    fresh = tiny_llama()
    trimtab.load_adapter(fresh, tmp_path)
    assert same_tensors(adapter_tensors(fresh), adapter_tensors(model))


def test_two_layouts_in_one_folder_are_refused(tiny_llama: Make, tmp_path: Path) -> None:
    # As PEFT would leave it after saving over one of ours: which of the two is meant?
    trimtab.save_adapter(trained(tiny_llama(), *PLANS["mora"]), tmp_path)
    trimtab.save_adapter(trained(tiny_llama(), *PLANS["dora"]), tmp_path / "other")
    for path in (tmp_path / "other").iterdir():
        path.rename(tmp_path / path.name)
    model = tiny_llama()
    before = state_of(model)
    with pytest.raises(AdapterError, match="two adapters in one folder"):
        trimtab.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_options_are_written_in_full(tiny_llama: Make, tmp_path: Path) -> None:
    """What an adapter computes must not hang on a default of the release that reads it."""
    model = trained(
        tiny_llama(), Rule(match="*.q_proj", method="mora", rank=4), Rule(match="*.v_proj", method="lora", rank=4)
    )
    trimtab.save_adapter(model, tmp_path)
    said = read_json(tmp_path / OUR_FILES[0])["modules"]
    assert said["model.layers.0.self_attn.q_proj"]["options"]["form"] == "rotation"
    assert said["model.layers.0.self_attn.v_proj"]["options"]["rank_stabilised"] is False

    trimtab.save_adapter(trained(tiny_llama(), Rule(match="*.q_proj", method="dora", rank=4)), tmp_path / "peft")
    config = read_json(tmp_path / "peft" / PEFT_FILES[0])
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["use_dora"]) == (4, 8, False, True)
    with safe_open(tmp_path / "peft" / PEFT_FILES[1], framework="pt") as file:
        header = json.loads(file.metadata()["trimtab"])
    assert header["model.layers.1.self_attn.q_proj"]["options"]["magnitude_axis"] == "output"


class Shared(nn.Module):
    """``first`` and ``again`` may be one module; ``twin`` may have a module of its own and their weight."""

    def __init__(self, *, again: bool = True, twin: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first if again else nn.Linear(6, 6)
        self.twin = nn.Linear(6, 6)
        if twin:
            self.twin.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.twin(torch.tanh(self.again(torch.tanh(self.first(x)))))


@pytest.mark.parametrize("method", ["lora", "dora", "mora"])
@pytest.mark.parametrize(("again", "twin"), [(True, True), (True, False), (False, True)])
def test_shared_layers_come_back_shared(method: str, again: bool, twin: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, fresh = Shared(again=again, twin=twin), Shared(again=again, twin=twin)
    fresh.load_state_dict(model.state_dict())
    trained(model, Rule(match="*", method=method, rank=2))
    trimtab.save_adapter(model, tmp_path)
    # PEFT would adapt the second place of a shared layer by nothing, and merge a shared weight twice.
    assert (tmp_path / OUR_FILES[0]).is_file()
    assert not (tmp_path / PEFT_FILES[0]).exists()
    trimtab.load_adapter(fresh, tmp_path)
    x = torch.randn(3, 6)
    assert (fresh.again is fresh.first) == again
    assert (fresh.twin.adapter is fresh.first.adapter) == twin
    assert torch.equal(fresh(x), model(x))
    wanted = model(x)
    trimtab.merge(fresh)
    assert torch.allclose(fresh(x), wanted, atol=1e-5)  # float32: two products in another order


def test_one_shared_weight_with_two_adapters_is_refused(tmp_path: Path) -> None:
    """As two separate layers saved it; of two adapters on one weight the last would win silently."""
    apart = Shared(again=False, twin=False)
    trimtab.save_adapter(trained(apart, Rule(match=["first", "twin"], method="lora", rank=2)), tmp_path)
    model = Shared()
    before = state_of(model)
    with pytest.raises(AdapterError, match=r"twin: shares its weight with first"):
        trimtab.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_names_are_names_and_not_globs(tmp_path: Path) -> None:
    names = ["q[0]", "q*", "all-linear", "ql", "a b", "späť"]

    def make() -> nn.Module:
        return nn.ModuleDict({"blocks": nn.ModuleDict({name: nn.Linear(6, 6) for name in names})})

    for number, rules in enumerate(
        (
            [Rule(match="blocks.q[*]", method="lora", rank=2), Rule(match="*.a b", method="lora", rank=3)],
            [Rule(match=["blocks.q[[]0]", "blocks.all-linear"], method="mora", rank=2)],
        )
    ):
        model, fresh = trained(make(), *rules), make()
        trimtab.save_adapter(model, tmp_path / str(number))
        trimtab.load_adapter(fresh, tmp_path / str(number))
        assert same_tensors(adapter_tensors(fresh), adapter_tensors(model))


def test_rows_of_zeros_are_kept_from_peft(tiny_llama: Make, tmp_path: Path) -> None:
    """PEFT divides by their norm, and would answer NaN."""
    base = tiny_llama()
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight[3] = 0
    model = trained(base, Rule(match="*.q_proj", method="dora", rank=2))
    trimtab.save_adapter(model, tmp_path)
    assert (tmp_path / OUR_FILES[0]).is_file()
    # Plain LoRA divides by nothing.
    trimtab.detach(model)
    trimtab.save_adapter(trained(model, Rule(match="*.q_proj", method="lora", rank=2)), tmp_path)
    assert (tmp_path / PEFT_FILES[0]).is_file()


@pytest.mark.parametrize("compiled", ["model", "blocks"])
@pytest.mark.parametrize("plan", ["dora-in-many-ranks", "everything", "one-block"])
def test_compiled_models_have_the_names_of_plain_ones(
    compiled: str, plan: str, tiny_llama: Make, tmp_path: Path
) -> None:
    """torch.compile puts a module around a model or a block; nothing is compiled before the first call."""

    def wrap(model: Any) -> Any:
        if compiled == "model":
            return torch.compile(model)
        for place, block in enumerate(model.model.layers):
            model.model.layers[place] = torch.compile(block)
        return model

    rules = {**PLANS, "one-block": [Rule(match="*.q_proj", layers="1", method="lora", rank=2)]}[plan]
    model = trained(tiny_llama(), *rules)
    trimtab.save_adapter(model, tmp_path / "plain")
    tensors = adapter_tensors(model)
    wrapped = wrap(model)
    trimtab.save_adapter(wrapped, tmp_path / "compiled")
    for path in (tmp_path / "plain").glob("*.json"):
        assert path.read_bytes() == (tmp_path / "compiled" / path.name).read_bytes()
    plain, fresh = tiny_llama(), wrap(tiny_llama())
    trimtab.load_adapter(plain, tmp_path / "compiled")
    assert same_tensors(adapter_tensors(plain), tensors)
    trimtab.load_adapter(fresh, tmp_path / "plain")
    trimtab.load_adapter(fresh, tmp_path / "plain")  # onto the adapters that are there by now
    assert same_tensors({key.replace("_orig_mod.", ""): one for key, one in adapter_tensors(fresh).items()}, tensors)


# Onto a model that carries adapters already -------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["dora-in-many-ranks", "everything"])
def test_values_are_taken_over_by_the_same_adapters(plan: str, tiny_llama: Make, tmp_path: Path) -> None:
    model, other = trained(tiny_llama(), *PLANS[plan]), trained(tiny_llama(), *PLANS[plan], seed=6)
    trimtab.save_adapter(model, tmp_path)
    assert not same_tensors(adapter_tensors(other), adapter_tensors(model))
    parameters = {name: id(value) for name, value in trimtab.trainable_parameters(other).items()}
    report = trimtab.load_adapter(other, tmp_path)
    assert same_tensors(adapter_tensors(other), adapter_tensors(model))
    # An optimizer that holds the parameters goes on holding them.
    assert {name: id(value) for name, value in trimtab.trainable_parameters(other).items()} == parameters
    assert sum(rule["modules"] for rule in report.to_dict()["rules"]) == len(report.modules)


def test_training_options_of_the_model_stay_when_values_are_taken_over(tiny_llama: Make, tmp_path: Path) -> None:
    model = trained(tiny_llama(), Rule(match="*.q_proj", method="dora", rank=2, alpha=4, dropout=0.1))
    other = trained(tiny_llama(), Rule(match="*.q_proj", method="dora", rank=2, detach_norm=False))
    trimtab.save_adapter(model, tmp_path)
    trimtab.load_adapter(other, tmp_path)
    assert same_tensors(adapter_tensors(other), adapter_tensors(model))
    adapter = next(module for _, module in adapted_modules(other)).adapter
    assert (adapter.options.dropout, adapter.options.detach_norm) == (0.0, False)


@pytest.mark.parametrize(
    "other",
    [
        {"match": "*.v_proj", "method": "lora", "rank": 2},
        {"match": ["*.q_proj", "*.v_proj"], "method": "lora", "rank": 2},
        {"match": "*.q_proj", "method": "lora", "rank": 3},
        {"match": "*.q_proj", "method": "lora", "rank": 2, "alpha": 5},
        {"match": "*.q_proj", "method": "lora", "rank": 2, "rank_stabilised": True},
        {"match": "*.q_proj", "method": "lora", "rank": 2, "magnitude": True},
        {"match": "*.q_proj", "method": "mora", "rank": 2},
        {"match": "*.q_proj", "method": "full"},
    ],
    ids=str,
)
def test_other_adapters_on_the_model_are_an_error(other: dict[str, Any], tiny_llama: Make, tmp_path: Path) -> None:
    trimtab.save_adapter(trained(tiny_llama(), Rule(match="*.q_proj", method="lora", rank=2, alpha=4)), tmp_path)
    model = trained(tiny_llama(), Rule(**other))
    before = state_of(model)
    with pytest.raises(AdapterError, match="already carries other adapters"):
        trimtab.load_adapter(model, tmp_path)
    assert_unchanged(model, {**before})


def test_the_two_forms_of_mora_are_different_adapters(tiny_llama: Make, tmp_path: Path) -> None:
    """Where k is even in both, nothing but the form tells them apart."""
    trimtab.save_adapter(trained(tiny_llama(), Rule(match="*.q_proj", method="mora", rank=2)), tmp_path)
    model = trained(tiny_llama(), Rule(match="*.q_proj", method="mora", rank=2, form="sharing"))
    with pytest.raises(AdapterError, match="already carries other adapters"):
        trimtab.load_adapter(model, tmp_path)


# Onto the wrong model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["dora", "mora", "everything"])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 1}, r"not in this one, such as model\.layers\.1\."),
        ({"hidden_size": 32}, r"expected \[.*\], got \["),
        ({"num_key_value_heads": 2}, r"k_proj.*(expected \[.*\], got \[|made for a weight of \[8, 16\])"),
    ],
)
def test_the_wrong_model(plan: str, changes: dict[str, Any], says: str, tiny_llama: Make, tmp_path: Path) -> None:
    trimtab.save_adapter(trained(tiny_llama(), *PLANS[plan]), tmp_path)
    model = tiny_llama(**changes)
    model.model.layers[0].mlp.requires_grad_(False)  # what was frozen before stays frozen, and the rest trainable
    before = state_of(model)
    with pytest.raises(AdapterError, match=says):
        trimtab.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_a_smaller_matrix_than_the_rank(tiny_llama: Make, tmp_path: Path) -> None:
    trimtab.save_adapter(trained(tiny_llama(), Rule(match="*.v_proj", method="lora", rank=8)), tmp_path)
    model = tiny_llama(num_attention_heads=4)  # v_proj: 4 x 16
    before = state_of(model)
    with pytest.raises(AdapterError, match=r"does not fit the model.*rank 8 is larger"):
        trimtab.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_a_kind_of_layer_that_no_base_knows(tiny_llama: Make, tmp_path: Path) -> None:
    class MyLinear(nn.Linear):
        pass

    trimtab.save_adapter(trained(tiny_llama(), Rule(match=["*.q_proj", "*.v_proj"], method="lora", rank=2)), tmp_path)
    model = tiny_llama()
    model.model.layers[0].self_attn.v_proj = MyLinear(16, 8, bias=False)
    before = state_of(model)
    with pytest.raises(AdapterError, match=r"no base knows, such as model\.layers\.0\.self_attn\.v_proj, a MyLinear"):
        trimtab.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_a_causal_model_and_its_body(tiny_llama: Make, tmp_path: Path) -> None:
    model = tiny_llama()
    trimtab.save_adapter(trained(model, *PLANS["dora"]), tmp_path)
    body = tiny_llama().model
    before = state_of(body)
    with pytest.raises(AdapterError, match=r"instance, layers\.0\."):
        trimtab.load_adapter(body, tmp_path)
    assert_unchanged(body, before)


# Bad places to save to, and to load from ----------------------------------------------------------------------------


def test_nothing_to_save(tiny_llama: Make, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="has no adapters"):
        trimtab.save_adapter(tiny_llama(), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_folder_that_cannot_be_written(tiny_llama: Make, tmp_path: Path) -> None:
    model = trained(tiny_llama(), *PLANS["dora"])
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(AdapterError, match="cannot be saved here"):
        trimtab.save_adapter(model, tmp_path / "file")
    (tmp_path / "taken" / PEFT_FILES[0]).mkdir(parents=True)
    with pytest.raises(AdapterError, match="cannot be saved here"):
        trimtab.save_adapter(model, tmp_path / "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == [PEFT_FILES[0]]


def test_no_adapter_in_the_folder(tiny_llama: Make, tmp_path: Path) -> None:
    model = tiny_llama()
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    for place, says in (
        ("nothing", "no such folder"),
        ("file", "a file; expected a folder"),
        ("empty", "no adapter here; expected adapter_config.json"),
    ):
        with pytest.raises(AdapterError, match=says):
            trimtab.load_adapter(model, tmp_path / place)
    trimtab.save_adapter(trained(tiny_llama(), *PLANS["mora"]), tmp_path / "cut")
    (tmp_path / "cut" / OUR_FILES[0]).unlink()
    with pytest.raises(AdapterError, match=f"{OUR_FILES[1]} without its configuration"):
        trimtab.load_adapter(model, tmp_path / "cut")


def test_the_name_of_the_base_may_be_changed(tiny_llama: Make, tmp_path: Path) -> None:
    """The one edit that people make by hand all the time; it changes nothing about the adapter."""
    model = trained(tiny_llama(), *PLANS["dora"])
    trimtab.save_adapter(model, tmp_path)
    edit_json(tmp_path / PEFT_FILES[0], base_model_name_or_path="somewhere/else", revision="main")
    fresh = tiny_llama()
    trimtab.load_adapter(fresh, tmp_path)
    assert same_tensors(adapter_tensors(fresh), adapter_tensors(model))
