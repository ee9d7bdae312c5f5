"""Models that are quantised while they are loaded, and adapters on them in PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trimtab
from trimtab import bases
from trimtab.errors import ModelError
from trimtab.export.merged import save
from trimtab.models.load import load_model
from trimtab.models.locate import locate

KINDS = bases.quantised_names()
BITSANDBYTES = ["int8", "nf4"]
# In bitsandbytes 0.50 a row of a 4-bit weight must be whole blocks of 64, or its own product is wrong.
SIZES = {"hidden_size": 64, "intermediate_size": 128}


@pytest.mark.parametrize(
    ("kind", "size"), [("int8", 1 + 4 / 4096), ("nf4", 0.5 + 1 / 64 + 4 / 64 / 256), ("torchao_int8", 1 + 5 / 4096)]
)
def test_stored_bytes_of_a_weight(kind: str, size: float) -> None:
    got = bases.quantised_base(kind).stored_bytes((4096, 4096), torch.bfloat16)
    assert 0 <= got - size * 4096**2 <= 2048  # the tables of nf4


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Callable[..., Any]) -> Path:
    """A model in bfloat16, in two shards."""
    tiny_llama(**SIZES).bfloat16().save_pretrained(tmp_path / "tiny", max_shard_size="60KB")
    assert len(list((tmp_path / "tiny").glob("*.safetensors"))) > 1
    return tmp_path / "tiny"


def config_of(kind: str) -> Any:
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def theirs(folder: Path, kind: str) -> Any:
    """The model as transformers and bitsandbytes load it, in training mode: evaluated, both kinds go wrong on a
    processor."""
    from transformers import AutoModelForCausalLM

    options = {"quantization_config": config_of(kind), "device_map": {"": "cpu"}, "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(folder, **options).train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_but_the_head_is_quantised(folder: Path, kind: str, dtype: torch.dtype) -> None:
    plain, model = load_model(locate(str(folder)), dtype), load_model(locate(str(folder)), dtype, quantisation=kind)
    assert not model.training
    assert model.dtype == dtype
    seen = 0
    for (name, before), after in zip(plain.named_modules(), model.modules(), strict=True):
        if type(before) is nn.Linear and name != "lm_head":
            base = bases.find(after)
            assert base is not None
            assert type(base).__module__ == f"trimtab.bases.{kind}"
            dense = bases.find(before)
            assert dense is not None
            again = bases.find(bases.quantise(dense, kind))
            assert again is not None
            assert base.dtype == dtype
            assert torch.equal(base.weight(), again.weight()), name
            seen += 1
        else:
            assert type(after) is type(before)
            for key, parameter in before.named_parameters(recurse=False):
                assert torch.equal(after.get_parameter(key), parameter), (name, key)
    assert seen == 14
    ids = torch.arange(6)[None]
    first = model(ids).logits
    assert torch.equal(model(ids).logits, first)
    assert torch.equal(model.train()(ids).logits, first), "the same function in training and when evaluated"


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_the_weights_are_those_of_bitsandbytes(folder: Path, kind: str) -> None:
    ours, other = load_model(locate(str(folder)), quantisation=kind), theirs(folder, kind)
    for mine, foreign in zip(ours.modules(), other.modules(), strict=True):
        one, two = bases.find(mine), bases.find(foreign)
        if one is not None:
            assert two is not None
            assert torch.equal(one.weight(torch.float32), two.weight(torch.float32))


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_the_adapter_loads_in_peft(folder: Path, kind: str, method: str, tmp_path: Path) -> None:
    """On the base that bitsandbytes quantises, and on ours. Float32 rounding over two blocks."""
    from peft import PeftModel

    model = load_model(locate(str(folder)), quantisation=kind)
    trimtab.attach(model, trimtab.Rule(match="all-linear", method=method, rank=2))
    with torch.no_grad():
        for parameter in trimtab.trainable_parameters(model).values():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter)).add_(0.02 * torch.randn_like(parameter))
    trimtab.save_adapter(model, tmp_path / "adapter")
    ids = torch.arange(6)[None]
    want = model(ids).logits
    for base in (theirs(folder, kind), load_model(locate(str(folder)), quantisation=kind)):
        got = PeftModel.from_pretrained(base, tmp_path / "adapter").train()(ids).logits
        assert float((got - want).detach().norm() / want.detach().norm()) < 2e-5
    other = load_model(locate(str(folder)), quantisation=kind)
    trimtab.load_adapter(other, tmp_path / "adapter")
    assert torch.equal(other(ids).logits, want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_requantised_model_is_written_and_read_again(
    folder: Path, kind: str, tmp_path: Path, model_tokenizer: Any
) -> None:
    from transformers import AutoModelForCausalLM

    model = load_model(locate(str(folder)), quantisation=kind)
    trimtab.attach(model, trimtab.Rule(match="*.q_proj", method="lora", rank=2))
    report = trimtab.merge(model, onto="requantised")
    assert 0 <= report.rounding < 0.2
    save(model, model_tokenizer, tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map={"": "cpu"})
    for mine, foreign in zip(model.modules(), again.modules(), strict=True):
        one, two = bases.find(mine), bases.find(foreign)
        if one is not None:
            assert two is not None
            assert torch.equal(one.weight(torch.float32), two.weight(torch.float32))
    with pytest.raises(ModelError, match="quantised already"):
        load_model(locate(str(tmp_path / "merged")), quantisation=kind)


@pytest.fixture
def model_tokenizer() -> Any:
    from tiny_runs import tiny_tokenizer

    return tiny_tokenizer()
