"""Several adapters as one: the sum of what they change, exactly where there is one, else with the error said."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor, nn

import trimtab
from expert_models import qwen3_moe
from named_adapters import PLANS, Every, ids, together_and_alone
from trimtab.surgery.names import entries


def network(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 10), nn.Linear(10, 6)).to(dtype)


def carrying(model: Any, **plans: list[dict[str, Any]]) -> Any:
    """``model`` with adapters of these names, each trained by a random step."""
    for number, (name, rules) in enumerate(plans.items()):
        trimtab.attach(model, [trimtab.Rule(**rule) for rule in rules], name=name)
        draw = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for key, parameter in trimtab.trainable_parameters(model).items():
                noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64).to(parameter)
                parameter.mul_(1 + 0.3 * noise) if key.endswith("magnitude") else parameter.add_(0.1 * noise)
    return model.eval()


LORA = [{"match": "*", "method": "lora", "rank": 2, "alpha": 3, "bias": True}]
DORA = [{"match": ["0", "3"], "method": "dora", "rank": 3}]
MAGNITUDES = [{"match": ["0", "4"], "method": "dora", "rank": 0}]
MORA = [{"match": "*", "method": "mora", "rank": 2}]
FULL = [{"match": "*", "method": "full"}]


def states(model: Any, names: list[str]) -> dict[str, dict[str, Tensor]]:
    """The tensors that the model acts with under each adapter, by merging it."""
    found = {}
    for name in names:
        one = copy.deepcopy(model)
        trimtab.set_adapter(one, name)
        trimtab.merge(one)
        found[name] = {key: value.detach().clone() for key, value in one.state_dict().items()}
    return found


def expected(bare: Any, acting: dict[str, dict[str, Tensor]], weights: dict[str, float]) -> dict[str, Tensor]:
    own = bare.state_dict()
    return {
        key: own[key] + sum(share * (acting[name][key] - own[key]) for name, share in weights.items()) for key in own
    }


@pytest.mark.parametrize(
    "plans",
    [
        {"a": LORA, "b": DORA},
        {"a": LORA, "b": DORA, "c": MAGNITUDES},
        {"a": DORA, "b": MAGNITUDES},
        {"a": LORA, "b": LORA},
        {"a": MORA, "b": MORA},
        {"a": FULL, "b": FULL},
        {"a": FULL, "b": DORA},
        {"a": MORA, "b": FULL, "c": LORA},
    ],
    ids=lambda plans: "+".join(plan[0]["method"] + str(plan[0].get("rank", "")) for plan in plans.values()),
)
@pytest.mark.parametrize("shares", [(0.7, 0.3, 0.4), (1.0, -1.5, 2.0)])
def test_linear_is_the_sum_of_the_changes(plans: dict[str, Any], shares: tuple[float, ...]) -> None:
    model = carrying(network(), **plans)
    weights = dict(zip(plans, shares, strict=False))
    acting = states(model, list(plans))
    report = trimtab.combine(model, weights, name="both")
    assert trimtab.adapters(model) == [*plans, "both"]
    assert trimtab.active_adapter(model) == "both"
    wanted = expected(network(), acting, weights)
    found = states(model, ["both", *plans])
    for key, value in wanted.items():
        torch.testing.assert_close(found["both"][key], value, rtol=1e-9, atol=1e-9)
    for name in plans:
        assert all(torch.equal(found[name][key], acting[name][key]) for key in wanted), "what was combined stays"
    assert report.error < 1e-9
    methods = {one.method for one in report.modules.values()}
    if "full" not in methods:
        assert len(methods) == 1, "PEFT has one for all"
    assert report.how == "linear"


def test_float32_rounds_and_says_so() -> None:
    model = carrying(network(torch.float32), a=DORA, b=LORA)
    report = trimtab.combine(model, {"a": 0.6, "b": 0.4}, name="both")
    assert 0 < report.error < 1e-6
    assert report.rank == 5


def test_ranks_add_up_and_shares_may_be_none() -> None:
    model = carrying(network(), a=LORA, b=DORA)
    report = trimtab.combine(model, {"a": 0, "b": 1}, name="only b")
    assert report.modules["0"].rank == 5
    x = torch.randn(4, 12, dtype=torch.float64)
    y = model(x)
    trimtab.set_adapter(model, "b")
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("how", ["svd", "ties", "dare_linear", "dare_ties"])
def test_other_ways_are_the_best_lora_of_what_they_stand_for(how: str) -> None:
    model = carrying(network(), a=DORA, b=MORA, c=FULL)
    bare, weights = network().state_dict(), {"a": 0.7, "b": -0.3, "c": 0.5}
    acting = states(model, list(weights))
    again = copy.deepcopy(model)
    report = trimtab.combine(model, weights, name="x", how=how, rank=3, **({} if how == "svd" else {"density": 0.4}))  # type: ignore[arg-type]
    assert {one.method for name, one in report.modules.items() if name != "2"} == {"lora"}
    for name in ("0", "3", "4"):
        key = f"{name}.weight"
        having = [one for one in weights if not torch.equal(acting[one][key], bare[key])]
        deltas = [acting[one][key] - bare[key] for one in having]
        shares = torch.tensor([weights[one] for one in having], dtype=torch.float64)
        if how == "svd":
            wanted = sum(float(share) * delta for share, delta in zip(shares, deltas, strict=True))
        elif how == "ties":
            wanted = merge_utils.ties(deltas, shares, 0.4)
        else:
            continue
        adapter = entries(model, "x")[name].adapter
        found = adapter.options.scale * adapter.B @ adapter.A
        values = torch.linalg.svdvals(wanted)
        assert float((found - wanted).norm().detach()) == pytest.approx(float(values[3:].norm()), rel=1e-9)
        assert report.modules[name].error == pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-9)
    same = trimtab.combine(again, weights, name="y", how=how, rank=16, **({} if how == "svd" else {"density": 0.4}))  # type: ignore[arg-type]
    assert same.error < 1e-9 < report.error
    if how.startswith("dare"):
        drawn = []
        for name, seed in (("s0", 0), ("again", 0), ("s1", 1)):
            trimtab.combine(again, weights, name=name, how=how, seed=seed)  # type: ignore[arg-type]
            drawn.append(entries(again, name))
        first, second, third = drawn
        assert torch.equal(first["0"].adapter.A, second["0"].adapter.A)
        assert not torch.equal(first["0"].adapter.A, third["0"].adapter.A)


def test_dare_without_dropping_is_svd() -> None:
    model = carrying(network(), a=DORA, b=LORA)
    trimtab.combine(model, {"a": 1.0, "b": 0.5}, name="svd", how="svd", rank=4)
    trimtab.combine(model, {"a": 1.0, "b": 0.5}, name="dare", how="dare_linear", rank=4, density=1.0)
    one, other = entries(model, "svd"), entries(model, "dare")
    for name, entry in one.items():
        a, b = (each.adapter.B @ each.adapter.A for each in (entry, other[name]))
        torch.testing.assert_close(a, b)


def test_of_every_kind_of_module() -> None:
    """Embeddings that are tied to heads, attention, convolutions, experts, a norm, single rows."""
    torch.manual_seed(0)
    together, _ = together_and_alone(Every().double().eval())
    trimtab.delete_adapter(together, "default")  # which has one on a block
    weights = {"legal": 0.5, "v1.5 (fr)": 0.8}
    acting = states(together, list(weights))
    torch.manual_seed(0)
    bare = Every().double().eval()
    report = trimtab.combine(together, weights, name="both")
    assert report.error < 1e-9
    want = copy.deepcopy(bare)
    own = {key: value.clone() for key, value in want.state_dict().items()}
    want.load_state_dict(expected(bare, acting, weights))
    assert not torch.equal(own["embedding.weight"], want.embedding.weight)
    torch.testing.assert_close(together(ids()), want(ids()), rtol=1e-8, atol=1e-8)
    with pytest.raises(trimtab.SurgeryError, match="single rows"):
        trimtab.combine(together, {"legal": 1.0, "whole": 1.0}, name="no")
    assert trimtab.active_adapter(together) == "both"
    assert len(PLANS) == 4


def test_experts() -> None:
    torch.manual_seed(0)
    model: Any = qwen3_moe().double()
    rules = [{"match": "*.experts", "method": "dora", "rank": 2}]
    carrying(model, a=rules, b=[{"match": "*.experts", "method": "lora", "rank": 1}])
    before = [trimtab.effective_weight(_active(model, name), "model.layers.0.mlp.experts.down_proj") for name in "ab"]
    report = trimtab.combine(model, {"a": 0.5, "b": 1.0}, name="c")
    own = trimtab.effective_weight(_active(model, None), "model.layers.0.mlp.experts.down_proj")
    found = trimtab.effective_weight(_active(model, "c"), "model.layers.0.mlp.experts.down_proj")
    torch.testing.assert_close(found, own + 0.5 * (before[0] - own) + (before[1] - own))
    assert report.rank == 3


def _active(model: Any, name: str | None) -> Any:
    trimtab.set_adapter(model, name)
    return model


def test_peft_loads_a_sum_of_lora_and_dora(tmp_path: Path) -> None:
    from peft import PeftModel

    base = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10)).eval()
    both = [{"match": "*", "method": "dora", "rank": 3}]
    model = carrying(copy.deepcopy(base), a=[{"match": "0", "method": "lora", "rank": 2}], b=both)
    trimtab.combine(model, {"a": 0.9, "b": 0.6}, name="both")
    trimtab.save_adapter(model, tmp_path)
    x = torch.randn(5, 12)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-5)


def test_it_trains_on() -> None:
    model = carrying(network(), a=LORA, b=DORA)
    trimtab.combine(model, {"a": 0.5, "b": 0.5}, name="c")
    model(torch.randn(3, 12, dtype=torch.float64)).sum().backward()
    trained = trimtab.trainable_parameters(model)
    assert all("adapter_c" in name for name in trained)
    assert all(one.grad is not None for one in trained.values())


@pytest.mark.parametrize(
    ("weights", "more", "said"),
    [
        ({}, {}, "expected a mapping"),
        ({"a": 1, "z": 1}, {}, "carries no adapter 'z'"),
        ({"a": math.nan}, {}, "expected a number, got nan"),
        ({"a": True}, {}, "expected a number"),
        ({"a": 1, "b": 1}, {"how": "sum"}, "how: expected one of"),
        ({"a": 1, "b": 1}, {"name": "a"}, "under the name 'a'"),
        ({"a": 1, "b": 1}, {"rank": 4}, "rank means nothing to how='linear'"),
        ({"a": 1, "b": 1}, {"how": "svd", "density": 0.5}, "density means nothing"),
        ({"a": 1, "b": 1}, {"how": "ties", "density": 0.0}, "density: expected"),
        ({"a": 1, "b": 1}, {"how": "svd", "rank": 0}, "rank: expected"),
        ({"a": 1, "m": 1}, {}, "a sum of lora and mora"),
        ({"a": 1e300, "b": 1}, {"how": "svd"}, r"numbers that its float\d+ cannot hold"),
        ({"a": 10**400}, {}, "expected a number, got 1"),
    ],
)
def test_refusals_leave_the_model_as_it_was(weights: Any, more: dict[str, Any], said: str) -> None:
    model = carrying(network(), a=LORA, b=DORA, m=MORA)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(trimtab.SurgeryError, match=said):
        trimtab.combine(model, weights, **{"name": "new", **more})
    assert trimtab.adapters(model) == ["a", "b", "m"]
    assert trimtab.active_adapter(model) == "m"
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def test_what_holds_nan_or_sits_on_a_block_is_refused() -> None:
    model = carrying(network(), a=LORA, b=DORA)
    with torch.no_grad():
        entries(model, "a")["0"].adapter.A[0, 0] = math.nan
    with pytest.raises(trimtab.SurgeryError, match="NaN"):
        trimtab.combine(model, {"a": 1.0, "b": 1.0}, name="c")
    torch.manual_seed(0)
    together, _ = together_and_alone(Every())
    with pytest.raises(trimtab.SurgeryError, match="sits on a block"):
        trimtab.combine(together, {"legal": 1.0, "default": 1.0}, name="c")
