"""Scores the choices of each row, which are a closed set or the row's own, by their log-likelihood.

The score of an answer is the sum of its tokens' log-probabilities given the prompt, with prompt and answer tokenised as
one text. If the tokens of one answer begin another ("answer1", "answer10"), the shorter one could never lose. The
end-of-sequence token is then scored, too, for every answer of every row that has these choices. Otherwise it is left
out: answers with different tokens exclude each other without it, and three answers of one token cost one forward pass.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise, takewhile, zip_longest
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from trimtab.data.batches import by_length
from trimtab.data.rows import Example
from trimtab.data.tokens import encode_all, encode_prompt
from trimtab.errors import DataError, ModelError
from trimtab.models.causal_head import IGNORED, Head
from trimtab.processes import divided

WORTHWHILE = 8
"""Fewest tokens of a shared beginning that is run once. Running fewer again costs less than copying their keys and
values."""

MANY = 8
"""Fewest sequences for which a row is run by itself, with its prompt computed once."""

BLOCK = 16_000_000
"""Characters, each prompt counted once for every choice, that are held as tokens at a time: about 200 MB."""


@dataclass(frozen=True)
class ChoiceScores:
    """The scores of all rows.

    Attributes:
        scores: ``scores[row][choice]``, log-likelihoods in nats.
        best: for each row, the index of the likeliest choice.
        best_by_length: for each row, the index of the choice that is likeliest per character.
        loss: summed token loss of the true answers, in nats.
        tokens: how many tokens that sum is over.
    """

    scores: list[list[float]]
    best: list[int]
    best_by_length: list[int]
    loss: float
    tokens: int


def score_choices(
    head: Head,
    tokenizer: Any,
    examples: Sequence[Example],
    choices: Sequence[str] | None,
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ChoiceScores:
    """Score every choice for every row, all of which have an answer.

    Called inside ``evaluating(head.model)``.

    ``batch_size`` changes the speed and nothing else. A row is rounded differently in another batch. If that could
    decide between its best choices (`Head.tie_margin`), by their scores or, for choices of its own, by their scores per
    character, these choices are scored again alone, without padding.

    Args:
        head: the model.
        tokenizer: its fast tokenizer.
        examples: the rows.
        choices: as ``check_choices`` returns them; None: each row's own.
        batch_size: most sequences in a forward pass.
        max_length: most tokens of a prompt with its longest choice; longer prompts lose their beginning.
        progress: called with the number of rows done and of all rows.

    Raises:
        DataError: a row has no token before its answer, or no room for one, or two choices have the same tokens.
        ModelError: the model's scores are not numbers.
    """
    prefix = len(encode_prompt("", tokenizer))
    for example in examples:
        if not prefix and not example.prompt.rstrip(" "):
            raise _no_prompt(example)
    scores: list[list[float]] = [[] for _ in examples]
    loss, tokens, done = 0.0, 0, 0
    sets = [tuple(choices) if choices is not None else example.choices for example in examples]
    # All rows are tokenised and scored together, unless a hundred choices make too much text.
    most = max(map(len, sets), default=0)
    sizes = [most * (len(example.prompt) + 1) for example in examples]
    for block in map(sorted, by_length(sizes, max(1, len(examples)), BLOCK)):
        chosen = [examples[index] for index in block]
        rows = _prepare(tokenizer, chosen, [sets[index] for index in block], max_length, prefix)
        for finished in _run_rows(head, rows, batch_size):
            if progress is not None:
                progress(done + finished, len(examples))
        done += len(block)
        for index, example, row in zip(block, chosen, rows, strict=True):
            scores[index] = row.scores()
            if not all(map(math.isfinite, scores[index])):
                raise ModelError(
                    f"{example.place}: the model's score of an answer is {scores[index][0]}, not a number. Its weights "
                    "are damaged or its training diverged; train with a lower learning rate."
                )
            own, count = row.loss_of(sets[index].index(str(example.answer)))
            loss, tokens = loss + own, tokens + count
    likeliest, per_character = [], []
    for known, row_scores in zip(sets, scores, strict=True):
        likeliest.append(row_scores.index(max(row_scores)))
        each = [score / len(choice) for score, choice in zip(row_scores, known, strict=True)]
        per_character.append(each.index(max(each)))
    return ChoiceScores(scores, likeliest, per_character, loss=loss, tokens=tokens)


def _run_rows(head: Head, rows: Sequence[_Row], batch_size: int) -> Iterator[int]:
    """Fill in the scores of ``rows``; after each batch, yield how many rows are done."""
    margin = head.tie_margin
    few = [row for row in rows if len(row.sequences) < MANY]
    done = 0
    for group in (few, *([row] for row in rows if len(row.sequences) >= MANY)):
        sequences = [(place, sequence) for place, row in enumerate(group) for sequence in row.sequences]
        waiting = [len(row.sequences) for row in group]
        beginning = Beginning(head, [sequence for _, sequence in sequences])
        batches = by_length([len(sequence.ids) for _, sequence in sequences], batch_size)
        runs = beginning.run_each([[sequences[index][1] for index in batch] for batch in batches])
        for batch, _ in zip(batches, runs, strict=True):
            for index in batch:
                waiting[sequences[index][0]] -= 1
            yield done + sum(left == 0 for left in waiting)
        done += len(group)
        if batch_size > 1:
            alone = [[sequence] for row in group for sequence in row.undecided(margin)]
            deque(beginning.run_each(alone), maxlen=0)


@dataclass
class _Row:
    """The token sequences that are run for one row, and where each choice's tokens are in them."""

    sequences: list[TokenSequence]
    places: list[list[tuple[TokenSequence, int, int]]]
    """For each choice and each of its scored tokens: the sequence, the position before the token, and the token."""
    unscored: list[int]
    """For each choice: how many of its places come before the first token of the choice itself."""
    lengths: list[list[int]]
    """What scores are divided by when choices are compared: 1, and for a row's own choices their characters, too."""

    def scores(self) -> list[float]:
        return [sum(sequence.asked[at][token] for sequence, at, token in places) for places in self.places]

    def loss_of(self, choice: int) -> tuple[float, int]:
        """The summed loss, and the number, of the tokens of one choice."""
        own = self.places[choice][self.unscored[choice] :]
        return -sum(sequence.asked[at][token] for sequence, at, token in own), len(own)

    def undecided(self, margin: float) -> list[TokenSequence]:
        """The sequences of the choices whose order ``margin`` leaves open, under any of ``lengths``; possibly none."""
        scores = self.scores()
        near = sorted(set().union(*(self._near(scores, margin, lengths) for lengths in self.lengths)))
        return list({id(sequence): sequence for sequence in (self.places[at][0][0] for at in near)}.values())

    def _near(self, scores: Sequence[float], margin: float, lengths: Sequence[int]) -> set[int]:
        """The best choice by score over ``lengths`` and those within ``margin`` of it; none, if it is alone there.

        The margin is for one token. Rounding errors are independent, so over n tokens they grow with the root of n.
        """
        scores = [score / length for score, length in zip(scores, lengths, strict=True)]
        margins = [
            margin * math.sqrt(len(places)) / length for places, length in zip(self.places, lengths, strict=True)
        ]
        best = scores.index(max(scores))
        near = {at for at, score in enumerate(scores) if scores[best] - score < max(margins[at], margins[best])}
        return near if len(near) > 1 else set()


def _prepare(
    tokenizer: Any, examples: Sequence[Example], sets: Sequence[tuple[str, ...]], max_length: int | None, prefix: int
) -> list[_Row]:
    """The rows to run, each with its set of choices; the tokenizer puts ``prefix`` tokens before every text."""
    encoded = _encode(tokenizer, examples, sets, end=False)
    ending = {
        choices
        for choices, answers in zip(sets, encoded, strict=True)
        if _one_begins_another([ids for ids, _ in answers])
    }
    if again := [at for at, choices in enumerate(sets) if choices in ending]:
        ended = _encode(tokenizer, [examples[at] for at in again], [sets[at] for at in again], end=True)
        for at, answers in zip(again, ended, strict=True):
            encoded[at] = answers
    rows = []
    for example, choices, answers in zip(examples, sets, encoded, strict=True):
        excess = max(len(ids) for ids, _ in answers) - max_length if max_length is not None else 0
        if excess > 0:
            if min(start for _, start in answers) - excess <= prefix:
                raise DataError(
                    f"{example.place}: in {max_length} tokens its choices leave no room for a prompt; allow more "
                    "tokens, or shorten the choices."
                )
            answers = [(ids[:prefix] + ids[prefix + excess :], start - excess) for ids, start in answers]
        rows.append(_row(example, answers, choices))
    return rows


def _encode(
    tokenizer: Any, examples: Sequence[Example], sets: Sequence[tuple[str, ...]], *, end: bool
) -> list[list[tuple[list[int], int]]]:
    """For each row and choice: the token ids of prompt and answer, and the index of the answer's first token."""
    pairs = zip(examples, sets, strict=True)
    texts = [example.with_answer(choice, ends=end) for example, choices in pairs for choice in choices]
    encoded = encode_all(texts, tokenizer, None)
    if encoded.dropped:
        source, number, _ = encoded.dropped[0]
        raise _no_prompt(next(text for text in texts if (text.source, text.number) == (source, number)))
    tokens = (
        (row["input_ids"], next(at for at, label in enumerate(row["labels"]) if label != IGNORED)) for row in encoded
    )
    return [list(islice(tokens, len(choices))) for choices in sets]


def _one_begins_another(answers: list[list[int]]) -> bool:
    """Whether some list is the beginning of another. In sorted order it comes right before one that it begins."""
    ordered = sorted(answers)
    return any(after[: len(before)] == before for before, after in pairwise(ordered))


def _row(example: Example, answers: list[tuple[list[int], int]], choices: Sequence[str]) -> _Row:
    ordered = sorted(ids for ids, _ in answers)
    for before, after in pairwise(ordered):
        if before == after:
            same = [f"'{choice}'" for choice, (ids, _) in zip(choices, answers, strict=True) if ids == before]
            raise DataError(
                f"{example.place}: the choices {' and '.join(same)} are the same tokens to this tokenizer, so the "
                "model cannot tell them apart; leave one out or spell it otherwise."
            )
    # An answer may merge with the end of the prompt, and its first token then comes earlier than another's. All are
    # scored from the earliest on, or some would have to predict a token that others are given.
    shared = next(at for at, (a, b) in enumerate(zip_longest(ordered[0], ordered[-1])) if a != b)
    start = min(shared, *(first for _, first in answers))
    if start < 1:
        raise _no_prompt(example)
    sequences: list[TokenSequence] = []
    places: list[list[tuple[TokenSequence, int, int]]] = [[] for _ in answers]
    for choice in sorted(range(len(answers)), key=lambda choice: -len(answers[choice][0])):
        ids = answers[choice][0]
        inputs = ids[:-1]
        home = next((kept for kept in sequences if kept.ids[: len(inputs)] == inputs), None)
        if home is None:
            home = TokenSequence(inputs)
            sequences.append(home)
        for at in range(start, len(ids)):
            home.ask(at - 1, ids[at])
            places[choice].append((home, at - 1, ids[at]))
    lengths = [[1] * len(choices)]
    if choices == example.choices:
        lengths.append([len(choice) for choice in choices])
    return _Row(sequences, places, [first - start for _, first in answers], lengths)


@dataclass
class TokenSequence:
    """Token ids to run, and what is asked of the run: the log-probability of ``token`` after ``position``."""

    ids: list[int]
    asked: dict[int, dict[int, float]] = field(default_factory=dict)
    """position -> token -> nats, which are NaN before the run."""

    def ask(self, position: int, token: int) -> None:
        self.asked.setdefault(position, {})[token] = math.nan


def _run(head: Head, sequences: Sequence[TokenSequence], start: int = 0, past: Any = None) -> None:
    """Run one forward pass, and fill in what is asked of each sequence.

    ``past`` holds the keys and values of the first ``start`` tokens, about which nothing is asked.
    """
    device = head.model.get_input_embeddings().weight.device
    ids = _padded_right([sequence.ids[start:] for sequence in sequences], device)
    asked = [(row, at, list(tokens)) for row, one in enumerate(sequences) for at, tokens in one.asked.items()]
    most = max(len(tokens) for _, _, tokens in asked)
    positions = torch.tensor([row * ids.shape[1] + at - start for row, at, _ in asked], device=device)
    padded = torch.tensor([tokens + tokens[:1] * (most - len(tokens)) for _, _, tokens in asked], device=device)
    values = head.log_probabilities(ids, positions, padded, past).tolist()
    for (row, at, tokens), line in zip(asked, values, strict=True):
        sequences[row].asked[at] = dict(zip(tokens, line, strict=False))


class Beginning:
    """Runs the tokens that all sequences begin with once, and then only the rest of each sequence.

    Such a beginning is the instruction before every row of a task, or one prompt before a hundred answers. If it is
    shorter than ``WORTHWHILE``, or if the model keeps no keys and values that can be repeated, whole sequences are run.
    The weights must not change while this object is used.
    """

    def __init__(self, head: Head, sequences: Sequence[TokenSequence]) -> None:
        self.head = head
        self.start = _shared(sequences) if len(sequences) > 1 else 0
        self._past = head.remember(sequences[0].ids[: self.start]) if self.start >= WORTHWHILE else None

    def run_each(self, batches: Sequence[Sequence[TokenSequence]]) -> Iterator[None]:
        """Run one forward pass for each of ``batches``, and fill in what is asked of it; a step of the iterator each.
        Where several processes evaluate, each runs its share of them."""

        def run(batch: Sequence[TokenSequence]) -> list[dict[int, dict[int, float]]]:
            self.run(batch)
            return [sequence.asked for sequence in batch]

        for batch, found in divided(batches, run, one_pass=True):
            for sequence, asked in zip(batch, found, strict=True):
                sequence.asked = asked
            yield

    def run(self, sequences: Sequence[TokenSequence]) -> None:
        """Run one forward pass for some of the sequences, and fill in what is asked of them."""
        if self._past is None:
            _run(self.head, sequences)
        else:
            past = copy.deepcopy(self._past)
            past.batch_repeat_interleave(len(sequences))
            _keep_nothing_more(past)
            _run(self.head, sequences, self.start, past)


def _padded_right(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 ``[rows, longest]``, filled with token 0, which nothing reads."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.int64, device=device)


def _shared(sequences: Sequence[TokenSequence]) -> int:
    """How many tokens all sequences have in common, before the first position that is asked about.

    Sequences that are sorted between two others share all that these two share.
    """
    ordered = sorted(sequence.ids for sequence in sequences)
    common = takewhile(lambda pair: pair[0] == pair[1], zip(ordered[0], ordered[-1], strict=False))
    return min(sum(1 for _ in common), *(min(sequence.asked) for sequence in sequences))


def _no_prompt(example: Example) -> DataError:
    return DataError(
        f"{example.place}: no token comes before the answer, so there is nothing to predict it from; give the row a "
        "prompt."
    )


def _keep_nothing_more(past: Any) -> None:
    """Let each layer of ``past`` hand out its keys and values with those of a pass, but keep none of the pass.

    Nobody reads them afterwards. If all layers kept theirs, these would lie between tensors that exist for a moment
    only, and the holes would add up: a validation of SmolLM2-135M took 230 to 650 MiB more.
    """
    for layer in past.layers:
        if type(layer) is DynamicLayer:
            _fix(layer)


def _fix(layer: Any) -> None:
    keys, values = layer.keys, layer.values

    def update(new_keys: Tensor, new_values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([keys, new_keys], dim=-2), torch.cat([values, new_values], dim=-2)

    layer.update = update
