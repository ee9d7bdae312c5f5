"""How causal language modelling reads rows: in any form, with answers of a closed set, of each row's own, or open."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.config.resolve import LONGEST_ROW
from trimtab.config.run import RunConfig
from trimtab.data.choices import check_choices, infer_choices
from trimtab.data.forms import read_examples
from trimtab.data.rows import Example, Source
from trimtab.data.tokens import EncodedRows, encode_once
from trimtab.data.unknown import tell_unknown
from trimtab.errors import ConfigError
from trimtab.metrics import choosing
from trimtab.models.gguf import cache_folder
from trimtab.notes import Notes, rows as counted
from trimtab.runs.events import Listener
from trimtab.tasks._inputs import Answers, Inputs, Rows, gather, note_alike


def read_inputs(config: RunConfig, tokenizer: Any, listener: Listener, max_length: int = LONGEST_ROW) -> Inputs:
    """Read every file that ``config`` names; training rows are cut to ``max_length`` tokens.

    Raises DataError for a missing file, a bad row, or rows with nothing to train on; ConfigError for a metric that
    these rows do not have.
    """
    return gather(TextRows(config, tokenizer, listener, max_length))


class TextRows(Rows[Example]):
    """Texts, and the parts of them that are learnt."""

    def __init__(self, config: RunConfig, tokenizer: Any, listener: Listener, max_length: int) -> None:
        super().__init__(config, listener)
        self.tokenizer = tokenizer
        self.max_length = max_length

    def read(self, sources: Sequence[Source], notes: Notes) -> list[Example]:
        return read_examples(sources, self.tokenizer, root=Path.cwd(), notes=notes)

    def answers(self, training: list[Example], notes: Notes) -> Answers:
        listener = self.listener
        own = all(row.choices for row in training)
        choices = _choices(self.config, training, own)
        if own:
            listener.note("each row brings its own answers to choose from")
        elif choices is None:
            listener.note(
                "answers are open" if any(row.answer is not None for row in training) else "rows without answers"
            )
        else:
            listener.note(f"answers are a closed set of {len(choices)}: {', '.join(choices)}")
            note_alike(choices, "answers", notes)
            if unseen := sorted(set(choices) - {str(row.answer) for row in training}):
                notes.add(f"no training row has the answer {', '.join(unseen)}, which cannot be learned then")
        return Answers(choices, choices is not None or own, own)

    def check(self, answers: Answers, rows: list[Example]) -> None:
        if answers.choices is not None:
            check_choices(answers.choices, rows)

    def check_metric(self, answers: Answers) -> None:
        metric = self.config.train.metric
        if not answers.scored and metric not in ("auto", *choosing("perplexity")):
            raise ConfigError(
                f"train.metric: {metric} is for a closed set of answers, and these are open; choose loss, or "
                "name the answers in data.choices"
            )
        known = choosing("multiple_choice" if answers.own else "choice")
        if answers.scored and not answers.own and metric not in ("auto", *known):
            raise ConfigError(f"train.metric: {metric} is not measured of these rows; choose one of {', '.join(known)}")
        if answers.own and metric not in ("auto", *known):
            raise ConfigError(
                f"train.metric: {metric} is for a closed set of answers, and here each row brings its own; choose "
                f"{' or '.join(known[::-1])}"
            )

    def encode(self, training: list[Example], times: Sequence[int], answers: Answers, notes: Notes) -> EncodedRows:
        encoded = encode_once(training, self.tokenizer, self.max_length, cache_folder().with_name("tokens"))
        if encoded.cut:
            is_all = self.config.data.max_length == "auto" and self.max_length < LONGEST_ROW
            why = ", as many as the model has positions" if is_all else ""
            notes.add(f"{counted(encoded.cut)} cut to data.max_length = {self.max_length} tokens{why}")
        if getattr(self.tokenizer, "unk_token_id", None) in encoded.vocabulary():
            texts = {(row.source, row.number): row for row in training}
            rows = ((texts[origin], row["input_ids"]) for origin, row in zip(encoded.origins, encoded, strict=True))
            told = ((row.place, [row.text], tokens) for row, tokens in rows)
            tell_unknown(told, self.tokenizer, notes, written=True)
        return encoded


def _choices(config: RunConfig, training: list[Example], own: bool) -> list[str] | None:
    said = config.data.choices
    if own:
        if said != "auto":
            raise ConfigError("data.choices: these rows bring their own choices; leave it at auto")
        return None
    if said is None:
        return None
    if said == "auto":
        return infer_choices(training)
    if any(row.answer is None for row in training):
        raise ConfigError("data.choices: these rows are plain text and have no answers; set it to null")
    return check_choices(said, training)
