"""What evaluations say: ``evaluation/NAME.STAGE.json``, a result, and ``predictions/NAME.STAGE.jsonl``, a line a row.

The metrics of a result are its ``figures``; `trimtab.metrics` has the table of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, get_args

from pydantic import Field, TypeAdapter, model_validator
from pydantic_core import PydanticCustomError

from trimtab.metrics import METRICS, main_metric
from trimtab.outcomes import ClassFigures
from trimtab.runs.records import FiguresRecord, Record


class Majority(Record):
    """What always giving the commonest answer would reach."""

    answer: str
    accuracy: float


class ClassScore(Record):
    """How well one answer is recognised; ``rows`` is how often it is the true one."""

    precision: float
    recall: float
    f1: float
    rows: int


def class_scores(labels: Sequence[str], figures: ClassFigures) -> dict[str, ClassScore]:
    """How well each of ``labels`` is recognised."""
    columns = (column.tolist() for column in figures)
    return {
        label: ClassScore(precision=precision, recall=recall, f1=f1, rows=int(count))
        for label, precision, recall, f1, count in zip(labels, *columns, strict=True)
    }


class QuestionScore(FiguresRecord):
    """The figures of the rows that ask one question, where rows ask different ones."""

    order: ClassVar[tuple[str, ...]] = ("question", "rows", "figures")

    question: str
    rows: int


_ROUNDING = 1e-6

OWN_ADAPTER = "adapter"
"""What a result in a run's folder calls the run's own adapter, wherever the folder is moved."""


class Measured(NamedTuple):
    """What was measured on what: the model, its adapter (None: the bare model) and the files of the rows."""

    model: str | None
    adapter: str | None
    source: str | None

    @classmethod
    def of(cls, model: str, adapter: str | None, files: Iterable[str]) -> Measured:
        """With local files by their absolute paths."""
        places = (str(Path(file).absolute()) if Path(file).exists() else file for file in files)
        return cls(model, adapter, ", ".join(places))


class _Result(FiguresRecord):
    """What all kinds of result have. ``task`` and what follows it: of a benchmark's task alone.

    ``cut``: rows of which the model did not read all; ``left_out``: those that are no part of the perplexity, since
    their answers have no room. ``model``, ``adapter`` and ``source``, the files of the rows: what was measured on what.
    """

    order: ClassVar[tuple[str, ...]] = (
        *("kind", "dataset", "rows", "answers", "choices", "figures", "per_class", "confusion", "majority", "chance"),
        *("words", "spread"),
        *("unusable", "word_f1", "perplexity", "tokens", "seconds"),
        *("task", "answered_by", "relabelled", "questions", "mean_weighted_f1", "correct"),
        *("cut", "left_out", "model", "adapter", "source"),
    )

    kind: str
    dataset: str = ""
    rows: int
    seconds: float | None = None
    task: str | None = None
    answered_by: str | None = None
    relabelled: dict[str, str] = Field(default_factory=dict)
    questions: list[QuestionScore] = Field(default_factory=list)
    cut: int = 0
    left_out: int = 0
    model: str | None = None
    adapter: str | None = None
    source: str | None = None
    correct: str | None = None
    """In the results of a study's cell: a ``1`` or a ``0`` for each row."""

    @model_validator(mode="after")
    def _has_its_main_metric(self) -> Self:
        name = main_metric(self.kind).name
        # A perplexity too large for a number may be null.
        if name not in self.figures or (self.figures[name] is None and name != "perplexity"):
            raise PydanticCustomError("missing", "'{name}' should be a number", {"name": name})
        for key, value in self.figures.items():
            if value is not None and METRICS[key].share and not -_ROUNDING <= value <= 1 + _ROUNDING:
                raise ValueError(f"'{key}' should be a share from 0 to 1, and is {value:g}")
        return self

    def unnamed(self) -> Self:
        """A copy that names no model, adapter or file: paths of one machine have no place in the results of a study."""
        kept = self.model_fields_set - set(Measured._fields)
        return type(self)(**{name: getattr(self, name) for name in kept})

    @property
    def measured(self) -> Measured:
        """What was measured on what."""
        return Measured(self.model, self.adapter, self.source)

    @property
    def main(self) -> float | None:
        """The metric by which results of this kind are compared."""
        return self.figures[main_metric(self.kind).name]


class ChoiceResult(_Result):
    """Rows whose answers are a closed set. ``confusion[i][j]``: rows of true answer i that got answer j.

    ``answers``: how many there are, where a row has several.
    """

    kind: Literal["choice"] = "choice"
    answers: int | None = None
    choices: list[str]
    per_class: dict[str, ClassScore] = Field(default_factory=dict)
    confusion: list[list[int]]
    majority: Majority | None = None

    @model_validator(mode="after")
    def _square(self) -> Self:
        size = len(self.choices)
        if len(self.confusion) != size or any(len(row) != size for row in self.confusion):
            raise ValueError(f"'confusion' should have {size} rows of {size} counts, as there are {size} choices")
        return self


class MultipleChoiceResult(_Result):
    """Rows that bring their own choices. ``chance``: what guessing would reach."""

    kind: Literal["multiple_choice"] = "multiple_choice"
    chance: float


class GenerationResult(_Result):
    """Rows with open answers."""

    kind: Literal["generation"] = "generation"


class PerplexityResult(_Result):
    """Rows of plain text."""

    kind: Literal["perplexity"] = "perplexity"
    tokens: int | None = None


class LabelsResult(_Result):
    """Rows that may have several labels each. ``per_class``: each label by itself."""

    kind: Literal["labels"] = "labels"
    choices: list[str]
    per_class: dict[str, ClassScore] = Field(default_factory=dict)


class NumberResult(_Result):
    """Rows whose answers are numbers. ``spread``: their standard deviation, which is the RMSE of always answering
    their mean."""

    kind: Literal["number"] = "number"
    spread: float


class TagsResult(_Result):
    """Rows with a tag for each word, ``words`` in all; the rest as of a `ChoiceResult`, of words in place of rows."""

    kind: Literal["tags"] = "tags"
    choices: list[str]
    words: int
    per_class: dict[str, ClassScore] = Field(default_factory=dict)
    confusion: list[list[int]]
    majority: Majority | None = None


class EntitiesResult(_Result):
    """Rows with a tag for each word, ``words`` in all, where tags mark entities. ``per_class``: each kind of entity;
    its ``rows`` are the entities."""

    kind: Literal["entities"] = "entities"
    choices: list[str]
    words: int
    per_class: dict[str, ClassScore] = Field(default_factory=dict)


Result = (
    ChoiceResult
    | MultipleChoiceResult
    | GenerationResult
    | PerplexityResult
    | LabelsResult
    | NumberResult
    | TagsResult
    | EntitiesResult
)

RESULTS: dict[str, type[Result]] = {kind.model_fields["kind"].default: kind for kind in get_args(Result)}
"""The class of each kind of result."""

_RESULT: TypeAdapter[Result] = TypeAdapter(Annotated[Result, Field(discriminator="kind")])


def read_result(values: Any) -> Result:
    """The result of plain values that came from a file; raises pydantic's ValidationError."""
    return _RESULT.validate_python(values, extra="ignore")


class Prediction(Record):
    """One row of a test set with what the model made of it.

    Attributes:
        row: its number, from 1.
        correct: None where an answer is neither right nor wrong, but near or far: a number.
        usable: whether what the model wrote could be read; ``read``: as which of the choices, or as which several.
        scores: choice -> its log-likelihood; the best of them, where there are many.
        words: those of a text in which each has a tag; ``answer`` and ``predicted`` are then the tags, with a space
            between each two.
    """

    row: int
    prompt: str
    answer: str
    predicted: str
    correct: bool | None
    usable: bool = True
    read_as: str | list[str | None] | None = Field(None, alias="read")
    scores: dict[str, float] = Field(default_factory=dict)
    words: list[str] = Field(default_factory=list)
