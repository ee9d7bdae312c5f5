"""Any adapter as plain LoRA: exact where it can be, the best product where it cannot, and an honest word about both."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab
from contract_cases import QUANTISED, quantise
from expert_models import qwen3_moe
from named_adapters import PLANS, Every, ids, together_and_alone
from trimtab.surgery import convert
from trimtab.surgery.adapted import adapted_modules

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 3, "rank_stabilised": True},
    "dora": {"method": "dora", "rank": 3},
    "magnitude alone": {"method": "dora", "rank": 0},
    "columns": {"method": "dora", "rank": 2, "magnitude_axis": "input"},
    "mora": {"method": "mora", "rank": 2},
    "mora with magnitude": {"method": "mora", "rank": 2, "form": "sharing", "magnitude": True},
    "full": {"method": "full"},
    "full with magnitude": {"method": "full", "magnitude": True},
}


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10), nn.Tanh(), nn.Linear(10, 6)).to(dtype)


def stirred(model: nn.Module, *rules: dict[str, Any], by: float = 0.1) -> Any:
    """``model`` with adapters that are trained by a random step."""
    trimtab.attach(model, trimtab.Plan(list(rules)))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trimtab.trainable_parameters(model).items():
            noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64).to(parameter)
            if name.endswith("magnitude"):
                parameter.mul_(1 + 3 * by * noise)
            else:
                parameter.add_(by * noise)
    return model.eval()


def inputs(count: int = 40, features: int = 12, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(2)
    scales = torch.logspace(0, -2, features)
    return [(torch.randn(5, features, generator=draw) * scales).to(dtype) for _ in range(count)]


def changes(model: Any, bare: Any) -> dict[str, Tensor]:
    """``W' - W`` of every adapted layer, in float64."""
    own = dict(bare.named_modules())
    return {
        name: trimtab.effective_weight(model, name).double() - own[name].weight.detach().double()
        for name, _ in adapted_modules(model)
    }


@pytest.mark.parametrize("rule", METHODS.values(), ids=METHODS)
def test_a_rank_that_suffices_loses_nothing(rule: dict[str, Any]) -> None:
    model = stirred(network(), {"match": "*", **rule})
    x = inputs(1)[0]
    before, wanted = model(x), changes(model, network())
    report = trimtab.convert_to_lora(model, rank=16, rows=inputs(3))
    assert {module.method for _, module in adapted_modules(model)} == {"lora"}
    assert all(module.adapter.magnitude is None for _, module in adapted_modules(model))
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)
    for name, delta in changes(model, network()).items():
        torch.testing.assert_close(delta, wanted[name], rtol=1e-9, atol=1e-9)
    assert report.error < 1e-9
    assert report.logits is not None
    assert report.logits.kl is not None
    assert report.logits.kl < 1e-12
    assert report.logits.agreement == 1.0
    assert report.modules["0"].method == rule["method"]
    assert report.modules["0"].bound < 1e-9


@pytest.mark.parametrize("weighed", [False, True])
def test_what_the_report_says_is_what_the_plain_formulas_say(weighed: bool) -> None:
    model = stirred(network(), {"match": "*", "method": "dora", "rank": 3}, {"match": "2", "method": "mora", "rank": 2})
    rows = inputs()
    exact, before = copy.deepcopy(model), changes(model, network())
    report = trimtab.convert_to_lora(model, rank=4, rows=rows if weighed else None)
    after = changes(model, network())
    x = torch.cat(rows)
    size = math.sqrt(sum(float(one.square().sum()) for one in before.values()))
    assert report.error == pytest.approx(
        math.sqrt(sum(float((after[name] - before[name]).square().sum()) for name in before)) / size, rel=1e-9
    )
    fed = {"0": x, "2": exact[:2](x).detach(), "4": exact[:4](x).detach()}
    for name, one in report.modules.items():
        off = after[name] - before[name]
        assert one.rank == 4
        assert one.error == pytest.approx(float(off.norm() / before[name].norm()), rel=1e-9)
        values = torch.linalg.svdvals(before[name])
        if not weighed:
            assert one.output_error is None
            assert one.bound == pytest.approx(float(values[4]), rel=1e-9)
            assert one.error == pytest.approx(float(values[4:].norm() / values.norm()), rel=1e-9)
            assert one.rank_for(0.3) == next(k for k in range(99) if values[k:].norm() <= 0.3 * values.norm())
            continue
        lost, all_of_it = (float((fed[name] @ delta.T).norm()) for delta in (off, before[name]))
        assert one.output_error == pytest.approx(lost / all_of_it, rel=1e-6)
        best = torch.linalg.svdvals(before[name] @ fed[name].T)
        assert lost <= float(best[4:].norm()) * 1.02, "next to none better"
        assert float(torch.linalg.matrix_norm(fed[name] @ off.T, 2)) <= one.bound * math.sqrt(len(x)) * (1 + 1e-9)
    worst = {name: one.output_error if weighed else one.error for name, one in report.modules.items()}
    assert report.worst == max(worst, key=lambda name: worst[name] or 0)
    if weighed:
        old_x, new_x = exact(x).detach(), model(x).detach()
        old, new = old_x.log_softmax(-1), new_x.log_softmax(-1)
        assert report.logits is not None
        assert report.logits.kl == pytest.approx(float((old.exp() * (old - new)).sum(-1).mean()), rel=1e-9)
        assert report.logits.agreement == float((old.argmax(-1) == new.argmax(-1)).double().mean())
        assert report.logits.difference == pytest.approx(float((new_x - old_x).norm() / old_x.norm()))
        assert report.logits.count == 200


def test_weighing_by_rows_brings_the_outputs_of_other_rows_nearer() -> None:
    rows, others = inputs(60)[:40], torch.cat(inputs(60)[40:])
    model = stirred(network(), {"match": "*", "method": "dora", "rank": 3})
    off = []
    for given in (None, rows):
        one = copy.deepcopy(model)
        trimtab.convert_to_lora(one, rank=3, rows=given)
        off.append(float((one(others) - model(others)).detach().norm()))
    assert off[1] < 0.7 * off[0]


@pytest.mark.parametrize("weighed", [False, True])
def test_an_error_chooses_the_lowest_rank_of_each_module(weighed: bool) -> None:
    model = stirred(network(), {"match": "*", "method": "mora", "rank": 3}, {"match": "0", "method": "lora", "rank": 2})
    start = copy.deepcopy(model)
    report = trimtab.convert_to_lora(model, None, inputs() if weighed else None, error=0.1)
    assert report.modules["0"].rank == 2
    assert all(one.judged <= 0.1 + 1e-9 for one in report.modules.values())
    assert report.ranks == report.rank_for(0.1) | {"0": 2}
    for name in ("2", "4"):
        lower = copy.deepcopy(start)
        rank = report.modules[name].rank - 1
        assert trimtab.convert_to_lora(lower, rank, inputs() if weighed else None).modules[name].judged > 0.1
    capped = trimtab.convert_to_lora(start, 2, error=0.1)
    assert set(capped.ranks.values()) == {2}
    assert capped.modules[capped.worst].judged > 0.1


def test_all_modules_have_one_rank_and_the_scale_1() -> None:
    model = stirred(network(), {"match": "*", "method": "dora", "rank": 3}, {"match": "4", "method": "lora", "rank": 2})
    exact = changes(model, network())["4"]
    report = trimtab.convert_to_lora(model, rank=5)
    assert set(report.ranks.values()) == {5}
    for _, module in adapted_modules(model):
        assert module.adapter.options.scale == 1
        assert module.adapter.A.shape[0] == module.adapter.B.shape[1] == 5
    torch.testing.assert_close(changes(model, network())["4"], exact), "plain LoRA is kept as it is"
    assert trimtab.convert_to_lora(stirred(network(), {"match": "*", "rank": 2, "method": "lora"})).ranks["0"] == 2


def test_the_model_stays_as_it_is_in_all_else() -> None:
    model = stirred(network(), {"match": "*", "method": "dora", "rank": 3})
    model[0].base.bias.requires_grad_(True)  # unfrozen by hand
    model.train()
    model[2].eval()
    trimtab.convert_to_lora(model, 4, inputs(2))
    assert model[0].training
    assert model[0].adapter.training
    assert not model[2].training
    names = set(trimtab.trainable_parameters(model))
    assert names == {"0.base.bias"} | {f"{at}.adapter.{factor}" for at in (0, 2, 4) for factor in "AB"}
    model(inputs(1)[0]).sum().backward()
    trimtab.detach(model)
    for one, other in zip(model.parameters(), network().parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_trained_bias_stays_beside_it() -> None:
    model = stirred(
        network(), {"match": "0", "method": "dora", "rank": 2, "bias": True}, {"match": "2", "method": "full"}
    )
    with torch.no_grad():
        model[2].adapter.bias.copy_(model[2].base.bias)  # which was not trained after all
    x = inputs(1)[0]
    before = model(x)
    trimtab.convert_to_lora(model, 16)
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)
    assert model[0].adapter.bias is not None
    assert model[2].adapter.bias is None


def test_what_cannot_become_lora_is_named_and_kept() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    stirred(model, {"match": "*", "method": "full"})
    x = torch.arange(20)
    before = model(x)
    report = trimtab.convert_to_lora(model, 8)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    assert set(report.modules) == {"0", "2"}
    assert list(report.kept) == ["1"]
    assert "LayerNorm" in report.kept["1"]
    assert model[1].method == "full"
    rows = stirred(nn.Sequential(nn.Embedding(20, 8)), {"match": "0", "method": "full", "rows": [3, 7]})
    with pytest.raises(trimtab.SurgeryError, match="2 of its rows"):
        trimtab.convert_to_lora(rows)


def test_the_head_of_a_task_is_kept_whole() -> None:
    """Where the base is loaded again, its head is drawn anew: a change of it would be added to other numbers."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: Any = BertForSequenceClassification(BertConfig(vocab_size=30, num_labels=3, **sizes)).eval()
    rules = [{"match": ["*.query", "*.output.dense"], "method": "dora", "rank": 2}]
    stirred(model, *rules, {"match": ["classifier", "*.pooler.dense", "*.word_embeddings"], "method": "full"})
    tokens = torch.arange(1, 9)[None]
    before = model(tokens).logits
    report = trimtab.convert_to_lora(model, 16, [{"input_ids": tokens}])
    assert set(report.kept) == {"classifier", "bert.pooler.dense"}
    assert report.modules["bert.embeddings.word_embeddings"].method == "full"
    torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-5)


def test_refusals_leave_the_model_as_it_was() -> None:
    model = stirred(network(), {"match": "*", "method": "dora", "rank": 3})
    x = inputs(1)[0]
    before = model(x)
    with pytest.raises(trimtab.SurgeryError, match="row 2"):
        trimtab.convert_to_lora(model, 4, [x, torch.zeros(3, 5, dtype=torch.float64)])
    with pytest.raises(trimtab.SurgeryError, match="row 1 is a str"):
        trimtab.convert_to_lora(model, 4, ["text"])
    with pytest.raises(trimtab.SurgeryError, match="there are none"):
        trimtab.convert_to_lora(model, 4, iter(()))
    with pytest.raises(trimtab.SurgeryError, match="expected an iterable"):
        trimtab.convert_to_lora(model, 4, x)
    with pytest.raises(trimtab.SurgeryError, match="not finite"):
        trimtab.convert_to_lora(model, 4, [x * math.nan])
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(trimtab.SurgeryError, match="rank: expected"):
            trimtab.convert_to_lora(model, wrong)  # type: ignore[arg-type]
    with pytest.raises(trimtab.SurgeryError, match="error: expected"):
        trimtab.convert_to_lora(model, error=1.5)
    with trimtab.disable_adapter(model), pytest.raises(trimtab.SurgeryError, match="leave that context first"):
        trimtab.convert_to_lora(model)
    with trimtab.per_row(model, ["default"] * 5), pytest.raises(trimtab.SurgeryError, match="leave that context first"):
        trimtab.convert_to_lora(model)
    assert model[0].method == "dora"
    assert torch.equal(model(x), before)
    with torch.no_grad():
        model[2].adapter.B[0, 0] = math.inf
    with pytest.raises(trimtab.SurgeryError, match=r"2\.B holds NaN or infinity"):
        trimtab.convert_to_lora(model)
    with pytest.raises(trimtab.SurgeryError, match="no adapters"):
        trimtab.convert_to_lora(network())


def test_a_block_has_no_weight_to_convert(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    trimtab.attach(model, trimtab.Rule(match="*.mlp", method="parallel"))
    with pytest.raises(trimtab.SurgeryError, match="sits on a block"):
        trimtab.convert_to_lora(model)


def test_rows_that_do_not_fit_at_once_are_gone_through_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = stirred(network(), {"match": "*", "method": "dora", "rank": 3})
    other = copy.deepcopy(model)
    trimtab.convert_to_lora(model, 4, inputs(6))
    monkeypatch.setattr(convert, "_MOMENTS_AT_ONCE", 1)
    done: list[tuple[int, int]] = []
    trimtab.convert_to_lora(other, 4, iter(inputs(6)), progress=lambda *at: done.append(at))
    assert done == [(1, 3), (2, 3), (3, 3)]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor)


def test_padding_counts_nowhere(tiny_llama: Callable[..., Any]) -> None:
    model = stirred(tiny_llama(), {"match": "all-linear", "method": "dora", "rank": 4})
    ids = [torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9, 10]])]
    apart = [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    together = [{"input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 3, 3]]), "attention_mask": mask}]
    reports = [trimtab.convert_to_lora(copy.deepcopy(model), 2, rows) for rows in (apart, together)]
    one, other = (report.logits for report in reports)
    assert one is not None
    assert other is not None
    assert one.count == other.count == 6
    assert one.kl == pytest.approx(other.kl, rel=1e-3)
    assert reports[0].output_error == pytest.approx(reports[1].output_error, rel=1e-3)


def test_a_tied_embedding_and_head_stay_one(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    rules = [{"match": ["*embed_tokens", "lm_head"], "method": "lora", "rank": 12, "alpha": 3.0}]
    stirred(model, *rules)
    ids = torch.arange(8)[None]
    before = model(ids).logits
    exact = copy.deepcopy(model)
    trimtab.convert_to_lora(exact, 12, [ids])
    torch.testing.assert_close(exact(ids).logits, before, rtol=1e-4, atol=1e-5)
    report = trimtab.convert_to_lora(model, 4, [ids])
    assert model.lm_head.adapter is model.model.embed_tokens.adapter
    assert not report.modules["lm_head"].weighed, "its weight is read in two directions"


def test_convolutions_are_weighed_by_what_the_kernel_covers() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(8, 4, 2, groups=2)
    ).double()
    stirred(model, {"match": "*", "method": "dora", "rank": 3})
    rows = [torch.randn(2, 3, 9, 9, dtype=torch.float64) for _ in range(4)]
    before = trimtab.effective_weight(model, "0") - model[0].base.weight.detach().flatten(1)
    report = trimtab.convert_to_lora(model, 2, rows)
    off = (trimtab.effective_weight(model, "0") - model[0].base.weight.detach().flatten(1)) - before
    patches = torch.cat([nn.functional.unfold(x, 3, stride=2, padding=1).transpose(1, 2).flatten(0, 1) for x in rows])
    assert report.modules["0"].output_error == pytest.approx(
        float((patches @ off.T).norm() / (patches @ before.T).norm())
    )
    assert not report.modules["2"].weighed


def test_experts_are_converted_one_by_one() -> None:
    torch.manual_seed(0)
    model: Any = qwen3_moe()
    stirred(model, {"match": "*.experts", "method": "dora", "rank": 2})
    ids = torch.arange(1, 9)[None]
    before = model(ids).logits
    exact = copy.deepcopy(model)
    trimtab.convert_to_lora(exact, 24, [ids])
    torch.testing.assert_close(exact(ids).logits, before, rtol=1e-4, atol=1e-4)
    report = trimtab.convert_to_lora(model, 3)
    assert set(report.ranks.values()) == {3}
    name = next(iter(report.modules))
    assert 0 < report.modules[name].error < 1


@pytest.mark.parametrize("kind", sorted(QUANTISED))
def test_a_quantised_base_is_left_as_it_is(kind: str) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(quantise(nn.Linear(64, 32), kind))
    stirred(model, {"match": "0", "method": "dora", "rank": 4})
    x = torch.randn(5, 64)
    before = model(x)
    report = trimtab.convert_to_lora(model, 32, [x])
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    assert report.error < 1e-6


def test_a_magnitude_that_was_never_trained_is_no_change() -> None:
    """It is off by its last digit, which is a change of full rank."""
    model = network(torch.float32)
    trimtab.attach(model, trimtab.Rule(match="*", method="dora", rank=2))
    report = trimtab.convert_to_lora(model, None, error=0.01)
    assert set(report.ranks.values()) == {1}
    assert report.error == 0


def test_it_goes_on_as_any_adapter(tmp_path: Path) -> None:
    model = stirred(network(torch.float32), {"match": "*", "method": "mora", "rank": 2})
    trimtab.convert_to_lora(model, 4, inputs(2, dtype=torch.float32))
    x = inputs(1, dtype=torch.float32)[0]
    trimtab.save_adapter(model, tmp_path)
    other = network(torch.float32).eval()
    trimtab.load_adapter(other, tmp_path)
    assert torch.equal(other(x), model(x))
    trimtab.merge(model)
    torch.testing.assert_close(model(x), other(x))


@pytest.mark.parametrize("name", ["legal", "v1.5 (fr)", "whole"])
def test_of_several_adapters_the_active_one_is_converted(name: str) -> None:
    torch.manual_seed(0)
    together, _ = together_and_alone(Every().double().eval())
    x = ids()
    before = {}
    for other in PLANS:
        trimtab.set_adapter(together, other)
        before[other] = together(x).detach()
    trimtab.set_adapter(together, name)
    report = trimtab.convert_to_lora(together, 24, [x])
    assert report.logits is not None
    assert report.logits.difference < 1e-9
    assert trimtab.active_adapter(together) == name
    for other in PLANS:
        trimtab.set_adapter(together, other)
        torch.testing.assert_close(together(x), before[other], rtol=1e-9, atol=1e-9)
    trimtab.set_adapter(together, None)
    with pytest.raises(trimtab.SurgeryError, match="no adapter is active"):
        trimtab.convert_to_lora(together)
    trimtab.set_adapter(together, name)
    trained = trimtab.trainable_parameters(together)
    together(x).sum().backward()
    assert all(one.grad is not None for one in trained.values())
