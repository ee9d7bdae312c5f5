"""Token sequences, and the log-probabilities that are asked of them: of which tokens, after which positions."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from trimtab.evaluation.batching import by_length, padded_right
from trimtab.evaluation.logits import Head


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


def run_sharing(head: Head, sequences: Sequence[TokenSequence], batch_size: int) -> None:
    """The same, with one pass for the tokens that all sequences begin with and then only for what follows on them.

    For a hundred answers to one prompt, which would otherwise be read a hundred times. A model that keeps no keys and
    values, or cannot repeat them, runs the whole sequences.
    """
    start = min(min(sequence.asked) for sequence in sequences)
    past = head.remember(sequences[0].ids[:start]) if start else None
    for batch in by_length([len(sequence.ids) for sequence in sequences], batch_size):
        chosen = [sequences[index] for index in batch]
        if past is None:
            run(head, chosen)
        else:
            repeated = copy.deepcopy(past)  # a pass adds its own tokens to what it is given
            repeated.batch_repeat_interleave(len(chosen))
            run(head, chosen, start, repeated)
