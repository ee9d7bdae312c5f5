"""Causal language modelling: the model reads a text from left to right and learns to write its answers.

Rows are of any form in `trimtab.data.forms`. The loss is the cross-entropy of the answers' tokens; those of the prompts
may count a little, too. Nothing is trained beside the adapter: the model brings its own head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trimtab.config.run import RunConfig
from trimtab.data.batches import Collator
from trimtab.metrics import choosing
from trimtab.models.causal_head import Head
from trimtab.runs.events import Listener
from trimtab.tasks import _inputs, _task


class CausalLM(_task.Task):
    """The next token, from all that came before it."""

    model_class = "AutoModelForCausalLM"
    metrics = tuple(choosing())

    def read(self, config: RunConfig, tokenizer: Any, listener: Listener, max_length: int) -> _inputs.Inputs:
        return _inputs.read_inputs(config, tokenizer, listener, max_length)

    def collator(self, tokenizer: Any, *, prompts: bool = False) -> Collator:
        return Collator(tokenizer.pad_token_id, prompts=prompts)

    def head(self, model: Any) -> Head:
        return Head(model)

    def loss(
        self, head: Head, batch: Mapping[str, Tensor], *, count: int | Tensor | None = None, prompt_weight: float = 0.0
    ) -> Tensor:
        """The cross-entropy of ``batch["labels"]``; a token of ``batch["prompt_labels"]`` counts ``prompt_weight``
        beside 1 of the others, and not in ``count`` (arXiv 2405.14394 trains on both alike)."""
        return head.loss_at_labels(
            batch["input_ids"],
            batch["labels"],
            num_items=count,
            lesser=batch.get("prompt_labels"),
            weight=prompt_weight,
        )
