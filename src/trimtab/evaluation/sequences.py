"""Token sequences, and the log-probabilities that are asked of them: of which tokens, after which positions."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch

from trimtab.evaluation.batching import padded_right
from trimtab.tasks import Head

WORTHWHILE = 8
"""Tokens from which on a common beginning is kept: fewer cost less than the copies of their keys and values."""


@dataclass
class TokenSequence:
    """Token ids to run, and the log-probabilities to read from the run: position -> next token -> nats."""

    ids: list[int]
    asked: dict[int, dict[int, float]] = field(default_factory=dict)

    def ask(self, position: int, token: int) -> None:
        """Ask for ``token`` after ``position``."""
        self.asked.setdefault(position, {})[token] = math.nan


def run(head: Head, sequences: Sequence[TokenSequence], start: int = 0, past: Any = None) -> None:
    """One forward pass; fills in what is asked of each sequence.

    ``past`` holds the keys and values of the first ``start`` tokens of each, of which nothing is asked.
    """
    device = head.model.get_input_embeddings().weight.device
    ids = padded_right([sequence.ids[start:] for sequence in sequences], device)
    asked = [(row, at, list(found)) for row, sequence in enumerate(sequences) for at, found in sequence.asked.items()]
    most = max(len(tokens) for _, _, tokens in asked)
    positions = torch.tensor([row * ids.shape[1] + at - start for row, at, _ in asked], device=device)
    tokens = torch.tensor([wanted + wanted[:1] * (most - len(wanted)) for _, _, wanted in asked], device=device)
    values = head.log_probabilities(ids, positions, tokens, past).tolist()
    for (row, at, wanted), line in zip(asked, values, strict=True):
        sequences[row].asked[at] = dict(zip(wanted, line[: len(wanted)], strict=True))


class Beginning:
    """The tokens that all of some sequences begin with: run once, and then on them only what follows in each.

    The instruction before every row of a task, or one prompt before a hundred answers, which would otherwise be read
    once for each of them. Where that is shorter than ``WORTHWHILE``, or the model keeps no keys and values or cannot
    repeat them, whole sequences are run. The weights must stay as they are meanwhile.

    Args:
        head: the model.
        sequences: of nothing within their beginning is anything asked.
    """

    def __init__(self, head: Head, sequences: Sequence[TokenSequence]) -> None:
        self.head = head
        self.start = _shared(sequences) if len(sequences) > 1 else 0
        self._past = head.remember(sequences[0].ids[: self.start]) if self.start >= WORTHWHILE else None

    def run(self, sequences: Sequence[TokenSequence]) -> None:
        """One forward pass for some of the sequences; fills in what is asked of them."""
        if self._past is None:
            run(self.head, sequences)
        else:
            past = copy.deepcopy(self._past)  # a pass adds its own tokens to what it is given
            past.batch_repeat_interleave(len(sequences))
            run(self.head, sequences, self.start, past)


def _shared(sequences: Sequence[TokenSequence]) -> int:
    """How many tokens all sequences begin with, before the first position that is asked about.

    What the first and the last have in common in the order of a dictionary, all between them have, too.
    """
    ordered = sorted(sequence.ids for sequence in sequences)
    common = takewhile(lambda pair: pair[0] == pair[1], zip(ordered[0], ordered[-1], strict=False))
    return min(sum(1 for _ in common), *(min(sequence.asked) for sequence in sequences))
