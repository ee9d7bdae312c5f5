"""Proposals: what is proposed lies within the budget, whatever is drawn."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tiny_runs import tiny_model
from trimtab.config.search import NONE
from trimtab.errors import ConfigError, PlanError
from trimtab.studies.search_space import Part, Space, default_groups, find_groups
from trimtab.surgery.attach import attach, detach
from trimtab.surgery.plan import Plan

ALL: dict[str, dict[str, Any]] = {"lora": {}, "dora": {}, "mora": {}, NONE: {}}


@pytest.fixture(scope="module")
def model() -> Any:
    with torch.device("meta"):
        return tiny_model(num_hidden_layers=6, hidden_size=64, intermediate_size=96)


def space_of(model: Any, allowed: dict[str, dict[str, Any]] = ALL, budget: int | str = "lora:8") -> Space:
    return Space(find_groups(model, default_groups(model, None)), allowed, budget, 0.95)


def attached(model: Any, space: Space, proposal: Any) -> int:
    """What ``attach`` says that the proposal trains."""
    report = attach(model, Plan(space.rules(proposal)))
    detach(model)
    return report.trainable_parameters


@pytest.mark.full
def test_hundreds_of_proposals_keep_the_budget(model: Any) -> None:
    space, draw = space_of(model), random.Random(5)
    fitted = 0
    for _ in range(400):
        chosen = [draw.choice(space.methods) for _ in space.groups]
        weights = [2 ** draw.uniform(-2, 2) for _ in space.groups]
        proposal = space.fill(chosen, weights)
        if proposal is None:
            continue
        fitted += 1
        assert [part.method for part in proposal] == chosen
        assert all((part.rank == 0) == (part.method == NONE) for part in proposal)
        spent = space.parameters(proposal)
        if fitted % 8 == 0:  # the count is attach's, exactly
            assert spent == attached(model, space, proposal)
        assert 0.95 * space.budget <= spent <= space.budget
    assert fitted > 350


def test_ranks_follow_the_weights(model: Any) -> None:
    space = space_of(model, budget="lora:12")
    names = [group.name for group in space.groups]
    assert names == ["outer attention", "outer mlp", "inner attention", "inner mlp"]
    even = space.fill(["lora"] * 4, [1.0] * 4)
    assert even is not None
    assert {part.rank for part in even} <= {12, 13}
    tilted = space.fill(["lora"] * 4, [2.0, 2.0, 1.0, 1.0])
    assert tilted is not None
    outer, inner = tilted[0].rank, tilted[2].rank
    assert outer == pytest.approx(2 * inner, abs=2)


def test_uniform_is_the_largest_rank_that_fits(model: Any) -> None:
    space = space_of(model)
    assert space.uniform("lora") == (Part("lora", 8),) * 4
    for method in ("dora", "mora"):
        plan = space.uniform(method)
        assert plan is not None
        one_more = [{**rule, "rank": plan[0].rank + 1} for rule in space.rules(plan)]
        report = attach(model, Plan(one_more))
        detach(model)
        assert space.parameters(plan) <= space.budget < report.trainable_parameters


def test_the_rank_ends_at_the_smallest_matrix(model: Any) -> None:
    space = space_of(model, budget=10**9)
    assert space.uniform("lora") == (Part("lora", 32),) * 4  # k_proj and v_proj are 32 x 64
    assert space.fill(["lora"] * 4, [1.0] * 4) is None  # and far from the budget


def test_what_cannot_fit_is_no_proposal(model: Any) -> None:
    space = space_of(model, budget="lora:1")
    assert space.fill([NONE] * 4, [1.0] * 4) is None
    assert space.fill(["dora"] * 4, [1.0] * 4) is None  # the magnitudes are too much


def test_options_reach_the_plan(model: Any) -> None:
    space = space_of(model, {"mora": {"form": "sharing"}, "lora": {"alpha": 4.0, "dropout": 0.1}})
    proposal = (Part("mora", 3), Part("lora", 2), Part("lora", 2), Part("lora", 2))
    rules = space.rules(proposal)
    assert rules[0] == {"match": "*attn.*", "layers": "outer:1", "method": "mora", "rank": 3, "form": "sharing"}
    assert rules[1]["alpha"] == 4.0
    assert attached(model, space, proposal) == space.parameters(proposal)


def test_a_tied_weight_counts_once() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.other = (torch.nn.Linear(8, 8, device="meta") for _ in range(3))
            self.two.weight = self.one.weight

    model = Tied()
    space = Space(find_groups(model, {"pair": (["one", "two"], "all"), "rest": (["other"], "all")}), ALL, 64, 0.9)
    assert space.uniform("lora") == (Part("lora", 2),) * 2
    assert attached(model, space, (Part("lora", 2), Part("lora", 2))) == 64


@pytest.mark.parametrize(
    ("allowed", "budget", "message"),
    [
        (ALL, 100, r"budget: no uniform plan fits into 100 .* lora 5,568, dora 8,256, mora 4,992$"),
        (ALL, "lora:99", "budget: lora of rank 99 is larger than the smallest matrix"),
        ({"lorra": {}}, 9999, "methods.lorra: .*unknown method 'lorra'.*Did you mean 'lora'"),
        ({"full": {}}, 9999, "methods.full: .*unknown option 'rank' for method full"),
        ({"lora": {"alfa": 3}}, 9999, "methods.lora: .*unknown option 'alfa'.*Did you mean 'alpha'"),
        ({"lora": {"dropout": 3}}, 9999, "methods.lora: .*dropout"),
        ({"lora": {"rank": 3}}, 9999, "methods.lora.rank: the rank is what is searched"),
    ],
)
def test_a_space_that_cannot_be(model: Any, allowed: Any, budget: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        space_of(model, allowed, budget)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"heads": (["*.q_prof"], "all")}, r"groups.heads: .*Near misses: \*.q_proj"),
        ({"a": (["*.q_proj"], "all"), "b": (["*attn.*"], "outer:1")}, "groups.b: .*q_proj is in the group 'a' already"),
    ],
)
def test_groups_that_cannot_be(model: Any, groups: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        find_groups(model, groups)


def test_outer_blocks_must_leave_inner_ones(model: Any) -> None:
    with pytest.raises(PlanError, match="outer: 3 blocks at each end leave none between, the model has 6"):
        default_groups(model, 3)
