"""Settings that are known to hurt: each with what is known, and where from. They are notes, and nothing is refused."""

from __future__ import annotations

import math

from trimtab.config.resolve import Job
from trimtab.notes import Notes
from trimtab.surgery.attach_report import AttachReport, usually_frozen

REGRET = "Schulman et al., LoRA Without Regret, thinkingmachines.ai 2025"
LEARNS_LESS = "Biderman et al., arXiv 2405.09673"
MEMORIZE = "studies/memorize"

USUAL_SCALE = 0.25, 8.0
"""alpha/rank; the field has 1 or 2."""
LARGE_BATCH = 128
FULL_RATE, ADAPTER_RATE, MORA_RATE = 2e-4, 5e-5, 1e-4
"""Full fine-tuning from the first on, adapters up to the second, and MoRA up to the third are at a rate of the
others."""


def caution(job: Job, attached: AttachReport, notes: Notes) -> None:
    """Add to ``notes`` what is known to hurt in the settings of ``job``."""
    for check in (_attention_only, _scale, _batch, _rates):
        check(job, attached, notes)


def _attention_only(job: Job, attached: AttachReport, notes: Notes) -> None:
    modules = [module.name for module in attached.modules if module.method != "full"]
    others = [kind for kind in attached.unreached if not usually_frozen(kind)]
    if modules and others and all(_in_attention(name) for name in modules):
        notes.add(
            "only attention is adapted: adapters on all linear layers have learned more at the same number of trained "
            f"parameters ({REGRET}; QLoRA, arXiv 2305.14314, figure 2). match: all-linear reaches them"
        )


def _in_attention(name: str) -> bool:
    return any("attn" in part or "attention" in part for part in name.lower().split("."))


def _scale(job: Job, attached: AttachReport, notes: Notes) -> None:
    low, high = USUAL_SCALE
    for number, rule in enumerate(attached.rules):
        rank, alpha = (getattr(rule.options, name, None) for name in ("rank", "alpha"))
        if not rank or not alpha:
            continue
        stabilised = getattr(rule.options, "rank_stabilised", False)
        scale = alpha / (math.sqrt(rank) if stabilised else rank)
        if not low <= scale <= high:
            notes.add(
                f"plan.{number}: alpha {alpha:g} at rank {rank} scales the update by {scale:.3g}; 1 or 2 is usual "
                f"(alpha = rank, arXiv 2106.09685, section 4.1; alpha = 2 rank, {LEARNS_LESS}), and the learning rate "
                f"acts {'weaker' if scale < 1 else 'stronger'} by as much"
            )


def _batch(job: Job, attached: AttachReport, notes: Notes) -> None:
    train = job.config.train
    rows = train.batch_size * train.gradient_accumulation
    if rows > LARGE_BATCH and any(module.method != "full" for module in attached.modules):
        notes.add(
            f"{rows} rows to a step: low-rank adapters lose more by batches above some {LARGE_BATCH} rows than full "
            f"fine-tuning does, and no rank makes up for it ({REGRET})"
        )


def _rates(job: Job, attached: AttachReport, notes: Notes) -> None:
    rate = job.config.train.learning_rate
    if not isinstance(rate, float):
        return
    whole = {
        number
        for number, rule in enumerate(attached.rules, 1)
        if rule.method == "full" and getattr(rule.options, "rows", None) is None
    }
    methods = {module.method for module in attached.modules if module.rule not in whole}
    # A new head, norms and biases are small, and are trained at any rate.
    matrices = sum(module.parameters for module in attached.modules if module.rule in whole and module.in_features > 1)
    if rate >= FULL_RATE and matrices > attached.trainable_parameters / 2:
        notes.add(
            f"train.learning_rate: {rate:g} is a rate of adapters; the best of full fine-tuning is about a tenth of "
            f"theirs ({REGRET}; {LEARNS_LESS}), often 1e-5 to 1e-4"
        )
    if rate <= MORA_RATE and "mora" in methods:
        notes.add(
            f"train.learning_rate: {rate:g} is low for mora, whose update has no alpha to scale it: its best rates "
            f"were one to ten times LoRA's ({MEMORIZE})"
        )
    elif rate <= ADAPTER_RATE and methods - {"full"}:
        notes.add(
            f"train.learning_rate: {rate:g} is a rate of full fine-tuning; the best of adapters is about ten times as "
            f"high ({REGRET}; {LEARNS_LESS}), often 1e-4 to 1e-3"
        )
