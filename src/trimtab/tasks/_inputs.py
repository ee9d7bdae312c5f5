"""The rows of a run: read, recognised, split, encoded, each by what its task says of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic

from trimtab.config.run import RunConfig
from trimtab.data.rows import Answered, OneAnswered, Source, digest, fingerprint
from trimtab.data.split import draw, split_off, times_an_epoch
from trimtab.errors import DataError
from trimtab.notes import Notes, rows as counted
from trimtab.runs.events import Listener
from trimtab.runs.records import RowsDigest, SourceRecord


@dataclass(frozen=True)
class Inputs:
    """What a run trains, validates and is tested on.

    ``choices``: the closed set of answers, or None where rows bring their own, answers are open or there are none.
    ``scored``: whether answers are scored among choices, and not written.
    """

    rows: Any
    """The training rows as tensors: an `EncodedRows`, or what has all that it has."""
    validation: list[Any]
    tests: dict[str, list[Any]]
    """Rows as the task reads them: an `Example` each, or a `Labelled`."""
    form: str
    choices: list[str] | None
    scored: bool
    sources: tuple[SourceRecord, ...]
    """What was taken of each source of training rows."""
    digests: RowsDigest
    """By which the same rows are known again."""
    notes: tuple[str, ...] = ()
    """What the user should know of the rows, a sentence each; the listener has been told."""


@dataclass(frozen=True)
class Answers:
    """What a task found of the answers of its training rows.

    ``choices``: the closed set of them, or None; ``scored``: whether answers are scored among choices, and not written;
    ``own``: whether each row brings its own choices.
    """

    choices: list[str] | None
    scored: bool
    own: bool = False


def note_alike(names: Sequence[str], what: str, notes: Notes) -> None:
    """Tell of ``names`` (``what``: labels, answers) that differ in upper and lower case alone."""
    folded = Counter(name.casefold() for name in names)
    if alike := [name for name in names if folded[name.casefold()] > 1]:
        notes.add(f"the {what} {', '.join(alike[:10])} differ in upper and lower case alone, and are {what} apart")


class Rows(ABC, Generic[OneAnswered]):
    """How a task reads rows."""

    def __init__(self, config: RunConfig, listener: Listener) -> None:
        self.config = config
        self.listener = listener

    @abstractmethod
    def read(self, sources: Sequence[Source], notes: Notes) -> list[OneAnswered]:
        """The rows of ``sources``."""

    @abstractmethod
    def answers(self, training: list[OneAnswered], notes: Notes) -> Answers:
        """What the answers of the training rows are; the listener is told. Raises DataError, ConfigError for answers
        that cannot be."""

    @abstractmethod
    def check(self, answers: Answers, rows: list[OneAnswered]) -> None:
        """Raise DataError, which names the row, unless ``rows`` can be measured."""

    @abstractmethod
    def encode(self, training: list[OneAnswered], times: Sequence[int], answers: Answers, notes: Notes) -> Any:
        """The training rows, each of which comes so many ``times`` in an epoch, as tensors: an `EncodedRows`, or what
        has all that it has."""

    def check_metric(self, answers: Answers) -> None:
        """Raise ConfigError unless validation rows of such answers have ``train.metric``."""


def gather(rows: Rows[Any]) -> Inputs:
    """Read every file that a run's configuration names, as its task reads them.

    Raises DataError for a missing file, a bad row, or rows with nothing to train on; ConfigError for a metric that
    these rows do not have.
    """
    notes = Notes()
    with notes.told(rows.listener.remark):
        inputs = _gather(rows, notes)
    return replace(inputs, notes=tuple(notes))


def _gather(rows: Rows[Any], notes: Notes) -> Inputs:
    config, listener = rows.config, rows.listener
    data = config.data
    named = data.settled(data.train)
    training = everything = rows.read(named, notes)
    forms = Counter(row.form for row in training)
    told = " and ".join(f"'{form}'" for form in forms)
    listener.note(f"{len(training)} training rows of the form{'s' * (len(forms) > 1)} {told}")
    tests = {name: rows.read(data.settled(sources), notes) for name, sources in data.test.items()}
    answers = rows.answers(training, notes)
    choices = answers.choices

    if data.train_limit is not None and data.train_limit < len(training):
        training = draw(training, data.train_limit, 0, choices)
        listener.note(f"{len(training)} of them drawn: data.train_limit")
    validation: list[Any] = []
    if isinstance(data.validation, float):
        training, validation = split_off(training, data.validation, config.train.seed, choices)
        listener.note(f"{counted(len(validation))} split off for validation, {len(training)} left to train on")
    elif data.validation is not None:
        validation = rows.read(data.settled(data.validation), notes)
        listener.note(f"{len(validation)} validation rows")
    times = times_an_epoch(training, config.train.seed, choices)
    taken = _taken(named, everything, training, times)
    if len(taken) > 1 or any(source.weight != 1 for source in taken):
        for record in taken:
            listener.note(str(record))
    training, times = [row for row, count in zip(training, times, strict=True) if count], list(filter(None, times))
    for measured in (validation, *tests.values()):
        rows.check(answers, measured)
    if config.evaluation.limit is not None:
        tests = {name: tested[: config.evaluation.limit] for name, tested in tests.items()}
    if validation:
        rows.check_metric(answers)
    for name, tested in tests.items():
        listener.note(f"{len(tested)} test rows in '{name}'")

    sets = {"validation rows": validation, **{f"rows of the test set {name}": tested for name, tested in tests.items()}}
    known = {fingerprint(row) for row in training} if any(sets.values()) else set()
    for what, measured in sets.items():
        if again := [row for row in measured if fingerprint(row) in known]:
            notes.add(
                f"{len(again):,} of the {len(measured):,} {what} are among the training rows, too (the first is "
                f"{again[0].place}), so figures of them do not tell how the model does on rows that it has not seen"
            )

    encoded = rows.encode(training, times, answers, notes)
    for source, number, reason in encoded.dropped:
        notes.row(f"{source}, row {number}", f"left out of training ({reason})")
    return Inputs(
        rows=encoded.repeated(times),
        validation=validation,
        tests=tests,
        form=forms.most_common(1)[0][0],
        choices=choices,
        scored=answers.scored,
        sources=taken,
        digests=RowsDigest(
            train=digest(training, times),
            validation=digest(validation) if validation else None,
            test={name: digest(tested) for name, tested in tests.items()},
        ),
    )


def _taken(
    named: Sequence[Source], everything: Sequence[Answered], training: Sequence[Answered], times: Sequence[int]
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
