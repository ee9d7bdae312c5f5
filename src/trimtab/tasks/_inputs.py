"""The rows of a run: read, recognised, split, tokenised."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from trimtab.config.run import RunConfig
from trimtab.data.choices import check_choices, infer_choices
from trimtab.data.forms import read_examples
from trimtab.data.rows import Example
from trimtab.data.split import draw, split_off
from trimtab.data.tokens import EncodedRows, encode_once
from trimtab.errors import ConfigError
from trimtab.metrics import choosing
from trimtab.models.gguf import cache_folder
from trimtab.notes import Notes
from trimtab.runs.events import Listener


@dataclass(frozen=True)
class Inputs:
    """What a run trains, validates and is tested on.

    ``choices``: the closed set of answers, or None where rows bring their own, answers are open or there are none.
    ``scored``: whether answers are scored among choices, and not written.
    """

    rows: EncodedRows
    validation: list[Example]
    tests: dict[str, list[Example]]
    form: str
    choices: list[str] | None
    scored: bool
    notes: tuple[str, ...] = ()
    """What the user should know of the rows, a sentence each; the listener has been told."""


def read_inputs(config: RunConfig, tokenizer: Any, listener: Listener) -> Inputs:
    """Read every file that ``config`` names. Raises DataError for a missing file, a bad row, or rows with nothing to
    train on; ConfigError for a metric that these rows do not have."""
    notes = Notes()
    with notes.told(listener.remark):
        inputs = _read_inputs(config, tokenizer, listener, notes)
    return replace(inputs, notes=tuple(notes))


def _read_inputs(config: RunConfig, tokenizer: Any, listener: Listener, notes: Notes) -> Inputs:
    data = config.data
    read = partial(read_examples, tokenizer=tokenizer, root=Path.cwd(), form=data.form, notes=notes)
    training = read(data.train)
    form = training[0].form
    listener.note(f"{len(training)} training rows of the form '{form}'")
    tests = {name: read(path) for name, path in data.test.items()}
    own = all(row.choices for row in training)
    choices = _choices(config, training, own)
    if own:
        listener.note("each row brings its own answers to choose from")
    elif choices is None:
        listener.note("answers are open" if any(row.answer is not None for row in training) else "rows without answers")
    else:
        listener.note(f"answers are a closed set of {len(choices)}: {', '.join(choices)}")
        if unseen := sorted(set(choices) - {str(row.answer) for row in training}):
            notes.add(f"no training row has the answer {', '.join(unseen)}, which cannot be learned then")

    if data.train_limit is not None and data.train_limit < len(training):
        training = draw(training, data.train_limit, 0, choices)
        listener.note(f"{len(training)} of them drawn: data.train_limit")
    validation: list[Example] = []
    if isinstance(data.validation, float):
        training, validation = split_off(training, data.validation, config.train.seed, choices)
        listener.note(f"{len(validation)} rows split off for validation, {len(training)} left to train on")
    elif data.validation is not None:
        validation = read(data.validation)
        listener.note(f"{len(validation)} validation rows")
    scored = choices is not None or own
    if choices is not None:
        for measured in (validation, *tests.values()):
            check_choices(choices, measured)
    if config.evaluation.limit is not None:
        tests = {name: tested[: config.evaluation.limit] for name, tested in tests.items()}
    metric = config.train.metric
    if validation and not scored and metric not in ("auto", *choosing("perplexity")):
        raise ConfigError(
            f"train.metric: {metric} is for a closed set of answers, and these are open; choose loss, or "
            "name the answers in data.choices"
        )
    if validation and own and metric not in ("auto", *(known := choosing("multiple_choice"))):
        raise ConfigError(
            f"train.metric: {metric} is for a closed set of answers, and here each row brings its own; choose "
            f"{' or '.join(known[::-1])}"
        )
    for name, tested in tests.items():
        listener.note(f"{len(tested)} test rows in '{name}'")

    rows = encode_once(training, tokenizer, data.max_length, cache_folder().with_name("tokens"))
    for source, number, reason in rows.dropped:
        notes.row(f"{source}, row {number}", f"left out of training ({reason})")
    if rows.cut:
        notes.add(f"{rows.cut} rows were cut to data.max_length = {data.max_length} tokens")
    return Inputs(rows=rows, validation=validation, tests=tests, form=form, choices=choices, scored=scored)


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
