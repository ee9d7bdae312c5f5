"""The rows of a run: read, recognised, split, tokenised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimtab.config.resolve import LONGEST_ROW
from trimtab.config.run import RunConfig
from trimtab.data.choices import check_choices, infer_choices
from trimtab.data.forms import read_examples
from trimtab.data.rows import Example, Source, digest
from trimtab.data.split import draw, split_off, times_an_epoch
from trimtab.data.tokens import EncodedRows, encode_once
from trimtab.errors import ConfigError, DataError
from trimtab.metrics import choosing
from trimtab.models.gguf import cache_folder
from trimtab.notes import Notes
from trimtab.notes import rows as counted
from trimtab.runs.events import Listener
from trimtab.runs.records import RowsDigest, SourceRecord


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
    sources: tuple[SourceRecord, ...]
    """What was taken of each source of training rows."""
    digests: RowsDigest
    """By which the same rows are known again."""
    notes: tuple[str, ...] = ()
    """What the user should know of the rows, a sentence each; the listener has been told."""


def read_inputs(config: RunConfig, tokenizer: Any, listener: Listener, max_length: int = LONGEST_ROW) -> Inputs:
    """Read every file that ``config`` names; training rows are cut to ``max_length`` tokens.

    Raises DataError for a missing file, a bad row, or rows with nothing to train on; ConfigError for a metric that
    these rows do not have.
    """
    notes = Notes()
    with notes.told(listener.remark):
        inputs = _read_inputs(config, tokenizer, listener, notes, max_length)
    return replace(inputs, notes=tuple(notes))


def _read_inputs(config: RunConfig, tokenizer: Any, listener: Listener, notes: Notes, max_length: int) -> Inputs:
    data = config.data

    def read(sources: Sequence[Source]) -> list[Example]:
        return read_examples(data.settled(sources), tokenizer, root=Path.cwd(), notes=notes)

    named = data.settled(data.train)
    training = everything = read_examples(named, tokenizer, root=Path.cwd(), notes=notes)
    forms = Counter(row.form for row in training)
    told = " and ".join(f"'{form}'" for form in forms)
    listener.note(f"{len(training)} training rows of the form{'s' * (len(forms) > 1)} {told}")
    tests = {name: read(sources) for name, sources in data.test.items()}
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
    times = times_an_epoch(training, config.train.seed, choices)
    taken = _taken(named, everything, training, times)
    if len(taken) > 1 or any(source.weight != 1 for source in taken):
        for record in taken:
            listener.note(str(record))
    training, times = [row for row, count in zip(training, times, strict=True) if count], list(filter(None, times))
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

    encoded = encode_once(training, tokenizer, max_length, cache_folder().with_name("tokens"))
    for source, number, reason in encoded.dropped:
        notes.row(f"{source}, row {number}", f"left out of training ({reason})")
    if encoded.cut:
        why = ", as many as the model has positions" if data.max_length == "auto" and max_length < LONGEST_ROW else ""
        notes.add(f"{counted(encoded.cut)} cut to data.max_length = {max_length} tokens{why}")
    return Inputs(
        rows=encoded.repeated(times),
        validation=validation,
        tests=tests,
        form=forms.most_common(1)[0][0],
        choices=choices,
        scored=scored,
        sources=taken,
        digests=RowsDigest(
            train=digest(training, times),
            validation=digest(validation) if validation else None,
            test={name: digest(tested) for name, tested in tests.items()},
        ),
    )


def _taken(
    named: Sequence[Source], everything: Sequence[Example], training: Sequence[Example], times: Sequence[int]
) -> tuple[SourceRecord, ...]:
    """What was taken of each source ``named``: of all rows, the ``training`` rows, each so many ``times``."""
    place = {id(source): index for index, source in enumerate(named)}  # rows hold the very objects
    forms: list[dict[str, None]] = [{} for _ in named]
    read, kept, drawn = [0] * len(named), [0] * len(named), [0] * len(named)
    for row in everything:
        read[place[id(row.entry)]] += 1
        forms[place[id(row.entry)]][row.form] = None
    for row, count in zip(training, times, strict=True):
        kept[place[id(row.entry)]] += 1
        drawn[place[id(row.entry)]] += count
    for source, left, count in zip(named, kept, drawn, strict=True):
        if left and not count:
            raise DataError(
                f"{source.path}: a weight of {source.weight:g} leaves none of its {left} training rows; give it a "
                "higher one, or leave the source out."
            )
    return tuple(
        SourceRecord(
            path=source.path,
            forms=list(forms[index]),
            rows=read[index],
            training=kept[index],
            weight=source.weight,
            an_epoch=drawn[index],
        )
        for index, source in enumerate(named)
    )


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
