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
    PEFT_PLANS,
    PLANS,
    adapter_tensors,
    assert_unchanged,
    read_json,
    same_tensors,
    state_of,
    trained,
)
from trimtab import AdapterError, Rule
from trimtab.adapters.safe_read import read_tensors
from trimtab.runs.records import PlanRecord
from trimtab.surgery.adapted import adapted_modules

Make = Callable[..., Any]
TOKENS = torch.arange(24).reshape(2, 12)


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
    assert sum(rule.modules for rule in PlanRecord.of(report).rules) == len(ours)


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


def test_one_shared_weight_with_two_adapters(tmp_path: Path) -> None:
    """As two separate layers saved it: each layer keeps its own adapter, and a merge gives each a weight of its own."""
    apart = Shared(again=False, twin=False)
    trimtab.save_adapter(trained(apart, Rule(match=["first", "twin"], method="lora", rank=2)), tmp_path)
    model: Any = Shared()
    trimtab.load_adapter(model, tmp_path)
    for name in ("first", "twin"):
        own, theirs = getattr(model, name).adapter, getattr(apart, name).adapter
        assert torch.equal(own.A, theirs.A)
        assert torch.equal(own.B, theirs.B)
    wanted = {name: trimtab.effective_weight(model, name) for name in ("first", "twin")}
    trimtab.merge(model)
    for name, weight in wanted.items():
        assert torch.allclose(getattr(model, name).weight, weight, atol=1e-6)


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


PEFTS_WORDS = ["base_layer", "lora_A", "modules_to_save", "original_module", "token_adapter", "_orig_mod"]


@pytest.mark.parametrize("word", PEFTS_WORDS)
def test_names_with_a_word_of_pefts_are_kept_from_peft(word: str, tmp_path: Path) -> None:
    """PEFT's tensors are read by such words, so that a folder in its layout could be read by nobody."""

    def make() -> nn.Module:
        return nn.ModuleDict(
            {word: nn.Linear(6, 6), "inside": nn.ModuleDict({word: nn.ModuleDict({"last": nn.Linear(6, 6)})})}
        )

    rules = [Rule(match="*", method="dora", rank=2), Rule(match="inside", method="full")]
    for number, plan in enumerate((rules[:1], rules)):
        model, fresh = trained(make(), *plan), make()
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


def test_targets_are_told_apart_by_the_names_of_plain_models(tmp_path: Path) -> None:
    def make(wrap: Any) -> nn.Module:
        inner = nn.ModuleDict({"x": wrap(nn.ModuleDict({"q": nn.Linear(4, 4)}))})
        return nn.ModuleDict({"x": nn.ModuleDict({"q": nn.Linear(4, 4)}), "a": inner})

    for wrap in (lambda block: block, torch.compile):
        trimtab.save_adapter(trained(make(wrap), Rule(match="x.q", method="lora", rank=1)), tmp_path)
        # Neither "q" nor "x.q" will do: "a.x.q" ends like both.
        assert read_json(tmp_path / PEFT_FILES[0])["target_modules"] == r"x\.q"
