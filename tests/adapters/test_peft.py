"""PEFT's layout read without PEFT: which configurations are taken, which are refused, and what a pattern matches."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import trimtab
from adapter_tools import (
    PEFT_FILES,
    adapter_tensors,
    assert_unchanged,
    edit_json,
    edit_tensors,
    read_json,
    same_tensors,
    state_of,
    trained,
)
from trimtab import AdapterError, Rule
from trimtab.adapters.formats import _peft_config
from trimtab.surgery.adapted import adapted_modules

Make = Callable[..., Any]
NO_HEADER = {"format": "pt"}
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def saved(tiny_llama: Make, tmp_path: Path) -> tuple[nn.Module, Path]:
    """A trained DoRA and its folder as PEFT would have written it: without our header."""
    model = trained(tiny_llama(), Rule(match=["*.q_proj", "*.v_proj"], method="dora", rank=2, alpha=3))
    trimtab.save_adapter(model, tmp_path)
    edit_tensors(tmp_path / PEFT_FILES[1], header=NO_HEADER)
    return model, tmp_path


def options(model: nn.Module) -> dict[str, Any]:
    """``LAYER.PROJECTION`` -> options, for a Llama."""
    return {
        f"{name.split('.')[2]}.{name.split('.')[-1]}": module.adapter.options for name, module in adapted_modules(model)
    }


REFUSED = {
    "use_qalora": True,
    "alora_invocation_tokens": [1, 2],
    "layer_replication": [[0, 2], [1, 2]],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 1e-4},
    "velora_config": {"rank": 1},
    "monteclora_config": {"mc_samples": 2},
    "megatron_config": {"tp": 2},
}


@pytest.mark.parametrize("key", REFUSED)
def test_settings_that_change_the_outputs_are_refused_by_name(
    key: str, saved: tuple[nn.Module, Path], tiny_llama: Make
) -> None:
    _, folder = saved
    edit_json(folder / PEFT_FILES[0], **{key: REFUSED[key]})
    model = tiny_llama()
    before = state_of(model)
    with pytest.raises(AdapterError, match=rf"adapter_config\.json: '?{key}"):
        trimtab.load_adapter(model, folder)
    assert_unchanged(model, before)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_starts_that_change_the_base_are_refused(start: str, saved: tuple[nn.Module, Path], tiny_llama: Make) -> None:
    edit_json(saved[1] / PEFT_FILES[0], init_lora_weights=start)
    with pytest.raises(AdapterError, match=rf"init_lora_weights is {start}, which changes the base"):
        trimtab.load_adapter(tiny_llama(), saved[1])


@pytest.mark.parametrize("kind", ["LOHA", "ADALORA", "IA3", "PROMPT_TUNING", 7, ["LORA"]])
def test_other_kinds_of_adapter_are_refused(kind: Any, saved: tuple[nn.Module, Path], tiny_llama: Make) -> None:
    edit_json(saved[1] / PEFT_FILES[0], peft_type=kind)
    with pytest.raises(AdapterError, match="only LORA"):
        trimtab.load_adapter(tiny_llama(), saved[1])


def test_a_configuration_that_is_not_pefts_is_told(saved: tuple[nn.Module, Path], tiny_llama: Make) -> None:
    (saved[1] / PEFT_FILES[0]).write_text('{"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}', "utf-8")
    with pytest.raises(AdapterError, match=r"no peft_type.*no configuration of PEFT's .mlx-lm"):
        trimtab.load_adapter(tiny_llama(), saved[1])


@pytest.mark.parametrize(
    ("start", "alone"),
    [("pissa", True), ("OLoRA", True), ("pissa_niter_16", False), ("corda", False), ("loftq", False)],
)
def test_a_changed_base_comes_with_the_way_to_convert(
    start: str, alone: bool, saved: tuple[nn.Module, Path], tiny_llama: Make
) -> None:
    """The first way is PEFT's own and needs the adapter of before the training; the second does where PEFT repeats the
    start exactly."""
    edit_json(saved[1] / PEFT_FILES[0], init_lora_weights=start)
    with pytest.raises(AdapterError) as caught:
        trimtab.load_adapter(tiny_llama(), saved[1])
    assert "save_pretrained(FOLDER, path_initial_model_for_weight_conversion=START)" in str(caught.value)
    assert ("merge_and_unload().save_pretrained(MERGED)" in str(caught.value)) == alone


@pytest.mark.parametrize(("kind", "said"), [("XLORA", "mixes several"), ("ADALORA", "AdaLoRA"), ("LOHA", "LoHa")])
def test_other_methods_are_named_with_the_way_to_approximate_them(
    kind: str, said: str, saved: tuple[nn.Module, Path], tiny_llama: Make
) -> None:
    edit_json(saved[1] / PEFT_FILES[0], peft_type=kind)
    with pytest.raises(
        AdapterError, match=rf"peft_type is {kind} \(.*{said}.*\); only LORA .*peft\.save_as_lora\(FOLDER"
    ):
        trimtab.load_adapter(tiny_llama(), saved[1])


@pytest.mark.parametrize(
    "tensor",
    [
        "base_model.model.model.embed_tokens.lora_embedding_C",
        f"{Q0}.lora_B.bias",
        f"{Q0}.lora_A.default.weight",  # beside the one without the adapter's name
        f"{Q0}.lora_magnitude_vector.weight",  # the one of older releases, beside the one of today
        f"{Q0}.lora_diag",
        f"{Q0.removeprefix('base_model.model.')}.lora_A.weight",
    ],
)
def test_tensors_without_a_place_are_refused_by_name(
    tensor: str, saved: tuple[nn.Module, Path], tiny_llama: Make
) -> None:
    edit_tensors(saved[1] / PEFT_FILES[1], {tensor: torch.zeros(16)})
    with pytest.raises(AdapterError, match=rf"unexpected tensor {tensor}"):
        trimtab.load_adapter(tiny_llama(), saved[1])


def test_pickled_weights_are_refused(saved: tuple[nn.Module, Path], tiny_llama: Make) -> None:
    torch.save(load_file(saved[1] / PEFT_FILES[1]), saved[1] / "adapter_model.bin")
    (saved[1] / PEFT_FILES[1]).unlink()
    with pytest.raises(AdapterError, match="are a pickle"):
        trimtab.load_adapter(tiny_llama(), saved[1])


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
def test_a_configuration_without_its_numbers(key: str, saved: tuple[nn.Module, Path], tiny_llama: Make) -> None:
    edit_json(saved[1] / PEFT_FILES[0], **{key: ...})
    with pytest.raises(AdapterError, match=rf"damaged configuration \(KeyError: '{key}'\)"):
        trimtab.load_adapter(tiny_llama(), saved[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"r": "two"},
        {"r": -2},
        {"r": 0},
        {"r": 2.5},
        {"lora_alpha": 0},
        {"lora_alpha": -1},
        {"lora_alpha": [3]},
        {"lora_dropout": 1.5},
        {"lora_dropout": "much"},
        {"lora_dropout": [0.1]},
        {"rank_pattern": ["q_proj"]},
        {"rank_pattern": "q_proj"},
        {"rank_pattern": {"q_proj": "two"}},
        {"alpha_pattern": {"q_proj": {}}},
        {"alpha_pattern": {"q_proj[": 3}},
        {"alpha_pattern": {"q_(proj": 3}},
        {"alpha_pattern": {"(?P<n>q)(?P<n>_)": 3}},
        {"alpha_pattern": {"(?|q|v)_proj": 3}},  # of the module regex, not of re, which is what PEFT reads
        {"alpha_pattern": {"(?R)": 3}},
    ],
    ids=str,
)
def test_settings_of_the_wrong_kind(changes: dict[str, Any], saved: tuple[nn.Module, Path], tiny_llama: Make) -> None:
    edit_json(saved[1] / PEFT_FILES[0], **changes)
    model = tiny_llama()
    before = state_of(model)
    with pytest.raises(AdapterError):
        trimtab.load_adapter(model, saved[1])
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r"model\.layers\.\d+\.self_attn\.(q|v)_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
        {"target_modules": None},
        {"target_modules": ..., "bias": ..., "rank_pattern": ..., "alpha_pattern": None, "lora_dropout": None},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": False},
        {"bias": None},
        {"modules_to_save": []},
        {"loftq_config": {}, "corda_config": None, "qalora_group_size": 16, "megatron_core": "megatron.core"},
        {"peft_version": "0.99.0", "auto_mapping": None, "revision": None, "something_of_tomorrow": None},
        {"modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS"},
        {"inference_mode": False, "task_type": "SEQ_CLS", "fan_in_fan_out": True, "ensure_weight_tying": False},
        {"runtime_config": {"ephemeral_gpu_offload": False}},
    ],
    ids=str,
)
def test_settings_that_do_not_matter_here(
    changes: dict[str, Any], saved: tuple[nn.Module, Path], tiny_llama: Make
) -> None:
    model, folder = saved
    edit_json(folder / PEFT_FILES[0], **changes)
    fresh = tiny_llama()
    trimtab.load_adapter(fresh, folder)
    assert same_tensors(adapter_tensors(fresh), adapter_tensors(model))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"something_of_tomorrow": {"a": 1}}, "not known here.*something_of_tomorrow: {'a': 1}"),
        ({"modules_to_save": ["norm", "lm_head"]}, "nothing is stored of norm, lm_head.*modules_to_save"),
    ],
)
def test_what_is_passed_over_is_told(
    changes: dict[str, Any], told: str, saved: tuple[nn.Module, Path], tiny_llama: Make
) -> None:
    model, folder = saved
    edit_json(folder / PEFT_FILES[0], **changes)
    fresh = tiny_llama()
    with pytest.warns(trimtab.TrimtabWarning, match=told):
        trimtab.load_adapter(fresh, folder)
    assert same_tensors(adapter_tensors(fresh), adapter_tensors(model))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "of model.layers.1.self_attn.q_proj and 1 more, which"),
        ({"target_modules": ["q_proj", "layers.0.self_attn.v_proj"]}, "of model.layers.1.self_attn.q_proj, which"),
        ({"layers_to_transform": [0, 1], "layers_pattern": ["layers"]}, "and 1 more"),
        ({"layers_to_transform": [0]}, None),
        ({"layers_to_transform": 0, "layers_pattern": "layers"}, None),
        ({"exclude_modules": ["layers.1.self_attn.q_proj", "v_proj"]}, None),
        (
            {"target_modules": ["q_proj", "v_proj", "self_attn"], "modules_to_save": ["layers.1"]},
            "is stored of layers.1",
        ),
        ({"target_modules": r".*\.(q|v)_proj"}, None),
    ],
    ids=str,
)
def test_modules_that_the_configuration_names_and_nothing_is_stored_of_are_told(
    changes: dict[str, Any], told: str | None, saved: tuple[nn.Module, Path], tiny_llama: Make
) -> None:
    _, folder = saved
    layer = Q0.replace("0.self_attn.q_proj", "1.self_attn")
    gone = {f"{layer}.{name}.lora_{kind}.weight": None for name in ("q_proj", "v_proj") for kind in "AB"}
    gone |= {f"{layer}.{name}.lora_magnitude_vector": None for name in ("q_proj", "v_proj")}
    edit_tensors(folder / PEFT_FILES[1], gone, header=NO_HEADER)
    edit_json(folder / PEFT_FILES[0], **changes)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        trimtab.load_adapter(tiny_llama(), folder)
    said = [str(one.message) for one in heard if "nothing is stored of" in str(one.message)]
    assert len(said) == (told is not None), said
    assert told is None or re.search(told, said[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_in_other_dtypes_are_taken_as_they_are(
    dtype: torch.dtype, saved: tuple[nn.Module, Path], tiny_llama: Make
) -> None:
    model, folder = saved
    stored = {name: value.to(dtype) for name, value in load_file(folder / PEFT_FILES[1]).items()}
    edit_tensors(folder / PEFT_FILES[1], dict(stored))
    fresh = tiny_llama()
    trimtab.load_adapter(fresh, folder)
    for name, value in adapter_tensors(fresh).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, adapter_tensors(model)[name].to(dtype).float()), name


@pytest.mark.parametrize("shape", [(-1,), (1, -1), (-1, 1), (1, -1, 1, 1)])
@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_magnitudes_of_older_releases(
    suffix: str, shape: tuple[int, ...], saved: tuple[nn.Module, Path], tiny_llama: Make
) -> None:
    model, folder = saved
    stored = load_file(folder / PEFT_FILES[1])
    names = [name for name in stored if name.endswith("lora_magnitude_vector")]
    assert len(names) == 4
    edit_tensors(
        folder / PEFT_FILES[1],
        {name: stored[name].reshape(shape) for name in names},
        rename={name: name + suffix for name in names},
    )
    fresh = tiny_llama()
    trimtab.load_adapter(fresh, folder)
    assert same_tensors(adapter_tensors(fresh), adapter_tensors(model))


def test_a_magnitude_in_a_square_is_refused(saved: tuple[nn.Module, Path], tiny_llama: Make) -> None:
    edit_tensors(saved[1] / PEFT_FILES[1], {f"{Q0}.lora_magnitude_vector": torch.ones(4, 4)})
    with pytest.raises(AdapterError, match=r"magnitude: expected \[16\], got \[4, 4\]"):
        trimtab.load_adapter(tiny_llama(), saved[1])


@pytest.mark.parametrize(("use_dora", "says"), [(True, "magnitude: expected .*, got nothing"), (False, "got .8")])
def test_a_switch_that_does_not_fit_the_tensors(
    use_dora: bool, says: str, saved: tuple[nn.Module, Path], tiny_llama: Make
) -> None:
    name = f"{Q0.replace('q_proj', 'v_proj')}.lora_magnitude_vector"
    edit_tensors(saved[1] / PEFT_FILES[1], {name: None} if use_dora else {})
    edit_json(saved[1] / PEFT_FILES[0], use_dora=use_dora)
    with pytest.raises(AdapterError, match=says):
        trimtab.load_adapter(tiny_llama(), saved[1])


# Patterns -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ({"q_proj": 5}, {"0.q_proj", "1.q_proj"}),
        ({"_proj": 5}, set()),  # whole parts of a name only
        ({".*_proj": 5}, {"0.q_proj", "1.q_proj", "0.v_proj", "1.v_proj"}),
        ({"self_attn.q_proj": 5}, {"0.q_proj", "1.q_proj"}),
        ({"model.layers.1.self_attn.v_proj": 5}, {"1.v_proj"}),
        ({r"^model\.layers\.1\..*": 5}, {"1.q_proj", "1.v_proj"}),
        ({r"^layers\.1\..*": 5}, set()),
        ({r"^model\.layers\.1\.self_attn\.v_proj": 5}, {"1.v_proj"}),
        ({r"layers\.[01]\.self_attn\.(q|k)_proj": 5}, {"0.q_proj", "1.q_proj"}),
        ({r"layers\.\d+\..*v_proj$": 5}, {"0.v_proj", "1.v_proj"}),
        ({r"layers\.\d{1,2}\..*v_proj": 5}, {"0.v_proj", "1.v_proj"}),
        ({r"(\w{1,6}\.){1,3}[01]\.\w{9}\.q_pro{,1}j": 5}, {"0.q_proj", "1.q_proj"}),
        ({r"layers\.\d{2}\..*v_proj": 5}, set()),
        ({r"layers\.1\.[a-z_{}]+\.v_proj": 5}, {"1.v_proj"}),
        ({"q_proj|v_proj": 5}, {"0.q_proj", "1.q_proj", "0.v_proj", "1.v_proj"}),
        ({"q": 5, "": 5}, set()),
        ({"k_proj": 5}, set()),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),
)
def test_which_modules_a_pattern_means(
    pattern: dict[str, Any], matched: set[str], saved: tuple[nn.Module, Path], tiny_llama: Make
) -> None:
    edit_json(saved[1] / PEFT_FILES[0], alpha_pattern=pattern)
    fresh = tiny_llama()
    trimtab.load_adapter(fresh, saved[1])
    assert {name: one.alpha for name, one in options(fresh).items()} == {
        name: 5 if name in matched else 3 for name in ("0.q_proj", "0.v_proj", "1.q_proj", "1.v_proj")
    }


def test_the_first_pattern_decides_and_ranks_are_read_alike(saved: tuple[nn.Module, Path], tiny_llama: Make) -> None:
    _, folder = saved
    edit_json(
        folder / PEFT_FILES[0],
        r=7,
        alpha_pattern={"v_proj": 5, r"layers\.1\..*": 6, "q_proj": 4.5},
        rank_pattern={r".*self_attn\..*": 2, "q_proj": 9},
        use_rslora=True,
    )
    fresh = tiny_llama()
    with pytest.warns(trimtab.TrimtabWarning, match="alpha_pattern has several values for 2 modules"):
        trimtab.load_adapter(fresh, folder)
    assert {name: one.alpha for name, one in options(fresh).items()} == {
        "0.q_proj": 4.5,
        "0.v_proj": 5,
        "1.q_proj": 6,
        "1.v_proj": 5,
    }
    assert {(one.rank, one.rank_stabilised) for one in options(fresh).values()} == {(2, True)}
    assert options(fresh)["0.q_proj"].scale == pytest.approx(4.5 / 2**0.5)


def test_where_two_patterns_match_the_one_that_has_the_stored_rank_is_read(
    saved: tuple[nn.Module, Path], tiny_llama: Make
) -> None:
    """PEFT sorts the patterns as it saves them: the first of the two was the second when the adapter was made."""
    _, folder = saved
    edit_json(folder / PEFT_FILES[0], r=9, rank_pattern={r"layers\.1\..*": 5, "q_proj": 2, "v_proj": 2})
    fresh = tiny_llama()
    trimtab.load_adapter(fresh, folder)
    assert {one.rank for one in options(fresh).values()} == {2}
    edit_json(folder / PEFT_FILES[0], r=2, rank_pattern={r"layers\.1\..*": 5})  # the only pattern is no second opinion
    with pytest.raises(AdapterError, match=r"q_proj\.A: expected \[5, 16\], got \[2, 16\]"):
        trimtab.load_adapter(tiny_llama(), folder)


def test_patterns_of_many_whole_names_are_quick() -> None:
    """As a plan with a rank for each of five thousand experts is saved: looked up, not tried one by one."""
    names = [f"model.layers.{layer}.experts.{expert}.up_proj" for layer in range(40) for expert in range(128)]
    decide = _peft_config.values({_peft_config.exactly(name): number for number, name in enumerate(names)})
    assert [list(decide(name)) for name in names] == [[number] for number in range(len(names))]
    assert not list(decide("x.model.layers.0.experts.0.up_proj"))


# Our header beside PEFT's configuration -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": 4},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 4}},
        {"r": 3},
        {"r": 4, "lora_alpha": 6},  # the same scale
        {"rank_pattern": {"q_proj": 1}},
        {"use_dora": False},
    ],
    ids=str,
)
def test_a_configuration_of_another_save_is_refused(changes: dict[str, Any], tiny_llama: Make, tmp_path: Path) -> None:
    model = trained(tiny_llama(), Rule(match=["*.q_proj", "*.v_proj"], method="dora", rank=2, alpha=3))
    trimtab.save_adapter(model, tmp_path)
    edit_json(tmp_path / PEFT_FILES[0], **changes)
    fresh = tiny_llama()
    before = state_of(fresh)
    with pytest.raises(AdapterError, match=r"is not the one that adapter_model\.safetensors was saved with"):
        trimtab.load_adapter(fresh, tmp_path)
    assert_unchanged(fresh, before)


@pytest.mark.parametrize("module", ["q_proj", "v_proj"])
def test_a_module_that_is_gone_is_missed(module: str, tiny_llama: Make, tmp_path: Path) -> None:
    model = trained(tiny_llama(), Rule(match=["*.q_proj", "*.v_proj"], method="lora", rank=2))
    trimtab.save_adapter(model, tmp_path)
    name = f"{Q0.replace('q_proj', module)}.lora"
    edit_tensors(tmp_path / PEFT_FILES[1], {f"{name}_A.weight": None, f"{name}_B.weight": None})
    with pytest.raises(AdapterError, match=rf"differ at 1 modules, such as model\.layers\.0\.self_attn\.{module}"):
        trimtab.load_adapter(tiny_llama(), tmp_path)


def test_the_class_decides_the_task(tiny_llama: Make, tmp_path: Path) -> None:
    body = tiny_llama().model
    body.config.architectures = ["LlamaForCausalLM"]  # as AutoModel.from_pretrained leaves it
    trimtab.save_adapter(trained(body, Rule(match="*.q_proj", method="lora", rank=2)), tmp_path)
    assert read_json(tmp_path / PEFT_FILES[0])["task_type"] is None
    trimtab.save_adapter(trained(tiny_llama(), Rule(match="*.q_proj", method="lora", rank=2)), tmp_path)
    assert read_json(tmp_path / PEFT_FILES[0])["task_type"] == "CAUSAL_LM"
