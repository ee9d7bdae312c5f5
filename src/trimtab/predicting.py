"""A model with a head of its own, or with an encoder and a decoder, is asked for its answers: one row, or a file.

predictor = Predictor(Named.find("runs/harbour"))
for row, answer in predictor.answers([predictor.row("is berth seven free?")]):
    print(answer.text)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from trimtab.config.resolve import Job
from trimtab.config.run import EvaluationConfig
from trimtab.data import forms
from trimtab.data.opening import is_table
from trimtab.data.rows import Row
from trimtab.data.sources import rows_of
from trimtab.errors import ConfigError, DataError
from trimtab.hints import pasted
from trimtab.models.locate import ModelHead
from trimtab.models.positions import positions_of
from trimtab.questions import lines_of, question_of
from trimtab.runs.named import Named
from trimtab.surgery.contexts import for_inference
from trimtab.tasks import Answer, of_head

_BATCHES_AT_ONCE = 16
"""Of so many batches rows are sorted by their length."""


class Predictor:
    """A model that is asked for answers.

    Raises ConfigError for one that goes on from a text, and whatever loading raises.
    """

    def __init__(self, named: Named, *, batch_size: int | None = None, max_new_tokens: int | None = None) -> None:
        if named.head == ModelHead():
            raise ConfigError(
                f"{named.name}: this model goes on from a text, and has no head or targets of its own; ask it with "
                f"{pasted('generate', named.name)} ..."
            )
        self.named, self.task = named, of_head(named.head)
        evaluation = named.config.evaluation if named.config is not None else EvaluationConfig()
        said = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
        self._evaluation = evaluation.model_copy(update={name: one for name, one in said.items() if one is not None})
        self._reader = named.reader()

    def row(self, text: str, number: int = 1) -> Row:
        """The row that asks for ``text`` by itself. Raises DataError if there is none."""
        if not text.strip():
            raise DataError("there is no text to answer")
        return Row("the command", number, f"text {number}", self.task.as_row(text))

    def rows_in(self, file: str) -> Iterator[Row]:
        """The rows of ``file``; of a file that is no table, each line asks by itself, and ``-`` is standard input."""
        if is_table(file, ".json") or Path(file).is_dir():
            yield from rows_of(self.named.source_of_rows(file), root=Path.cwd())
            return
        for number, line in enumerate(lines_of(file), start=1):
            if line.strip():
                yield Row(file, number, f"{file}, line {number}", self.task.as_row(line))

    def answers(self, rows: Iterable[Row]) -> Iterator[tuple[Mapping[str, Any], Answer]]:
        """What is asked, without an answer that it has, and what the model answers, in the order of ``rows``.

        Raises DataError, which names the row, for one that asks nothing; those before it are answered.
        """
        model = self.named.load()
        config = self.named.config
        if config is not None:
            length = Job.of(config).read_for(self.named.head).reading_length
        else:
            length = positions_of(model).limit()
        coming = iter(rows)
        with for_inference(model):
            while some := list(islice(coming, self._evaluation.batch_size * _BATCHES_AT_ONCE)):
                asked, wrong = self._asked(some)
                settings: dict[str, Any] = {"evaluation": self._evaluation, "max_length": length}
                found = self.task.answers(model, self._reader, asked, head=self.named.head, **settings) if asked else []
                for row, answer in zip(some, found, strict=False):
                    yield {key: value for key, value in row.value.items() if key not in self.task.answer_keys}, answer
                if wrong is not None:
                    raise wrong

    def _asked(self, rows: Sequence[Row]) -> tuple[list[Any], DataError | None]:
        """The rows as the task takes them, up to the first that cannot be; and what is wrong with that."""
        asked: list[Any] = []
        for row in rows:
            try:
                asked.append(self.task.asked(self._as_trained(row), self.named.head))
            except DataError as error:
                return asked, error
        return asked, None

    def _as_trained(self, row: Row) -> Row:
        """``row``; of a model that writes, with the source that a row of the form of its run's has."""
        form = self.named.form
        if form not in forms.names():
            return row
        source = question_of(row).prompt(form, self._reader, None)
        return replace(row, value={self.task.input_key: source})
