"""Loading onto models that carry adapters, onto the wrong model, from the wrong place; saving to the wrong place."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import trimtab
from adapter_tools import (
    OUR_FILES,
    PEFT_FILES,
    PLANS,
    adapter_tensors,
    assert_unchanged,
    edit_json,
    same_tensors,
    state_of,
    trained,
)
from trimtab import AdapterError, Rule, SurgeryError
from trimtab.runs.records import PlanRecord
from trimtab.surgery.adapted import adapted_modules

Make = Callable[..., Any]

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
    assert sum(rule.modules for rule in PlanRecord.of(report).rules) == len(report.modules)


def test_the_report_counts_the_rules_of_the_folder(tiny_llama: Make, tmp_path: Path) -> None:
    """Two rules that say the same are one on disk; the modules are counted under that one."""
    rules = [Rule(match=match, method="lora", rank=2) for match in ("*.q_proj", "*.v_proj")]
    model = trained(tiny_llama(), *rules)
    trimtab.save_adapter(model, tmp_path)
    for target in (model, tiny_llama()):
        report = trimtab.load_adapter(target, tmp_path)
        (rule,) = PlanRecord.of(report).rules
        assert (rule.modules, rule.parameters) == (4, report.trainable_parameters)


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


@pytest.mark.parametrize(
    ("match", "changes", "says"),
    [
        ("*.mlp", {"num_hidden_layers": 1}, r"not in this one, such as model\.layers\.1\.mlp\."),
        ("*.mlp", {"hidden_size": 32}, r"mlp\.(down|up).*expected \[.*\], got \["),
    ],
)
def test_blocks_of_the_wrong_model(
    match: str, changes: dict[str, Any], says: str, tiny_llama: Make, tmp_path: Path
) -> None:
    trimtab.save_adapter(trained(tiny_llama(), Rule(match=match, method="serial", bottleneck=2)), tmp_path)
    model = tiny_llama(**changes)
    before = state_of(model)
    with pytest.raises(AdapterError, match=says):
        trimtab.load_adapter(model, tmp_path)
    assert_unchanged(model, before)
    assert not any(module._forward_hooks for module in model.modules())


def test_an_adapter_of_a_block_on_a_layer(tmp_path: Path) -> None:
    blocks, layers = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4))}), nn.ModuleDict({"a": nn.Linear(4, 4)})
    trimtab.save_adapter(trained(blocks, Rule(match="a", method="serial", bottleneck=2)), tmp_path)
    with pytest.raises(AdapterError, match=r"1 of the adapter's modules are no blocks .* such as a, a Linear\."):
        trimtab.load_adapter(layers, tmp_path)


def test_the_adapters_in_folders_inside_are_named(tiny_llama: Make, tmp_path: Path) -> None:
    """As PEFT saves a model with several adapters."""
    for name in ("legal", "fr"):
        trimtab.save_adapter(trained(tiny_llama(), Rule(match="*.v_proj", method="lora", rank=2)), tmp_path / name)
    with pytest.raises(
        AdapterError, match=rf"no adapter here; .* inside of it there is: {tmp_path}/fr, {tmp_path}/legal"
    ):
        trimtab.load_adapter(tiny_llama(), tmp_path)


def test_a_smaller_matrix_than_the_rank(tiny_llama: Make, tmp_path: Path) -> None:
    trimtab.save_adapter(trained(tiny_llama(), Rule(match="*.v_proj", method="lora", rank=8)), tmp_path)
    model = tiny_llama(num_attention_heads=4)  # v_proj: 4 x 16
    before = state_of(model)
    with pytest.raises(AdapterError, match=r"does not fit the model.*rank 8 is larger"):
        trimtab.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_a_kind_of_layer_that_no_base_knows(tiny_llama: Make, tmp_path: Path) -> None:
    class MyLinear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

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


@pytest.mark.parametrize("plan", ["dora", "everything"])
def test_whoever_may_read_the_description_may_read_the_tensors(plan: str, tiny_llama: Make, tmp_path: Path) -> None:
    trimtab.save_adapter(trained(tiny_llama(), *PLANS[plan]), tmp_path)
    description, tensors = sorted(tmp_path.iterdir())
    assert description.stat().st_mode == tensors.stat().st_mode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act for another user")
@pytest.mark.parametrize("name", PEFT_FILES)
def test_a_file_of_another_user_is_not_called_damaged(
    name: str, tiny_llama: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trimtab.save_adapter(trained(tiny_llama(), *PLANS["dora"]), tmp_path)
    (tmp_path / name).chmod(0o600)
    model = tiny_llama()
    monkeypatch.chdir(tmp_path)  # the folders above are root's alone
    tmp_path.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(AdapterError, match=rf"{name}: permission denied; choose another place, or have its owner"):
            trimtab.load_adapter(model, ".")
    finally:
        os.seteuid(0)


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
