"""Surgery on a model with quantised layers: what a merge makes of them, and what detaching gives back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import trimtab
from contract_cases import QUANTISED, plain, quantise, stir
from trimtab import bases, methods

KINDS = sorted(QUANTISED)


@pytest.fixture
def model(request: pytest.FixtureRequest, tiny_llama: Callable[..., Any]) -> Any:
    """A Llama whose projections are quantised, as a configuration says that comes with it."""
    made = tiny_llama(hidden_size=64, intermediate_size=128)
    for module in list(made.model.modules()):
        for name, child in list(module._modules.items()):
            if type(child) is nn.Linear:
                module._modules[name] = quantise(child, request.param)
    made.config.quantization_config = {"quant_method": "bitsandbytes"}
    return made


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(6)[None]).logits


@pytest.mark.parametrize("method", methods.names("weight"))
@pytest.mark.parametrize("model", KINDS, indirect=True)
def test_merging_onto_the_dequantised_weight_is_exact(model: Any, method: str) -> None:
    """Equal to float32 rounding."""
    options: dict[str, Any] = {} if method == "full" else {"rank": 2}
    report = trimtab.attach(model, trimtab.Rule(match="*.[qv]_proj", method=method, magnitude=True, **options))
    assert report.total_parameters == sum(p.numel() for p in _dense_twin(model).parameters())
    stir(model, 0.02)
    before = logits(model)
    merged = trimtab.merge(model)
    assert len(merged.modules) == 4
    assert len(merged.dequantised) == 14
    assert "model.layers.0.self_attn.q_proj" in merged.dequantised
    assert merged.rounding < 1e-7
    assert not hasattr(model.config, "quantization_config")
    found = [base for module in model.modules() if (base := bases.find(module)) is not None]
    kinds = {type(base) for base in found if base.is_linear}
    assert {kind.__module__ for kind in kinds} == {"trimtab.bases.linear"}
    assert float((logits(model) - before).norm() / before.norm()) < 2e-6


def _dense_twin(model: Any) -> Any:
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(model.config)


@pytest.mark.parametrize("model", KINDS, indirect=True)
def test_merging_in_half_precision_takes_the_dtype_around(model: Any) -> None:
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point() and type(parameter) is nn.Parameter:
                parameter.data = parameter.data.bfloat16()
    trimtab.attach(model, trimtab.Rule(match="*.q_proj", method="dora", rank=2))
    trimtab.merge(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("model", KINDS, indirect=True)
def test_merging_and_quantising_anew(model: Any) -> None:
    trimtab.attach(model, trimtab.Rule(match="*.q_proj", method="dora", rank=2))
    stir(model, 0.02)
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    exact = [trimtab.effective_weight(model, name) for name in names]
    other = plain(model.model.layers[0].mlp.up_proj.weight).clone()
    report = trimtab.merge(model, onto="requantised")
    assert report.modules == tuple(names)
    assert report.dequantised == ()
    assert hasattr(model.config, "quantization_config")
    errors = []
    for name, weight in zip(names, exact, strict=True):
        base = bases.find(model.get_submodule(name))
        assert base is not None
        assert not base.stored_dense
        errors.append(float((base.weight() - weight).norm() / weight.norm()))
    assert report.rounding == pytest.approx(max(errors), rel=1e-3)
    assert 0.001 < report.rounding < 0.2
    assert torch.equal(plain(model.model.layers[0].mlp.up_proj.weight), other)


def test_an_unknown_target_says_how_to_reach_the_original_weights() -> None:
    with pytest.raises(trimtab.SurgeryError, match="load the model unquantised"):
        trimtab.merge(nn.Sequential(nn.Linear(4, 4)), onto="original")  # type: ignore[arg-type]


@pytest.mark.parametrize("model", KINDS, indirect=True)
def test_a_merge_that_is_refused_changes_nothing(model: Any) -> None:
    trimtab.attach(model, trimtab.Rule(match="*.q_proj", method="lora", rank=2))
    with torch.no_grad():
        next(iter(trimtab.trainable_parameters(model).values())).fill_(float("nan"))
    with pytest.raises(trimtab.SurgeryError, match="NaN"):
        trimtab.merge(model)
    base = model.model.layers[0].self_attn.q_proj.handle
    assert not base.stored_dense


@pytest.mark.parametrize("model", KINDS, indirect=True)
def test_evaluating_between_steps_changes_nothing_and_detaching_gives_all_back(model: Any) -> None:
    before = {name: plain(value).clone() for name, value in model.state_dict().items()}
    ends = []
    ids = torch.arange(12).view(2, 6)
    for look in (False, True):
        torch.default_generator.manual_seed(3)
        trimtab.attach(model, trimtab.Rule(match="all-linear", method="dora", rank=2))
        optimiser = torch.optim.AdamW(trimtab.trainable_parameters(model).values(), lr=1e-2)
        for _ in range(2):
            model.train()(input_ids=ids, labels=ids).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            if look:
                model.eval()
                with torch.no_grad():
                    model(ids)
                with torch.inference_mode():
                    model(ids)
        ends.append([value.detach().clone() for value in trimtab.trainable_parameters(model).values()])
        trimtab.detach(model)
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(plain(after[name]), value) for name, value in before.items())
