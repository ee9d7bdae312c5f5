"""A run folder read into plain values: the one place where reports meet files on disk.

Every file may be missing (a run can be stopped at any moment). A file that is there must be whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from trimtab.errors import RunError
from trimtab.files import read_json

T = TypeVar("T")


class _Record(BaseModel):
    """Keys that are not listed are ignored, so that a newer run still gives a page."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Rule(_Record):
    """One rule of a plan and what it came to."""

    rule: int
    method: str
    match: str | list[str]
    layers: Any = "all"
    options: dict[str, Any] = {}
    modules: int
    parameters: int


class Module(_Record):
    """One module that got an adapter; ``rows`` and ``columns`` are the shape ``[out, in]`` of its base."""

    module: str
    method: str
    rule: int
    rows: int = Field(alias="out")
    columns: int = Field(alias="in")
    parameters: int


class Plan(_Record):
    """``plan.json``."""

    total_parameters: int
    trainable_parameters: int
    rules: list[Rule]
    modules: list[Module] = []

    @property
    def methods(self) -> list[str]:
        """The methods in the order of the rules, each once."""
        return list(dict.fromkeys(rule.method for rule in self.rules))


class Measure(_Record):
    """A line of ``metrics.jsonl``. A loss that is no number is kept: the page says so."""

    model_config = ConfigDict(allow_inf_nan=True)

    kind: str
    step: int
    epoch: float | None = None
    loss: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    accuracy: float | None = None
    macro_f1: float | None = None


class Majority(_Record):
    """What always giving the commonest answer would reach."""

    answer: str
    accuracy: float


class ClassScore(_Record):
    """How well one answer is found; ``rows`` is how often it is the true one."""

    precision: float
    recall: float
    f1: float
    rows: int


class Choice(_Record):
    """A test set whose answers are a closed set. ``confusion[i][j]``: rows of true answer i that got answer j."""

    kind: Literal["choice"]
    rows: int
    choices: list[str]
    accuracy: float
    macro_f1: float
    weighted_f1: float
    confusion: list[list[int]]
    per_class: dict[str, ClassScore] = {}
    majority: Majority | None = None
    perplexity: float | None = None

    @model_validator(mode="after")
    def _square(self) -> Choice:
        size = len(self.choices)
        if len(self.confusion) != size or any(len(row) != size for row in self.confusion):
            raise ValueError(f"'confusion' should have {size} rows of {size} counts, as there are {size} choices")
        return self


class MultipleChoice(_Record):
    """A test set whose rows bring their own choices. ``accuracy_norm`` is by the log-likelihood per character."""

    kind: Literal["multiple_choice"]
    rows: int
    accuracy: float
    accuracy_norm: float
    chance: float
    perplexity: float | None = None


class Generation(_Record):
    """A test set with open answers."""

    kind: Literal["generation"]
    rows: int
    exact_match: float
    unusable: float
    perplexity: float | None = None


class Perplexity(_Record):
    """A test set of plain text."""

    kind: Literal["perplexity"]
    rows: int
    perplexity: float | None
    tokens: int | None = None


Result = Choice | MultipleChoice | Generation | Perplexity
_KINDS = ("choice", "multiple_choice", "generation", "perplexity")


class Prediction(_Record):
    """One row of a test set with what the model made of it."""

    row: int
    prompt: str
    answer: str
    predicted: str
    correct: bool
    usable: bool = True


class Machine(_Record):
    """Where a run was trained."""

    processor: str | None = None
    cores: int | None = None
    memory_gib: float | None = None


class Summary(_Record):
    """``summary.json``; a run that was stopped early leaves parts of it out."""

    status: str = "interrupted"
    model: str | None = None
    created: datetime | None = None
    steps: int | None = None
    epochs: float | None = None
    training_seconds: float | None = None
    total_seconds: float | None = None
    peak_memory_gib: float | None = None
    total_parameters: int | None = None
    trainable_parameters: int | None = None
    adapter_bytes: int | None = None
    precision: str | None = None
    best_step: int | None = None
    train_rows: int | None = None
    validation_rows: int | None = None
    train_tokens: int | None = None
    versions: dict[str, str] = {}
    machine: Machine = Machine()


@dataclass(frozen=True)
class TestSet:
    """Everything that is known of one test set: results and predictions before and after training."""

    __test__ = False  # the name begins as pytest's classes do

    name: str
    before: Result | None
    after: Result | None
    rows_before: list[Prediction]
    rows_after: list[Prediction]

    @property
    def result(self) -> Result | None:
        """The result after training, or the one before it where there is no other."""
        return self.after or self.before


@dataclass(frozen=True)
class Run:
    """A run folder. ``metrics`` is in the order of steps, ``sets`` in that of names; ``adapter``: is there one?"""

    path: Path
    config: str | None
    plan: Plan | None
    metrics: list[Measure]
    sets: list[TestSet]
    summary: Summary | None
    adapter: bool

    @property
    def interrupted(self) -> bool:
        """Whether the run ended before its time; a run without a summary did not reach its end either."""
        return self.summary is None or self.summary.status == "interrupted"

    def measures(self, kind: str) -> list[Measure]:
        """The metrics of one kind: ``train`` or ``validation``."""
        return [measure for measure in self.metrics if measure.kind == kind]


_RESULT: TypeAdapter[Result] = TypeAdapter(Annotated[Result, Field(discriminator="kind")])


def read_run(path: Path | str) -> Run:
    """Read the run folder at ``path``.

    Raises RunError where there is no such folder, where it holds no run, or where a file of it is damaged.
    """
    run = Path(path)
    if not run.is_dir():
        raise RunError(f"{run}: there is no such run folder.")
    sets = read_sets(run)
    found = [run / name for name in ("config.yaml", "plan.json", "metrics.jsonl", "summary.json")]
    if not sets and not any(file.exists() for file in found):
        raise RunError(
            f"{run} is not a run folder: it has none of {', '.join(file.name for file in found)}. "
            "Give the folder that `trimtab finetune` wrote."
        )
    return Run(
        path=run,
        config=_read(run / "config.yaml", lambda file: file.read_text(encoding="utf-8")),
        plan=_read(run / "plan.json", lambda file: Plan.model_validate(read_json(file))),
        metrics=_read(run / "metrics.jsonl", _metrics) or [],
        sets=sets,
        summary=_read(run / "summary.json", lambda file: Summary.model_validate(read_json(file))),
        adapter=(run / "adapter").is_dir(),
    )


def read_sets(run: Path) -> list[TestSet]:
    """The results and predictions of a run folder, by name of the test set."""
    stages = (".before", ".after")
    files = [*(run / "evaluation").glob("*.json"), *(run / "predictions").glob("*.jsonl")]
    names = {file.stem.removesuffix(stage) for file in files for stage in stages if file.stem.endswith(stage)}
    return [_read_set(run, name) for name in sorted(names)]


def _read_set(run: Path, name: str) -> TestSet:
    def result(stage: str) -> Result | None:
        file = run / "evaluation" / f"{name}.{stage}.json"
        return _read(file, lambda file: _RESULT.validate_python(read_json(file)))

    def predictions(stage: str) -> list[Prediction]:
        return _read(run / "predictions" / f"{name}.{stage}.jsonl", _predictions) or []

    before, after = result("before"), result("after")
    if before and after and before.kind != after.kind:
        raise RunError(
            f"{run / 'evaluation' / name}.before.json holds a result of kind '{before.kind}', but {name}.after.json "
            f"one of kind '{after.kind}'. Evaluate both the same way, or remove one of them."
        )
    return TestSet(name, before, after, predictions("before"), predictions("after"))


def _read(file: Path, reader: Callable[[Path], T]) -> T | None:
    """``reader(file)``, or None where there is no such file; every kind of damage becomes a RunError."""
    try:
        return reader(file)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _damaged(file, str(error)) from error
    except ValidationError as error:
        raise _damaged(file, _reason(error)) from error


def _lines(file: Path) -> Iterable[tuple[int, str, bool]]:
    """The lines that are not blank: number from 1, text, and whether it ended as a line should."""
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, line, line.endswith("\n")


def _metrics(file: Path) -> list[Measure]:
    """Sorted by step. A resumed run repeats the steps since its checkpoint: the later line counts."""
    last: dict[tuple[str, int], Measure] = {}
    for number, line, whole in _lines(file):
        try:
            measure = Measure.model_validate(json.loads(line))
        except json.JSONDecodeError as error:
            if not whole:  # a run that was killed while it appended its last line
                break
            raise _damaged(file, f"line {number}: {error}") from error
        except ValidationError as error:
            raise _damaged(file, f"line {number}: {_reason(error)}") from error
        last[measure.kind, measure.step] = measure
    return sorted(last.values(), key=lambda measure: measure.step)


def _predictions(file: Path) -> list[Prediction]:
    rows = []
    for number, line, _ in _lines(file):
        try:
            rows.append(Prediction.model_validate(json.loads(line)))
        except json.JSONDecodeError as error:
            raise _damaged(file, f"line {number}: {error}") from error
        except ValidationError as error:
            raise _damaged(file, f"line {number}: {_reason(error)}") from error
    return rows


def _reason(error: ValidationError) -> str:
    """The first complaint, with the key it is about."""
    first = error.errors()[0]
    # The name of a variant ("choice") is pydantic's step, not a key of the file.
    where = ".".join(str(part) for part in first["loc"] if part not in _KINDS)
    place = f"'{where}': " if where else ""
    return f"{place}{first['msg'].removeprefix('Value error, ')}"


def _damaged(file: Path, reason: str) -> RunError:
    return RunError(f"{file} is damaged: {reason}. Restore the file or remove it, then build the report again.")
