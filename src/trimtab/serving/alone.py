"""Answers one row at a time, for models whose rows cannot share a batch: those that sum up what they have read in a
state, and whatever else `trimtab.serving.batch.why_alone` finds.

The row is written by the model's own ``generate``, which knows what the model keeps, and each token is chosen as in a
batch. (XLNet, which reads in both directions, writes there by masks and a token of its own, so that a plain loop that
takes the last logits gives something else; it is taken for an encoder by `trimtab.models.heads`, and is not served.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from trimtab.evaluation.generation import contiguous_input
from trimtab.serving.writing import Row, take


def write_alone(model: Any, row: Row, each: Callable[[], None]) -> None:
    """Answer ``row``, to its end. ``each`` is called before every token."""
    choosing = _Choosing(row, each)
    settings = GenerationConfig(
        max_new_tokens=row.limit, do_sample=False, num_beams=1, use_cache=True, eos_token_id=None, pad_token_id=0
    )
    ids = torch.tensor([row.ids], device=model.device)
    # generate() would take everything that this leaves open, such as penalties, from the model's own settings.
    kept, model.generation_config = model.generation_config, settings
    hook = model.get_output_embeddings().register_forward_pre_hook(contiguous_input)
    try:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            logits_processor=LogitsProcessorList([choosing]),
            stopping_criteria=StoppingCriteriaList([_Over(row)]),
        )
    finally:
        hook.remove()
        model.generation_config = kept


class _Choosing(LogitsProcessor):
    """Leaves ``generate`` no other token than the one that the row chooses."""

    def __init__(self, row: Row, each: Callable[[], None]) -> None:
        self._row, self._each = row, each

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._each()
        if not self._row.check():
            take([self._row], scores)
        chosen = torch.full_like(scores, float("-inf"))
        chosen[0, self._row.ids[-1]] = 0
        return chosen


class _Over(StoppingCriteria):
    def __init__(self, row: Row) -> None:
        self._row = row

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        return torch.full((input_ids.shape[0],), self._row.is_over, device=input_ids.device, dtype=torch.bool)
