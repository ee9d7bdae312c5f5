"""Compares two states of a model by what they predict after the same texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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

    @classmethod
    def random(cls, model: Any) -> Passages:
        """Few random tokens that are always the same, where there are no rows."""
        config = model.config.get_text_config()
        length = min(_RANDOM_LENGTH, getattr(config, "max_position_embeddings", None) or _RANDOM_LENGTH)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (_RANDOM_ROWS, length), generator=generator).tolist()
        return cls(ids, [list(range(length)) for _ in ids], f"{_RANDOM_ROWS * length} random tokens")


@dataclass(frozen=True)
class Agreement:
    """How far two states of a model agree.

    Attributes:
        difference: ``||after - before|| / ||before||`` of the logits.
        kl: the mean of KL(before || after) over the tokens, in nats.
        same_choice: the share of tokens after which the likeliest next token is the same.
        tokens: how many were compared.
        what: on which.
    """

    difference: float
    kl: float
    same_choice: float
    tokens: int
    what: str

    def __str__(self) -> str:
        return (
            f"on {self.what}: logits differ by {self.difference:.1e} of their norm (KL {self.kl:.1e}), and the "
            f"likeliest next token is the same after {100 * self.same_choice:.0f} % of them"
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


def agreement(before: Tensor, after: Tensor, passages: Passages) -> Agreement:
    """Compare two results of ``probe``."""
    same = before.argmax(-1) == after.argmax(-1)
    wide, other = before.double().log_softmax(-1), after.double().log_softmax(-1)
    kl = (wide.exp() * (wide - other)).sum(-1).mean().clamp(min=0)
    difference = (after - before).norm() / before.norm()
    return Agreement(float(difference), float(kl), float(same.float().mean()), same.numel(), passages.what)
