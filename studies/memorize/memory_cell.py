"""One cell of the memory study: one method, one learning rate, one seed, trained from the same start as all others.

A plain loop and not the run of ``trimtab finetune``: all rows have one length, the same batches come to every method,
and the learning rate stays where it is after its warm-up, so that a curve does not depend on how long it was meant to
be.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, TypedDict

import torch
from torch import Tensor

from identifiers import draw_pairs, encode_pairs, recall
from memory_study import MemoryStudy
from trimtab.surgery.attach import attach, detach, trainable_parameters
from trimtab.surgery.plan import Plan
from trimtab.tasks import Head
from trimtab.training.optimizer import parameter_groups

MAX_GRAD_NORM = 1.0


class CurvePoint(TypedDict):
    """``accuracy``: share of characters right after ``step`` steps; ``loss``: mean over the steps since the point
    before, in nats a character (None at the start, and once it is not a number any more)."""

    step: int
    loss: float | None
    accuracy: float


def train_cell(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    study: MemoryStudy,
    *,
    learning_rate: float,
    seed: int,
    evaluated: Callable[[CurvePoint], None],
) -> dict[str, Any]:
    """Train ``plan`` on the pairs of ``seed`` and give the ``curve``, the ``seconds`` and where it ``diverged`` (None:
    it did not).

    ``model`` is without adapters before and after, its weights untouched. The seed decides the pairs, their order and
    the adapter's random start. Nothing is dropped out: the model stays in eval mode. A cell whose loss is not a number
    any more ends there, and the rest of its curve counts as nothing right.
    """
    began = time.perf_counter()
    device = model.get_input_embeddings().weight.device
    rows = encode_pairs(draw_pairs(study.pairs, study.digits, seed), tokenizer).to(device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        attach(model, plan)
    try:
        head = Head(model)
        optimiser = torch.optim.AdamW(parameter_groups(model, learning_rate, None, 1.0, 0.0), fused=True)
        warm_up = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / study.warmup))
        trained = list(trainable_parameters(model).values())
        curve: list[CurvePoint] = []

        def add(step: int, losses: list[float], accuracy: float) -> None:
            curve.append({"step": step, "loss": sum(losses) / len(losses) if losses else None, "accuracy": accuracy})
            evaluated(curve[-1])

        add(0, [], recall(model, tokenizer, rows))
        losses: list[float] = []
        diverged = None
        batches = _batches(study.pairs, study.batch_size, seed)
        for step in range(1, study.steps + 1):
            if diverged is None:
                taken = next(batches).to(device)
                loss = head.loss_at_labels(rows.input_ids[taken], rows.labels[taken])
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
                optimiser.step()
                optimiser.zero_grad()
                warm_up.step()
                losses.append(loss.item())
                if not (math.isfinite(losses[-1]) and math.isfinite(norm.item())):
                    diverged = step
            if step % study.evaluate_every == 0 or step == study.steps:
                if diverged is None:
                    add(step, losses, recall(model, tokenizer, rows))
                else:
                    add(step, [], 0.0)
                losses = []
    finally:
        detach(model)
    return {"curve": curve, "diverged": diverged, "seconds": round(time.perf_counter() - began, 2)}


def _batches(rows: int, size: int, seed: int) -> Iterator[Tensor]:
    """Indices of ``size`` rows without end: one shuffle of all rows after the other."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.int64)
    while True:
        while len(left) < size:
            left = torch.cat([left, torch.randperm(rows, generator=generator)])
        yield left[:size]
        left = left[size:]
