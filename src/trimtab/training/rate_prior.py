"""Which learning rate is likely the best one, before anything was tried: where the trials of ``auto`` begin.

    rate = base * (2000 / width)^0.775 * (32 / alpha)^0.5 * (48 / steps)^shorter

``base`` is the method's, from the table below; ``width`` the model's hidden size. That power is the one that Thinking
Machines found for Llama models over many sizes ("LoRA Without Regret", 2025), as they found LoRA's best rate ten times
that of full fine-tuning and the same for all ranks with alpha fixed. Here alpha usually is twice the rank, and with it
the best rate falls (``studies/rank-sweep``: above 1e-3 at rank 1, below it at rank 64), about as the root of alpha.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from trimtab import methods
from trimtab.surgery.plan import Rule

WIDTH, WIDTH_POWER = 2000, 0.775
ALPHA, ALPHA_POWER = 32.0, 0.5
STEPS = 48


@dataclass(frozen=True)
class Likely:
    """What is known of one method.

    Attributes:
        base: the best rate at width 2000, alpha 32 and 48 steps.
        shorter: by which power of the steps the best rate falls where there are more of them.
    """

    base: float
    shorter: float = 0.0


TABLE = {"lora": Likely(3e-4), "dora": Likely(3e-4), "mora": Likely(3e-4), "full": Likely(3e-5)}
"""Others are taken as LoRA."""

SPREAD = 0.35
"""Decades: by how much the best rate of a task lies beside the likely one (standard deviation)."""


def likely_rate(rules: Iterable[Rule], width: int | None, steps: int) -> float:
    """The rate for a plan; of rules that want different ones the lowest, since too high is worse than too low. An
    adapter whose rules are not known is taken as LoRA."""
    known = list(rules) or [Rule(match="*", method="lora", rank=16)]
    return min(_of_rule(rule, width or WIDTH, steps) for rule in known)


def _of_rule(rule: Rule, width: int, steps: int) -> float:
    known = TABLE.get(rule.method, TABLE["full" if methods.method_class(rule.method).trains_base else "lora"])
    rate = known.base * (WIDTH / width) ** WIDTH_POWER * (STEPS / steps) ** known.shorter
    return float(rate * (ALPHA / _alpha(rule.options)) ** ALPHA_POWER)


def _alpha(options: Any) -> float:
    """What a method with a scale has as alpha, whichever way it is scaled by; 32 for one without."""
    scale, rank = getattr(options, "scale", None), getattr(options, "rank", None)
    return float(scale * rank) if isinstance(scale, float) and rank else ALPHA
