"""Folders between PEFT and us: exactly the same modules with the same ranks and scales, whatever their names; and what
PEFT cannot express, it does not load."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import trimtab
from adapter_tools import (
    PEFT_FILES,
    adapter_tensors,
    assert_unchanged,
    edit_json,
    read_json,
    same_tensors,
    state_of,
    trained,
)
from trimtab import AdapterError, Rule
from trimtab.methods import lora
from trimtab.surgery.adapted import adapted_modules

Make = Callable[..., Any]
TOKENS = torch.arange(24).reshape(2, 12)
# float32: the same sums in another order, in two blocks.
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 2e-6}


@pytest.fixture(autouse=True)
def _missing_tensors_are_errors() -> Iterator[None]:
    """PEFT only warns of tensors that it misses or does not know."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|Unexpected|not initialized).*")
        yield


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found = model.eval()(TOKENS)
        return found.logits if hasattr(found, "logits") else found.last_hidden_state


def peft_layers(model: nn.Module) -> dict[str, tuple[int, float, bool]]:
    """``module -> (rank, scale, has a magnitude)`` of what PEFT adapted."""
    return {
        name.removeprefix("base_model.model."): (
            module.r["default"],
            module.scaling["default"],
            "default" in module.lora_magnitude_vector,
        )
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def our_layers(model: nn.Module) -> dict[str, tuple[int, float, bool]]:
    """The same of what we adapted."""
    found = {}
    for name, module in adapted_modules(model):
        options = module.adapter.options
        assert isinstance(options, lora.Options)
        found[name] = (options.rank, options.scale, options.magnitude)
    return found


# Exactly the same modules -------------------------------------------------------------------------------------------

PLANS: dict[str, list[Rule]] = {
    "all": [Rule(match="all-linear", method="lora", rank=2)],
    "two": [Rule(match=["*.q_proj", "*.v_proj"], method="dora", rank=2)],
    "head": [Rule(match=["lm_head", "*.q_proj"], method="lora", rank=2)],
    "first-block": [Rule(match="*.q_proj", layers="0", method="dora", rank=2)],
    "outer-blocks": [Rule(match="all-linear", layers="outer:1", method="lora", rank=2)],
    "blocks-by-number": [Rule(match="all-linear", layers="1,10-11", method="lora", rank=2)],
    "one-module": [Rule(match="model.layers.1.mlp.up_proj", method="dora", rank=2)],
    "ranks-and-alphas": [
        Rule(match="all-linear", method="dora", rank=2, alpha=3),
        Rule(match="*.down_proj", method="dora", rank=4, alpha=0.5),
        Rule(match="*.up_proj", layers="1", method="dora", rank=1, alpha=3),
        Rule(match="*_proj", layers="10-11", method="dora", rank=3, alpha=1),
    ],
}


@pytest.mark.parametrize("plan", PLANS)
def test_peft_adapts_exactly_our_modules(plan: str, tiny_llama: Make, tmp_path: Path) -> None:
    # Twelve blocks: "layers.1" begins the name of "layers.10", and PEFT shortens lists of twenty names and more.
    base = tiny_llama(num_hidden_layers=12)
    model = trained(copy.deepcopy(base), *PLANS[plan])
    trimtab.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(base, tmp_path)
    assert peft_layers(theirs) == our_layers(model)
    assert torch.allclose(run(theirs), run(model), **CLOSE)


@pytest.mark.parametrize(
    "rules",
    [
        [Rule(match="*.mlp", method="serial", bottleneck=2)],
        [Rule(match="*.mlp", method="parallel", bottleneck=2), Rule(match="*.q_proj", method="lora", rank=2)],
    ],
    ids=["alone", "beside LoRA"],
)
def test_peft_refuses_adapter_blocks(rules: list[Rule], tiny_llama: Make, tmp_path: Path) -> None:
    base = tiny_llama()
    trimtab.save_adapter(trained(copy.deepcopy(base), *rules), tmp_path)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("transposed", [False, True])
def test_peft_has_nothing_to_say(transposed: bool, tiny_llama: Make, tiny_gpt2: Make, tmp_path: Path) -> None:
    """Not of keys that it does not know, nor of weights that are stored the other way round."""
    base = tiny_gpt2() if transposed else tiny_llama()
    trimtab.save_adapter(trained(copy.deepcopy(base), Rule(match="all-linear", method="dora", rank=2)), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(base, tmp_path)
    assert read_json(tmp_path / PEFT_FILES[0])["fan_in_fan_out"] == transposed


@pytest.mark.parametrize(("plan", "short"), [("all", True), ("two", True), ("head", True), ("first-block", False)])
def test_short_names_where_they_say_it_all(plan: str, short: bool, tiny_llama: Make, tmp_path: Path) -> None:
    trimtab.save_adapter(trained(tiny_llama(), *PLANS[plan]), tmp_path)
    targets = read_json(tmp_path / PEFT_FILES[0])["target_modules"]
    assert isinstance(targets, list)
    assert all("." not in name for name in targets) == short


class Names(nn.Module):
    """Linear layers whose names end with each other's."""

    NAMES = ("q", "xq", "a.q", "a.b.q", "b.q", "layers.0.q", "encoder.layers.0.q", "layers.0x.q", "a_b.q", "q_b.c")

    def __init__(self) -> None:
        super().__init__()
        for name in self.NAMES:
            *path, last = name.split(".")
            parent: nn.Module = self
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.add_module(last, nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.NAMES:
            x = torch.tanh(self.get_submodule(name)(x))
        return x


@pytest.mark.parametrize(
    "chosen",
    [
        ["q"],
        ["xq"],
        ["a.q", "b.q"],
        ["b.q"],  # ends "a.b.q", too
        ["layers.0.q"],  # ends "encoder.layers.0.q", too
        ["encoder.layers.0.q"],
        ["q", "b.q", "layers.0.q"],
        ["a_b.q"],  # as a pattern without escapes: "a.b.q"
        ["a.b.q", "q_b.c"],
        list(Names.NAMES),
    ],
    ids=str,
)
def test_names_that_end_like_others(chosen: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Names()
    # Every chosen module has a rank and a scale of its own, which must not reach the others by their names.
    rules = [Rule(match=name, method="dora", rank=1 + place % 3, alpha=1 + place) for place, name in enumerate(chosen)]
    model = trained(copy.deepcopy(base), *rules)
    trimtab.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert peft_layers(theirs) == our_layers(model)
    assert set(peft_layers(theirs)) == set(chosen)
    x = torch.randn(3, 6)
    assert torch.allclose(theirs(x), model(x), **CLOSE)
    fresh = copy.deepcopy(base)
    theirs.save_pretrained(str(tmp_path / "again"))
    trimtab.load_adapter(fresh, tmp_path / "again")
    assert our_layers(fresh) == our_layers(model)
    assert same_tensors(adapter_tensors(fresh), adapter_tensors(model))


def test_both_kinds_of_linear_layer_in_one_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Conv1D(10, 8), nn.Tanh(), nn.Linear(10, 6))
    model = trained(copy.deepcopy(base), Rule(match="*", method="dora", rank=2))
    trimtab.save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    x = torch.randn(3, 6)
    assert torch.allclose(theirs(x), model(x), **CLOSE)


def test_models_without_a_head(tiny_llama: Make, tmp_path: Path) -> None:
    """``AutoModel`` and ``AutoModelForCausalLM`` of one folder: other names, other adapters."""
    tiny_llama().save_pretrained(tmp_path / "model")
    body, causal = (kind.from_pretrained(tmp_path / "model") for kind in (AutoModel, AutoModelForCausalLM))
    for number, base in enumerate((body, causal)):
        model = trained(copy.deepcopy(base), Rule(match="all-linear", method="dora", rank=2))
        trimtab.save_adapter(model, tmp_path / str(number))
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / str(number))
        assert torch.allclose(run(theirs), run(model), **CLOSE)
        assert isinstance(theirs, peft.PeftModelForCausalLM) == (base is causal)

        theirs.save_pretrained(str(tmp_path / "peft" / str(number)))
        fresh = copy.deepcopy(base)
        trimtab.load_adapter(fresh, tmp_path / "peft" / str(number))
        assert torch.allclose(run(fresh), run(model), **CLOSE)

        other = copy.deepcopy(causal if base is body else body)
        before = state_of(other)
        with pytest.raises(AdapterError, match="made for another model"):
            trimtab.load_adapter(other, tmp_path / "peft" / str(number))
        assert_unchanged(other, before)


# What PEFT cannot express -------------------------------------------------------------------------------------------

OURS_ALONE: dict[str, list[Rule]] = {
    "lora and dora": [Rule(match="*.q_proj", method="lora", rank=2), Rule(match="*.v_proj", method="dora", rank=2)],
    "mora": [Rule(match="*.q_proj", method="mora", rank=2)],
    "mora with magnitude": [Rule(match="*.q_proj", method="mora", rank=2, magnitude=True)],
    "input axis": [Rule(match="*.q_proj", method="dora", rank=2, magnitude_axis="input")],
    "magnitude alone": [Rule(match="*.q_proj", method="lora", rank=0, magnitude=True)],
    "full": [Rule(match="*.q_proj", method="full")],
    "two scalings": [
        Rule(match="*.q_proj", method="lora", rank=2, rank_stabilised=True),
        Rule(match="*.v_proj", method="lora", rank=2),
    ],
}


@pytest.mark.parametrize("earlier", [False, True], ids=["new folder", "over a PEFT adapter"])
@pytest.mark.parametrize("plan", OURS_ALONE)
def test_peft_refuses_what_it_cannot_express(plan: str, earlier: bool, tiny_llama: Make, tmp_path: Path) -> None:
    base = tiny_llama()
    if earlier:
        trimtab.save_adapter(trained(tiny_llama(), Rule(match="*.q_proj", method="lora", rank=2)), tmp_path)
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    model = trained(copy.deepcopy(base), *OURS_ALONE[plan])
    trimtab.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    trimtab.load_adapter(base, tmp_path)
    assert same_tensors(adapter_tensors(base), adapter_tensors(model))
    assert torch.equal(run(base), run(model))


# What PEFT saved ----------------------------------------------------------------------------------------------------


def moved(model: Any) -> Any:
    """PEFT's trained tensors away from their start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


@pytest.mark.parametrize(
    "said",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*\.1\..*\.(q|k)_proj", "use_dora": True},
        {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 5},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "init_lora_weights": "gaussian"},
        {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
        {"target_modules": ["q_proj"], "init_lora_weights": "mica"},
        {"target_modules": ["q_proj"], "init_lora_weights": False, "use_dora": True},
        {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0.*", "lora_dropout": 0.1},
        {
            "target_modules": ["q_proj", "up_proj", "lm_head"],
            "rank_pattern": {r"layers\.[1-9]\..*q_proj": 3, "up_proj": 1, r"^model\.layers\.0\.self_attn\.q_proj": 2},
            "alpha_pattern": {"lm_head": 1, ".*proj": 3},
            "use_dora": True,
        },
    ],
    ids=str,
)
def test_folders_of_peft(said: dict[str, Any], tiny_llama: Make, tmp_path: Path) -> None:
    base = tiny_llama()
    theirs = moved(get_peft_model(copy.deepcopy(base), LoraConfig(**{"r": 4, "lora_alpha": 8, **said})))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")  # as it should, for a head
        theirs.save_pretrained(str(tmp_path))
    trimtab.load_adapter(base, tmp_path)
    assert our_layers(base) == peft_layers(theirs)
    assert torch.allclose(run(base), run(theirs), **CLOSE)
    trimtab.merge(base)
    assert torch.allclose(run(base), run(theirs.merge_and_unload()), rtol=0, atol=4e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_folders_of_peft(dtype: torch.dtype, tiny_llama: Make, tmp_path: Path) -> None:
    base = tiny_llama().to(dtype)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True)
    theirs = moved(get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False))
    theirs.save_pretrained(str(tmp_path))
    trimtab.load_adapter(base, tmp_path)
    for name, value in adapter_tensors(base).items():
        module, key = name.rsplit(".", 1)
        part = {"A": "lora_A.default", "B": "lora_B.default", "magnitude": "lora_magnitude_vector.default"}[key]
        want = theirs.get_submodule(f"base_model.model.{module}.{part}").weight
        assert want.dtype == dtype
        assert torch.equal(value, want.float())
    # PEFT rounds the norm and the update to half precision on the way, so the outputs agree to a few of its steps.
    eps = torch.finfo(dtype).eps
    want = run(theirs).float()
    assert (run(base).float() - want).abs().max() < 8 * eps * want.abs().max()


@pytest.mark.parametrize(
    ("said", "names"),
    [
        ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "pissa"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "olora"}, "olora"),
        ({"target_modules": ["q_proj"], "layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
        ({"target_modules": ["q_proj"], "alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ],
    ids=str,
)
def test_folders_of_peft_that_are_refused(said: dict[str, Any], names: str, tiny_llama: Make, tmp_path: Path) -> None:
    base = tiny_llama(attention_bias=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = moved(get_peft_model(copy.deepcopy(base), LoraConfig(r=4, task_type="CAUSAL_LM", **said)))
        theirs.save_pretrained(str(tmp_path))
    before = state_of(base)
    with pytest.raises(AdapterError, match=names):
        trimtab.load_adapter(base, tmp_path)
    assert_unchanged(base, before)


def test_other_kinds_of_peft_adapter_are_refused(tiny_llama: Make, tmp_path: Path) -> None:
    base = tiny_llama()
    for config in (
        peft.LoHaConfig(target_modules=["q_proj"]),
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    ):
        get_peft_model(copy.deepcopy(base), config).save_pretrained(str(tmp_path))
        with pytest.raises(AdapterError, match="only LORA"):
            trimtab.load_adapter(base, tmp_path)


def test_a_pickle_of_peft_is_refused(tiny_llama: Make, tmp_path: Path) -> None:
    base = tiny_llama()
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"]))
    theirs.save_pretrained(str(tmp_path))
    tensors = peft.get_peft_model_state_dict(theirs)
    (tmp_path / PEFT_FILES[1]).unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)  # a folder that PEFT still takes
    with pytest.raises(AdapterError, match="are a pickle"):
        trimtab.load_adapter(base, tmp_path)


def test_a_pissa_adapter_that_peft_converted(tiny_llama: Make, tmp_path: Path) -> None:
    """The way out that our refusal names."""
    base = tiny_llama()
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    theirs: Any = get_peft_model(copy.deepcopy(base), config)
    theirs.peft_config["default"].init_lora_weights = True  # as PEFT's documentation has it
    theirs.save_pretrained(str(tmp_path / "start"))
    moved(theirs).save_pretrained(
        str(tmp_path / "lora"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    trimtab.load_adapter(base, tmp_path / "lora")
    assert torch.allclose(run(base), run(theirs), rtol=0, atol=1e-5)  # the update is now a difference of two products


def test_through_peft_and_back(tiny_llama: Make, tmp_path: Path) -> None:
    """Loading and saving with PEFT takes our header away: then its configuration is taken as it stands."""
    base = tiny_llama()
    model = trained(copy.deepcopy(base), Rule(match="*.q_proj", method="dora", rank=2, alpha=3, dropout=0.1))
    trimtab.save_adapter(model, tmp_path / "ours")
    edit_json(tmp_path / "ours" / PEFT_FILES[0], lora_alpha=1.5)
    with pytest.raises(AdapterError, match="load and save them once with PEFT"):
        trimtab.load_adapter(copy.deepcopy(base), tmp_path / "ours")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    trimtab.load_adapter(base, tmp_path / "theirs")
    assert same_tensors(adapter_tensors(base), adapter_tensors(model))
    assert {rank_and_scale[:2] for rank_and_scale in our_layers(base).values()} == {(2, 0.75)}
    assert torch.allclose(run(base), run(theirs), **CLOSE)


def test_an_output_head_whose_weight_peft_copied(tiny_llama: Make, tmp_path: Path) -> None:
    """PEFT saves the base of an adapted head beside the adapter, and loads it over the base; we want it to be equal."""
    base = tiny_llama()
    theirs = moved(get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["lm_head"], use_dora=True)))
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        theirs.save_pretrained(str(tmp_path))
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / PEFT_FILES[1])
    for dtype in (torch.float32, torch.bfloat16):  # the same model, loaded in less
        fresh = copy.deepcopy(base).to(dtype)
        trimtab.load_adapter(fresh, tmp_path)
    fresh = copy.deepcopy(base)
    trimtab.load_adapter(fresh, tmp_path)
    assert torch.allclose(run(fresh), run(theirs), **CLOSE)

    with torch.no_grad():
        base.lm_head.weight[3, 4] += 0.01
    before = state_of(base)
    with pytest.raises(AdapterError, match="lm_head: trained on another weight"):
        trimtab.load_adapter(base, tmp_path)
    assert_unchanged(base, before)
