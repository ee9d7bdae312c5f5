"""What an adapter was converted to, in PEFT; and PEFT's own conversion of the same adapters, which is never nearer."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, convert_to_lora as peft_conversion
from torch import Tensor, nn

import trimtab
from trimtab.surgery.adapted import adapted_modules

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def stirred(model: nn.Module, rules: list[dict[str, Any]], by: float, magnitudes: float) -> Any:
    trimtab.attach(model, [trimtab.Rule(**rule) for rule in rules])
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in trimtab.trainable_parameters(model).items():
            noise = torch.randn(parameter.shape, generator=draw).to(parameter)
            if name.endswith("magnitude"):
                parameter.mul_(1 + magnitudes * noise)
            else:
                parameter.add_(by * noise)
    return model.eval()


@pytest.fixture
def llama(tiny_llama: Callable[..., Any]) -> Any:
    torch.manual_seed(0)
    return tiny_llama(hidden_size=32, intermediate_size=48).eval()


@torch.no_grad()
def test_peft_computes_what_a_mix_of_methods_became(llama: Any, tmp_path: Path) -> None:
    rules: list[dict[str, Any]] = [
        {"match": "all-linear", "method": "dora", "rank": 3},
        {"match": "*.v_proj", "method": "mora", "rank": 2},
        {"match": "*.down_proj", "method": "full"},
        {"match": "*.o_proj", "method": "lora", "rank": 2, "dropout": 0.1},
        {"match": "*.embed_tokens", "method": "dora", "rank": 2},
        {"match": "model.norm", "method": "full"},
    ]
    model = stirred(copy.deepcopy(llama), rules, 0.03, 0.2)
    ids = torch.arange(2, 20)[None]
    before = model(ids).logits
    report = trimtab.convert_to_lora(model, 32, [ids])
    trimtab.save_adapter(model, tmp_path)
    assert list(report.kept) == ["model.norm"]
    theirs = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path).eval()
    assert torch.allclose(theirs(ids).logits, before, **CLOSE)
    config = theirs.peft_config["default"]
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (32, 32, {}, {})
    assert not config.use_dora
    again = copy.deepcopy(llama)
    trimtab.load_adapter(again, tmp_path)
    assert torch.allclose(again(ids).logits, before, **CLOSE)


@torch.no_grad()
def test_peft_computes_what_ranks_by_module_became(llama: Any, tmp_path: Path) -> None:
    model = stirred(copy.deepcopy(llama), [{"match": "all-linear", "method": "mora", "rank": 3}], 0.05, 0)
    ids = torch.arange(2, 20)[None]
    report = trimtab.convert_to_lora(model, None, [ids], error=0.2)
    assert len(set(report.ranks.values())) > 1
    trimtab.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path).eval()
    assert torch.allclose(theirs(ids).logits, model(ids).logits, **CLOSE)


@torch.no_grad()
def test_peft_computes_what_other_kinds_of_layer_became(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    torch.backends.mha.set_fastpath_enabled(False)  # which passes by PEFT's adapters
    request.addfinalizer(lambda: torch.backends.mha.set_fastpath_enabled(True))
    torch.manual_seed(0)
    image = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 4, 2, stride=2)).eval()
    attention: Any = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0).eval()
    cases: list[tuple[str, Any, list[dict[str, Any]], Tensor]] = [
        ("image", image, [{"match": "*", "method": "full"}], torch.randn(2, 3, 8, 8)),
        (
            "attention",
            nn.Sequential(attention),
            [{"match": "all-linear", "method": "dora", "rank": 2}],
            torch.randn(2, 5, 16),
        ),
    ]
    for name, base, rules, x in cases:
        model = stirred(copy.deepcopy(base), rules, 0.05, 0.1)
        before = model(x)
        trimtab.convert_to_lora(model, 24, [x])
        trimtab.save_adapter(model, tmp_path / name)
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name).eval()
        assert torch.allclose(theirs(x), before, **CLOSE), name


def put(model: Any, tensors: dict[str, Tensor]) -> Any:
    """``model`` with PEFT's factors added to its weights; their scale is one."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for key, a in tensors.items():
            name, _, kind = key.removeprefix("base_model.model.").partition(".lora_")
            if kind == "A.weight":
                modules[name].weight += tensors[key.replace("lora_A", "lora_B")] @ a
    return model


@pytest.mark.full
@torch.no_grad()
def test_no_adapter_is_nearer_by_pefts_own_conversion(llama: Any, tmp_path: Path) -> None:
    """Without rows by the change of the weights; with rows by that of the outputs, and by the KL divergence."""
    ids = [torch.randint(2, 32, (2, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    weights = {name: module.weight.clone() for name, module in llama.named_modules() if isinstance(module, nn.Linear)}
    seen = []
    sizes = [("lora", 0.05, 0.0), ("dora", 0.05, 0.01), ("dora", 0.02, 0.3), ("dora", 0.0, 0.3)]
    for (method, by, magnitudes), rank in itertools.product(sizes, (2, 6, 12)):
        rules = [{"match": "all-linear", "method": method, "rank": 6}]
        exact = stirred(copy.deepcopy(llama), rules, by, magnitudes)
        folder = tmp_path / f"{method}-{by}-{magnitudes}"
        trimtab.save_adapter(exact, folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a LoRA adapter is one already, which it says of DoRA, too
            _, tensors = peft_conversion(PeftModel.from_pretrained(copy.deepcopy(llama), folder), rank)
        theirs = put(copy.deepcopy(llama), tensors)
        deltas = {name: trimtab.effective_weight(exact, name) - weights[name] for name, _ in adapted_modules(exact)}
        off = sum(
            float((theirs.get_submodule(name).weight - weights[name] - delta).square().sum())
            for name, delta in deltas.items()
        )
        size = sum(float(delta.square().sum()) for delta in deltas.values())
        plain = trimtab.convert_to_lora(copy.deepcopy(exact), rank)
        assert plain.error <= (off / size) ** 0.5 * (1 + 1e-5) + 1e-6
        ours = trimtab.convert_to_lora(copy.deepcopy(exact), rank, ids)
        assert ours.logits is not None
        assert ours.logits.kl is not None
        want, got = (torch.cat([model(one).logits.flatten(0, 1) for one in ids]).double() for model in (exact, theirs))
        difference = float((got - want).norm() / want.norm())
        said = want.log_softmax(-1)
        kl = float((said.exp() * (said - got.log_softmax(-1))).sum(-1).mean())
        assert ours.logits.difference <= difference * (1 + 1e-3) + 1e-6, (method, by, magnitudes, rank)
        assert ours.logits.kl <= kl * (1 + 1e-3) + 1e-10, (method, by, magnitudes, rank)
        seen.append((kl, ours.logits.kl))
    assert sum(ours < kl / 2 for kl, ours in seen) >= 6, "and much nearer where there are magnitudes"
