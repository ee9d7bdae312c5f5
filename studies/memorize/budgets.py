"""Plans that cost the same: what LoRA of one rank trains over a model, spent on another method.

A method gets the largest rank that fits the budget over all matrices, and what is left over buys one rank more for as
many matrices as it can. So a magnitude, a number for each output, is paid from the rank; and MoRA, whose square has a
whole side and for rotation an even one, is not short of what rounding took.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn

from trimtab import bases
from trimtab.errors import PlanError
from trimtab.studies.search_space import trained_numbers
from trimtab.surgery.plan import ALL_LINEAR, Plan, Rule
from trimtab.surgery.targets import find_targets

ROUNDING = 0.005
"""By how much one rank for all may exceed the budget: MoRA's side is rounded to the nearest."""


def lora_budget(model: nn.Module, rank: int) -> int:
    """How many numbers LoRA of ``rank`` trains over all linear layers of ``model`` but the head."""
    return sum(rank * sum(target.base.shape) for target in find_targets(model, _plan("lora", {}, rank)))


def matched_plan(model: nn.Module, method: str, options: Mapping[str, Any], rank: int) -> Plan:
    """The plan for ``method`` that trains as many numbers as LoRA of ``rank`` over all linear layers of ``model``.

    Args:
        model: without adapters; it is only looked at.
        method: one that has a rank.
        options: the method's own, without the rank.
        rank: LoRA's.

    Raises:
        PlanError: the budget buys not even the method's smallest rank, or the rank is too large for some matrix.
    """
    budget = lora_budget(model, rank)
    names = {target.name: target.base.shape for target in find_targets(model, _plan(method, options, rank))}

    @cache
    def cost(shape: tuple[int, int], of: int) -> int:
        base = bases.find(nn.Linear(shape[1], shape[0], bias=False, device="meta"))
        assert base is not None
        return trained_numbers(base, method, _plan(method, options, of).rules[0].options)

    def total(of: int) -> int:
        return sum(cost(shape, of) for shape in names.values())

    uniform = rank
    while uniform and total(uniform) > budget * (1 + ROUNDING):
        uniform -= 1
    if not uniform:
        raise PlanError(
            f"a budget of rank {rank} ({budget:,} parameters) is too small for {method} with {dict(options)} at rank "
            "1; take a larger budget"
        )
    # Every other one first, so that the raised ones are spread over the depth and over the kinds of projection.
    order, left = list(names), budget - total(uniform)
    raised = []
    for name in order[::2] + order[1::2]:
        try:
            more = cost(names[name], uniform + 1) - cost(names[name], uniform)
        except PlanError:  # the matrix has no higher rank
            continue
        if 0 < more <= left:
            left -= more
            raised.append(name)
    if not raised:
        return _plan(method, options, uniform)
    groups = (([name for name in names if name not in raised], uniform), (raised, uniform + 1))
    return Plan([Rule(match=match, method=method, rank=of, **options) for match, of in groups if match])


def _plan(method: str, options: Mapping[str, Any], rank: int) -> Plan:
    return Plan([Rule(match=ALL_LINEAR, method=method, rank=rank, **options)])
