"""A run folder read as records, and the results of a study and of a search: the one place where they are read back.

Every file may be missing (a run can be stopped at any moment). A file that is there must be whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from trimtab.errors import RunError
from trimtab.files import read_json
from trimtab.metrics import KINDS
from trimtab.reading import open_text, read_text
from trimtab.runs.rate_record import ChosenRate, read_rate
from trimtab.runs.records import MetricsLine, PlanRecord, Summary
from trimtab.runs.results import Prediction, Result, read_result
from trimtab.runs.study_records import SearchResults, StudyResults

T = TypeVar("T")


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
    plan: PlanRecord | None
    metrics: list[MetricsLine]
    sets: list[TestSet]
    rate: ChosenRate | None
    summary: Summary | None
    adapter: bool

    @property
    def interrupted(self) -> bool:
        """Whether the run ended before its time; a run without a summary did not reach its end either."""
        return self.summary is None or self.summary.status != "finished"

    def measures(self, kind: str) -> list[MetricsLine]:
        """The metrics of one kind: ``train`` or ``validation``."""
        return [measure for measure in self.metrics if measure.kind == kind]


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
        config=_read(run / "config.yaml", read_text),
        plan=_read(run / "plan.json", lambda file: PlanRecord.read(read_json(file))),
        metrics=read_metrics(run / "metrics.jsonl"),
        sets=sets,
        rate=read_rate(run / "rate.json"),
        summary=_read(run / "summary.json", lambda file: Summary.read(read_json(file))),
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
        return _read(file, lambda file: read_result(read_json(file)))

    def predictions(stage: str) -> list[Prediction]:
        return _read(run / "predictions" / f"{name}.{stage}.jsonl", _predictions) or []

    before, after = result("before"), result("after")
    if before and after and before.kind != after.kind:
        raise RunError(
            f"{run / 'evaluation' / name}.before.json holds a result of kind '{before.kind}', but {name}.after.json "
            f"one of kind '{after.kind}'. Evaluate both the same way, or remove one of them."
        )
    return TestSet(name, before, after, predictions("before"), predictions("after"))


def read_metrics(file: Path) -> list[MetricsLine]:
    """The lines of ``metrics.jsonl``; none where there is no such file. Raises RunError where one is damaged."""
    return _read(file, _metrics) or []


def read_study_results(study: Path) -> StudyResults:
    """``results.json`` in a study's folder; raises RunError where it is missing or damaged."""
    return _there(study / "results.json", lambda file: StudyResults.read(read_json(file)))


def read_search_results(search: Path) -> SearchResults:
    """``explore.json`` in the folder of a search; raises RunError where it is missing or damaged."""
    return _there(search / "explore.json", lambda file: SearchResults.read(read_json(file)))


def _there(file: Path, reader: Callable[[Path], T]) -> T:
    if (record := _read(file, reader)) is None:
        raise RunError(f"{file}: there is no such file.")
    return record


def _read(file: Path, reader: Callable[[Path], T]) -> T | None:
    """``reader(file)``, or None where there is no such file; every kind of damage becomes a RunError."""
    try:
        return reader(file)
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise _damaged(file, first_complaint(error)) from error
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, a number of 5,000 digits
        raise _damaged(file, getattr(error, "strerror", None) or str(error)) from error


def _lines(file: Path) -> Iterable[tuple[int, str, bool]]:
    """The lines that are not blank: number from 1, text, and whether it ended as a line should."""
    with open_text(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, line, line.endswith("\n")


def _metrics(file: Path) -> list[MetricsLine]:
    """Sorted by step. A resumed run repeats the steps since its checkpoint: the later line counts."""
    last: dict[tuple[str, int], MetricsLine] = {}
    for number, line, whole in _lines(file):
        # A run that was killed while it appended its last line has cut it.
        if whole or _is_json(line):
            measure = _record(file, number, line, MetricsLine.read)
            last[measure.kind, measure.step] = measure
    return sorted(last.values(), key=lambda measure: measure.step)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _predictions(file: Path) -> list[Prediction]:
    return [_record(file, number, line, Prediction.read) for number, line, _ in _lines(file)]


def _record(file: Path, number: int, line: str, read: Callable[[Any], T]) -> T:
    """What ``line`` holds; raises RunError, which names it, where it is damaged."""
    try:
        return read(json.loads(line))
    except ValidationError as error:
        raise _damaged(file, f"line {number}: {first_complaint(error)}") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"line {number}: {error}") from error


def first_complaint(error: ValidationError) -> str:
    """The first complaint, with the key it is about."""
    first = error.errors()[0]
    # The name of a variant ("choice") is pydantic's step, not a key of the file.
    where = ".".join(str(part) for part in first["loc"] if part not in (*KINDS, "figures"))
    place = f"'{where}': " if where else ""
    return f"{place}{first['msg'].removeprefix('Value error, ')}"


def _damaged(file: Path, reason: str) -> RunError:
    return RunError(f"{file} is damaged: {reason}. Restore the file or remove it, then build the report again.")
