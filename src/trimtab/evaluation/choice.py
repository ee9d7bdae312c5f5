"""Rows with a closed set of answers, or with choices of their own: which of them does the model find likeliest?

The score of an answer is its log-likelihood given the prompt: the sum of its tokens' log-probabilities, with prompt and
answer tokenised as one text. Where one answer's tokens begin another's ("answer1", "answer10") the shorter one could
never lose, so then the end-of-sequence token is scored too, for every answer of every row that has these choices.
Otherwise it is left out: answers that begin differently are different events as they stand, and three answers of one
token cost one forward pass.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise, takewhile, zip_longest
from typing import Any

import torch
from torch import Tensor

from trimtab.data.batches import by_length
from trimtab.data.rows import Example
from trimtab.data.tokens import IGNORED, encode_all, encode_prompt
from trimtab.errors import DataError, ModelError
from trimtab.surgery.serving import evaluating
from trimtab.tasks import Head

WORTHWHILE = 8
"""Tokens from which on a common beginning is kept: fewer cost less than the copies of their keys and values."""

MANY = 8
"""Sequences of a row from which on its whole prompt is run once for them, and no longer together with other rows."""

BLOCK = 16_000_000
"""Characters of prompts, each counted once for every choice, that are held as tokens at a time: about 200 MB."""


@dataclass(frozen=True)
class ChoiceScores:
    """Scores of rows by choices.

    Attributes:
        scores: ``scores[row][choice]``, log-likelihoods in nats.
        best: the index of the likeliest choice of each row.
        best_by_length: the index of the choice of each row that is likeliest per character.
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
    """Score every choice for every row.

    ``batch_size`` decides nothing but speed. In another batch the same row is rounded otherwise, so a row whose best
    two choices are closer than that (`Head.tie_margin`), by the score or, where they are its own, by that per
    character, is scored again by itself, without padding.

    Args:
        head: the model.
        tokenizer: its fast tokenizer.
        examples: rows with an answer each.
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
    for block in _blocks(examples, max(map(len, sets), default=0)):
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
                    f"{example.source}, row {example.number}: the model's score of an answer is {scores[index][0]}, "
                    "not a number. Its weights are damaged or its training diverged; train with a lower learning rate."
                )
            own, count = row.loss_of(sets[index].index(str(example.answer)))
            loss, tokens = loss + own, tokens + count
    likeliest, per_character = [], []
    for known, row_scores in zip(sets, scores, strict=True):
        likeliest.append(row_scores.index(max(row_scores)))
        each = [score / len(choice) for score, choice in zip(row_scores, known, strict=True)]
        per_character.append(each.index(max(each)))
    return ChoiceScores(scores, likeliest, per_character, loss=loss, tokens=tokens)


def _blocks(examples: Sequence[Example], choices: int) -> list[list[int]]:
    """Indices of rows that are tokenised and scored together: all, unless a hundred choices make too much text.

    Those with the longest prompts come first, so that a lack of memory or of room shows at once.
    """
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index].prompt))
    blocks: list[list[int]] = []
    while order:
        rows = max(1, BLOCK // (choices * (len(examples[order[0]].prompt) + 1)))
        blocks.append(sorted(order[:rows]))
        order = order[rows:]
    return blocks


def _run_rows(head: Head, rows: Sequence[_Row], batch_size: int) -> Iterator[int]:
    """Fill in the scores of ``rows``; yields, again and again, how many of them are done."""
    margin = head.tie_margin
    few = [row for row in rows if len(row.sequences) < MANY]
    done = 0
    with evaluating(head.model):
        for group in (few, *([row] for row in rows if len(row.sequences) >= MANY)):
            sequences = [(place, sequence) for place, row in enumerate(group) for sequence in row.sequences]
            waiting = [len(row.sequences) for row in group]
            beginning = Beginning(head, [sequence for _, sequence in sequences])
            for batch in by_length([len(sequence.ids) for _, sequence in sequences], batch_size):
                beginning.run([sequences[index][1] for index in batch])
                for index in batch:
                    waiting[sequences[index][0]] -= 1
                yield done + sum(left == 0 for left in waiting)
            done += len(group)
            if batch_size > 1:
                for row in group:
                    for sequence in row.undecided(margin):
                        beginning.run([sequence])


@dataclass
class _Row:
    """The sequences that one row needs, and where in them each choice's tokens are."""

    sequences: list[TokenSequence]
    places: list[list[tuple[TokenSequence, int, int]]]
    """For each choice, of each of its scored tokens: the sequence, the position before it, and the token."""
    unscored: list[int]
    """For each choice: how many of its places are before its own first token, shared by all choices."""
    lengths: list[list[int]]
    """What the scores are divided by wherever choices are compared: 1, and the characters of a row's own choices."""

    def scores(self) -> list[float]:
        return [sum(sequence.asked[at][token] for sequence, at, token in places) for places in self.places]

    def loss_of(self, choice: int) -> tuple[float, int]:
        """Summed loss and number of one choice's own tokens."""
        own = self.places[choice][self.unscored[choice] :]
        return -sum(sequence.asked[at][token] for sequence, at, token in own), len(own)

    def undecided(self, margin: float) -> list[TokenSequence]:
        """The sequences of the choices that come within ``margin`` of the best one, by the score or by that per
        character; none, if it is alone there."""
        scores = self.scores()
        near = sorted(set().union(*(self._near(scores, margin, lengths) for lengths in self.lengths)))
        return list({id(sequence): sequence for sequence in (self.places[at][0][0] for at in near)}.values())

    def _near(self, scores: Sequence[float], margin: float, lengths: Sequence[int]) -> set[int]:
        """The choices within ``margin`` of the best one, all divided by ``lengths``; none, if it is alone there.

        Roundings of several tokens add up like chances.
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
    """The rows to run, with the choices of each; ``prefix``: the number of tokens that a text begins with by itself."""
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
                    f"{example.source}, row {example.number}: in {max_length} tokens its choices leave no room for a "
                    "prompt; allow more tokens, or shorten the choices."
                )
            answers = [(ids[:prefix] + ids[prefix + excess :], start - excess) for ids, start in answers]
        rows.append(_row(example, answers, choices))
    return rows


def _encode(
    tokenizer: Any, examples: Sequence[Example], sets: Sequence[tuple[str, ...]], *, end: bool
) -> list[list[tuple[list[int], int]]]:
    """Of each row and choice: the token ids of prompt and answer, and the index of the answer's first token."""
    texts = [
        Example(
            source=example.source,
            number=example.number,
            text=example.prompt + choice,
            trained=((len(example.prompt.rstrip(" ")), len(example.prompt + choice)),),
            prompt=example.prompt,
            answer=choice,
            ends=end,
        )
        for example, choices in zip(examples, sets, strict=True)
        for choice in choices
    ]
    encoded = encode_all(texts, tokenizer, None)
    if encoded.dropped:
        source, number, _ = encoded.dropped[0]
        raise _no_prompt(next(text for text in texts if (text.source, text.number) == (source, number)))
    pairs = (
        (row["input_ids"], next(at for at, label in enumerate(row["labels"]) if label != IGNORED)) for row in encoded
    )
    return [list(islice(pairs, len(choices))) for choices in sets]


def _one_begins_another(answers: list[list[int]]) -> bool:
    """Whether some list is a beginning of another. Sorted, it would stand right before one that it begins."""
    ordered = sorted(answers)
    return any(after[: len(before)] == before for before, after in pairwise(ordered))


def _row(example: Example, answers: list[tuple[list[int], int]], choices: Sequence[str]) -> _Row:
    ordered = sorted(ids for ids, _ in answers)
    for before, after in pairwise(ordered):
        if before == after:
            same = [f"'{choice}'" for choice, (ids, _) in zip(choices, answers, strict=True) if ids == before]
            raise DataError(
                f"{example.source}, row {example.number}: the choices {' and '.join(same)} are the same tokens to this "
                "tokenizer, so the model cannot tell them apart; leave one out or spell it otherwise."
            )
    # All are scored from the same token on, or some would have to predict a token that others are given: an answer
    # may merge with the end of the prompt, and then its own first token comes earlier than another's.
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
    """Token ids to run, and the log-probabilities to read from the run: position -> next token -> nats."""

    ids: list[int]
    asked: dict[int, dict[int, float]] = field(default_factory=dict)

    def ask(self, position: int, token: int) -> None:
        """Ask for ``token`` after ``position``."""
        self.asked.setdefault(position, {})[token] = math.nan


def _run(head: Head, sequences: Sequence[TokenSequence], start: int = 0, past: Any = None) -> None:
    """One forward pass; fills in what is asked of each sequence.

    ``past`` holds the keys and values of the first ``start`` tokens of each, of which nothing is asked.
    """
    device = head.model.get_input_embeddings().weight.device
    ids = _padded_right([sequence.ids[start:] for sequence in sequences], device)
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
            _run(self.head, sequences)
        else:
            past = copy.deepcopy(self._past)  # a pass adds its own tokens to what it is given
            past.batch_repeat_interleave(len(sequences))
            _run(self.head, sequences, self.start, past)


def _padded_right(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 ``[rows, longest]``, filled with token 0, which nothing reads."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.int64, device=device)


def _shared(sequences: Sequence[TokenSequence]) -> int:
    """How many tokens all sequences begin with, before the first position that is asked about.

    What the first and the last have in common in the order of a dictionary, all between them have, too.
    """
    ordered = sorted(sequence.ids for sequence in sequences)
    common = takewhile(lambda pair: pair[0] == pair[1], zip(ordered[0], ordered[-1], strict=False))
    return min(sum(1 for _ in common), *(min(sequence.asked) for sequence in sequences))


def _no_prompt(example: Example) -> DataError:
    return DataError(
        f"{example.source}, row {example.number}: no token comes before the answer, so there is nothing to predict it "
        "from; give the row a prompt."
    )
