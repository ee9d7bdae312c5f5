"""Perplexity: the exponential of the mean loss of the tokens that carry any."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from trimtab.data.batches import Collator
from trimtab.data.rows import Example
from trimtab.data.tokens import IGNORED, encode_all
from trimtab.errors import ModelError
from trimtab.evaluation.batching import by_length
from trimtab.surgery.serving import evaluating
from trimtab.tasks import Head


def token_loss(
    head: Head,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[float, int]:
    """The summed loss, in nats, of all trained tokens of the examples, and their number.

    Args:
        head: the model.
        tokenizer: its fast tokenizer.
        examples: rows of any form; one without a trained token counts for nothing.
        batch_size: most rows in a forward pass; decides nothing but speed (and the last digits).
        max_length: most tokens of a row; ``trimtab.data.tokens.encode`` says what is cut.
        progress: called with the number of rows done and of all rows.

    Raises:
        DataError: no row has a trained token.
    """
    rows = encode_all(examples, tokenizer, max_length)
    collate = Collator(pad_id=0)
    device = head.model.get_input_embeddings().weight.device
    total, tokens, done = 0.0, 0, 0
    with evaluating(head.model):
        for indices in by_length(rows.lengths, batch_size):
            batch = collate([rows[index] for index in indices])
            # Labels are not shifted, and the first position of a row never has one.
            tokens += int((batch["labels"] != IGNORED).sum())
            total += float(head.loss_at_labels(batch["input_ids"].to(device), batch["labels"].to(device), num_items=1))
            done += len(indices)
            if progress is not None:
                progress(done, len(rows))
    return total, tokens


def perplexity(loss: float, tokens: int) -> float:
    """``exp(loss / tokens)``; at most ``exp(700)``, near the largest number that a float holds.

    Raises:
        ModelError: the loss is not a number.
    """
    if not math.isfinite(loss):
        raise ModelError(
            f"The loss of the model over {tokens} tokens is {loss}, not a number. Its weights are damaged or its "
            "training diverged; train with a lower learning rate."
        )
    return math.exp(min(loss / tokens, 700.0))
