"""Which learning rate is likely the best one, before anything was tried: where the trials of ``auto`` begin.

    rate = base / size^0.61 * (576 / width)^0.775 * (32 / steps)^0.32 * (labels / 16)^0.5

``base`` is the best rate of a method in ``studies/rates`` on answers of one word: SmolLM2-135M, whose hidden size is
576, rank 8 with alpha 16, and 32 steps of 16 labels. ``size`` is how many times larger alpha is, or the rank where a
method has no alpha; its power is from the same task, one for all methods (``studies/rates/fit_prior.py`` prints both).
The other powers lead to other runs:

- ``width``, the model's hidden size: found for Llama models over many sizes (Thinking Machines, "LoRA Without Regret",
  2025).
- ``steps``: a longer run wants a lower rate (Bjorck et al., "Scaling Optimal LR Across Token Horizons", ICLR 2025).
- ``labels`` of a step: Adam's rule for batches is the root (Malladi et al., "On the SDEs and Scaling Rules for Adaptive
  Gradient Algorithms", NeurIPS 2022). It is about the noise of gradients, of which little is taken to be left beyond
  256 labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

import torch

from trimtab import methods
from trimtab.config.run import TrainConfig
from trimtab.models.causal_head import IGNORED
from trimtab.surgery.plan import Rule

BASE = {"lora": 1.5e-3, "dora": 1.4e-3, "mora": 8.7e-4, "full": 1.1e-4}
"""The best rate of a method at rank 8 and alpha 16. Others are taken as LoRA, or as full fine-tuning where they train
the base."""

SIZE_POWER = 0.61
RANK, ALPHA = 8, 16.0
WIDTH, WIDTH_POWER = 576, 0.775
STEPS, STEPS_POWER = 32, 0.32
LABELS, MOST_LABELS, LABELS_POWER = 16.0, 256.0, 0.5

SPREAD = 0.35
"""Decades: by how much the best rate of a task lies beside the likely one (standard deviation)."""

_UNKNOWN_WIDTH = 2000
_ROWS = 64
"""So many rows tell how many labels a row has."""


def likely_rate(rules: Iterable[Rule], width: int | None, *, steps: int, labels: float, b_ratio: float = 1.0) -> float:
    """The rate for a plan; of rules that want different ones the lowest, since too high is worse than too low. An
    adapter whose rules are not known is taken as LoRA.

    Args:
        rules: of the plan.
        width: the model's hidden size; None where it says none.
        steps: of the run.
        labels: of a step (`labels_of_step`).
        b_ratio: how many times the rate B learns at (LoRA+). The rates of A and B then lie evenly around what one rate
            for both would be.
    """
    known = list(rules) or [Rule(match="*", method="lora", rank=8)]
    rate = min(_of_rule(rule, b_ratio) for rule in known) * (WIDTH / (width or _UNKNOWN_WIDTH)) ** WIDTH_POWER
    return float(rate * (STEPS / steps) ** STEPS_POWER * (min(labels, MOST_LABELS) / LABELS) ** LABELS_POWER)


def labels_of_step(rows: Any, train: TrainConfig) -> float:
    """How much carries loss in a step of ``train``, on average: labelled tokens, and tokens of prompts by their weight;
    one for each row that has a class, numbers or several labels."""
    some = range(0, len(rows), max(1, len(rows) // _ROWS))
    mean = fmean(_labels(rows[at], train.prompt_loss_weight) for at in some)
    return mean * train.batch_size * train.gradient_accumulation


def _labels(row: Mapping[str, Any], prompt_weight: float) -> float:
    labels = torch.as_tensor(row["labels"])
    if labels.is_floating_point() or labels.dim() == 0:
        return 1.0
    labelled = int((labels != IGNORED).sum())
    return labelled + prompt_weight * (len(labels) - labelled)


def _of_rule(rule: Rule, b_ratio: float) -> float:
    method = methods.method_class(rule.method)
    base = BASE.get(rule.method) or BASE["full" if method.trains_base else "lora"]
    rate = base / size_of(rule.options) ** SIZE_POWER
    return float(rate / math.sqrt(b_ratio) if "second factor" in method.rate_groups.values() else rate)


def size_of(options: Any) -> float:
    """By how much alpha, whichever way a method scales by it, or else the rank is larger than in the table."""
    scale, rank = getattr(options, "scale", None), getattr(options, "rank", None) or RANK
    return float(scale * rank / ALPHA if isinstance(scale, float) else rank / RANK)
