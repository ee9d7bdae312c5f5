"""Compares two states of a model by what they predict after the same texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trimtab.data.rows import Example
from trimtab.data.tokens import encode_all
from trimtab.errors import DataError
from trimtab.models.causal_head import IGNORED

ROWS, TOKENS = 32, 256
"""Most rows and most predicted tokens that are compared: their logits take 256 x vocabulary x 4 bytes, twice."""
_RANDOM_ROWS, _RANDOM_LENGTH = 2, 32


@dataclass(frozen=True)
class Passages:
    """Texts on which a model is asked for the next token.

    Attributes:
        ids: the tokens of each text.
        after: at which positions of each text the next token is looked at.
        what: in words, such as "240 answer tokens of 32 rows".
    """

    ids: list[list[int]]
    after: list[list[int]]
    what: str

    @classmethod
    def of_rows(cls, examples: Sequence[Example], tokenizer: Any, limit: int | None, name: str = "") -> Passages:
        """The trained tokens of ``examples``, of at most `ROWS` of them that lie evenly over all. Raises DataError if
        none has a token that is measured."""
        step = max(1, len(examples) // ROWS)
        rows = list(encode_all(list(examples[::step])[:ROWS], tokenizer, limit))
        each = max(1, TOKENS // max(1, len(rows)))
        after = [[at - 1 for at, label in enumerate(row["labels"]) if label != IGNORED][:each] for row in rows]
        said = f"{sum(map(len, after)):,} answer tokens of {len(rows)} rows" + (f" of {name}" if name else "")
        return cls([row["input_ids"] for row in rows], after, said)

    @property
    def comparison(self) -> Comparison:
        """By which two states of a causal language model are compared on them."""
        return Comparison(partial(probe, passages=self), self.what, "next token")

    @classmethod
    def random(cls, model: Any) -> Passages:
        """Few random tokens that are always the same, where there are no rows."""
        config = model.config.get_text_config()
        length = min(_RANDOM_LENGTH, getattr(config, "max_position_embeddings", None) or _RANDOM_LENGTH)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (_RANDOM_ROWS, length), generator=generator).tolist()
        return cls(ids, [list(range(length)) for _ in ids], f"{_RANDOM_ROWS * length} random tokens")


@dataclass(frozen=True)
class Comparison:
    """By what two states of a model are compared.

    Attributes:
        of: gives the logits ``[n, answers]`` of a model, in float32 on the processor.
        what: on which texts or rows, in words.
        answer: what the logits are of: ``next token``, ``answer``.
    """

    of: Callable[[Any], Tensor]
    what: str
    answer: str = "answer"


@dataclass(frozen=True)
class Agreement:
    """How far two states of a model agree.

    Attributes:
        difference: ``||after - before|| / ||before||`` of the logits.
        kl: the mean of KL(before || after) over the tokens, in nats.
        same_choice: in which share of them the likeliest answer is the same; None where an answer is one number.
        tokens: how many answers were compared.
        what: on which texts or rows, in words.
        answer: what an answer is.
    """

    difference: float
    kl: float
    same_choice: float | None
    tokens: int
    what: str
    answer: str

    def __str__(self) -> str:
        if self.same_choice is None:
            return f"on {self.what}: the numbers differ by {self.difference:.1e} of their norm"
        return (
            f"on {self.what}: logits differ by {self.difference:.1e} of their norm (KL {self.kl:.1e}), and the "
            f"likeliest {self.answer} is the same for {100 * self.same_choice:.0f} % of them"
        )


@torch.no_grad()
def probe(model: Any, passages: Passages) -> Tensor:
    """The logits ``[tokens, vocabulary]`` of ``model`` in float32 after the tokens of ``passages``, in their order."""
    model.eval()
    found = []
    for ids, after in zip(passages.ids, passages.after, strict=True):
        if after:
            logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
            found.append(logits[after].float().cpu())
    if not found:
        raise DataError(f"{passages.what}: no token to compare two models by")
    return torch.cat(found)


def agreement(before: Tensor, after: Tensor, comparison: Comparison) -> Agreement:
    """Compare two results of ``comparison.of``."""
    difference = float((after - before).norm() / before.norm().clamp(min=torch.finfo(torch.float32).tiny))
    said: dict[str, Any] = {"tokens": len(before), "what": comparison.what, "answer": comparison.answer}
    if before.shape[-1] == 1:
        return Agreement(difference, 0.0, None, **said)
    wide, other = before.double().log_softmax(-1), after.double().log_softmax(-1)
    kl = float((wide.exp() * (wide - other)).sum(-1).mean().clamp(min=0))
    same = float((before.argmax(-1) == after.argmax(-1)).float().mean())
    return Agreement(difference, kl, same, **said)
