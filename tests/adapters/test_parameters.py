"""Adapters of experts in folders: as PEFT has them (``target_parameters``), and those that transformers 4 made, whose
experts were modules of their own. PEFT reads and writes both, and its outputs are what ours are held against."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import expert_models
import trimtab
from contract_cases import stir
from expert_models import made

# PEFT says so of patterns for parameters, and follows them for all that.
pytestmark = pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")

SUFFIXES = {
    "qwen3_moe": ["experts.down_proj", "experts.gate_up_proj"],
    "gpt_oss": ["experts.down_proj", "experts.gate_up_proj"],
    "llama4": ["experts.down_proj", "experts.gate_up_proj"],
    "jetmoe": ["mlp.input_linear.weight", "experts.output_linear.weight"],
}
PATTERNS = {"rank_pattern": {r".*\.down_proj": 3}, "alpha_pattern": {"gate_up_proj": 7}, "use_rslora": True}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(expert_models.tokens()).logits
    return found


def peft_folder(model: nn.Module, folder: Path, **settings: Any) -> Tensor:
    """Write a folder as PEFT does, with values in all its tensors; return the outputs of PEFT's model."""
    import peft

    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, lora_alpha=5, **settings)).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    wrapped.save_pretrained(folder)
    return logits(wrapped)


@pytest.mark.parametrize("settings", [{}, PATTERNS], ids=["one rank", "patterns"])
@pytest.mark.parametrize("name", SUFFIXES)
def test_a_folder_with_target_parameters_gives_pefts_outputs_and_goes_back(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    import peft

    model = made(name).eval()
    linear = ["kv_proj"] if name == "jetmoe" else ["q_proj"]
    expected = peft_folder(
        model, tmp_path / "theirs", target_modules=linear, target_parameters=SUFFIXES[name], **settings
    )
    assert (expected - logits(model)).abs().max() > 1e-3
    ours = copy.deepcopy(model)
    trimtab.load_adapter(ours, tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), expected, rtol=0, atol=1e-5)

    trimtab.save_adapter(ours, tmp_path / "ours")
    theirs, again = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("theirs", "ours"))
    torch.testing.assert_close(again, theirs, rtol=0, atol=0)
    back = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(back), expected, rtol=0, atol=1e-6)
    loaded = copy.deepcopy(model)
    trimtab.load_adapter(loaded, tmp_path / "ours")
    assert torch.equal(logits(loaded), logits(ours))


def test_one_of_two_parameters_is_the_one_that_was_named(tmp_path: Path) -> None:
    model = made("qwen3_moe").eval()
    for parameter in ("down_proj", "gate_up_proj"):
        expected = peft_folder(
            model, tmp_path / parameter, target_modules=[], target_parameters=[f"experts.{parameter}"]
        )
        ours = copy.deepcopy(model)
        report = trimtab.load_adapter(ours, tmp_path / parameter)
        assert {module.name.rpartition(".")[2] for module in report.modules} == {parameter}
        torch.testing.assert_close(logits(ours), expected, rtol=0, atol=1e-5)


def test_what_peft_has_not_of_experts_is_kept_in_our_own_format(tmp_path: Path) -> None:
    for number, options in enumerate([{"method": "dora"}, {"method": "lora", "dropout": 0.1}]):
        model = made("qwen3_moe")
        trimtab.attach(model, trimtab.Rule(match="*.experts", rank=2, **options))
        trimtab.save_adapter(model, tmp_path / str(number))
        assert (tmp_path / str(number) / "trimtab.json").is_file()


def separate(blocks: str, leaves: tuple[str, str, str], *, rank: int = 2, dora: bool = False) -> dict[str, Tensor]:
    """The tensors of an adapter of transformers 4 on every expert and router of the models below."""
    tensors = {}
    widths = {leaves[0]: (24, 16), leaves[1]: (24, 16), leaves[2]: (16, 24)}
    for layer in range(2):
        block = f"base_model.model.model.layers.{layer}.{blocks}"
        places = {f"{block}.experts.{expert}.{leaf}": size for expert in range(5) for leaf, size in widths.items()}
        for place, (rows, columns) in (places | {f"{block}.gate": (5, 16)}).items():
            tensors[f"{place}.lora_A.weight"] = torch.randn(rank, columns) * 0.3
            tensors[f"{place}.lora_B.weight"] = torch.randn(rows, rank) * 0.3
            if dora:
                tensors[f"{place}.lora_magnitude_vector"] = torch.rand(rows) + 0.5
    return tensors


def write(folder: Path, tensors: dict[str, Tensor], **settings: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({key.split(".lora_")[0].rpartition(".")[2] for key in tensors})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 5, "target_modules": targets, "bias": "none", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


OLD = {
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
}


@pytest.mark.parametrize("name", OLD)
def test_experts_that_were_modules_of_their_own_are_loaded_onto_the_stacks_as_peft_does(
    name: str, tmp_path: Path
) -> None:
    import peft

    model = made(name).eval()
    folder = write(tmp_path / "old", separate(*OLD[name]))
    expected = logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval())
    assert (expected - logits(model)).abs().max() > 1e-3
    ours = copy.deepcopy(model)
    report = trimtab.load_adapter(ours, folder)
    assert {module.name.rpartition(".")[2] for module in report.modules} == {"gate_up_proj", "down_proj", "weight"}
    torch.testing.assert_close(logits(ours), expected, rtol=0, atol=1e-5)


def effective(weight: Tensor, tensors: dict[str, Tensor], place: str, scale: float) -> Tensor:
    """The weight of one module of before, by the plain formula in float64; unchanged where it has no adapter."""
    if f"{place}.lora_A.weight" not in tensors:
        return weight.double()
    a, b = (tensors[f"{place}.lora_{one}.weight"].double() for one in "AB")
    total = weight.double() + scale * b @ a
    magnitude = tensors.get(f"{place}.lora_magnitude_vector")
    return total if magnitude is None else total * (magnitude.double() / total.norm(dim=1)).unsqueeze(1)


@pytest.mark.parametrize("dora", [False, True])
def test_experts_with_ranks_and_scales_of_their_own_and_experts_without_any_are_exact(
    dora: bool, tmp_path: Path
) -> None:
    model = made("qwen3_moe").eval()
    tensors = separate("mlp", ("gate_proj", "up_proj", "down_proj"), dora=dora)
    tensors = {key: value for key, value in tensors.items() if ".experts.3." not in key and ".gate." not in key}
    for key, value in tensors.items():  # the ups have rank 1
        if "up_proj.lora_A" in key:
            tensors[key] = value[:1].clone()
        elif "up_proj.lora_B" in key:
            tensors[key] = value[:, :1].clone()
    patterns = {"rank_pattern": {"up_proj": 1}, "alpha_pattern": {"up_proj": 3}}
    trimtab.load_adapter(model, write(tmp_path / "old", tensors, use_dora=dora, **patterns))
    bare = made("qwen3_moe")
    for layer in range(2):
        place = f"model.layers.{layer}.mlp.experts"
        gate_up, down = (bare.get_parameter(f"{place}.{one}").detach() for one in ("gate_up_proj", "down_proj"))
        parts = [
            ("gate_up_proj", gate_up, [("gate_proj", slice(0, 24), 2.5), ("up_proj", slice(24, 48), 3.0)]),
            ("down_proj", down, [("down_proj", slice(0, 16), 2.5)]),
        ]
        for parameter, stack, leaves in parts:
            for expert in range(5):
                rows = [
                    effective(stack[expert, own], tensors, f"base_model.model.{place}.{expert}.{leaf}", scale)
                    for leaf, own, scale in leaves
                ]
                got = trimtab.effective_weight(model, f"{place}.{parameter}")[expert]
                torch.testing.assert_close(got.double(), torch.cat(rows), rtol=0, atol=1e-6)


def test_an_old_experts_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    model = made("qwen3_moe")
    before = copy.deepcopy(model.state_dict())
    tensors = separate("mlp", ("gate_proj", "up_proj", "down_proj"))
    key = "base_model.model.model.layers.1.mlp.experts.2.up_proj.lora_B.weight"
    tensors[key] = torch.randn(25, 2)
    with pytest.raises(trimtab.AdapterError, match=r"layers\.1\.mlp\.experts\.gate_up_proj, expert 2: .*\[24, 2\]"):
        trimtab.load_adapter(model, write(tmp_path / "old", tensors))
    tensors = {"base_model.model.model.layers.0.mlp.experts.5.up_proj.lora_A.weight": torch.randn(2, 16)}
    with pytest.raises(trimtab.AdapterError, match=r"made for another model.*experts\.5\.up_proj"):
        trimtab.load_adapter(model, write(tmp_path / "sixth", tensors))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def test_a_merged_model_of_old_experts_is_what_the_adapter_computed(tmp_path: Path) -> None:
    model = made("qwen3_moe").eval()
    trimtab.load_adapter(model, write(tmp_path / "old", separate("mlp", ("gate_proj", "up_proj", "down_proj"))))
    stir(model)
    outputs = logits(model)
    trimtab.merge(model)
    torch.testing.assert_close(logits(model), outputs, rtol=0, atol=1e-6)
