"""What a study says so far: its cells gathered from disk, means with intervals, paired comparisons.

results.json    everything, so that the page and every number on it can be made again
results.csv     a line for each run and test set
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from trimtab.config.study import ONE_TASK
from trimtab.errors import ConfigError, RunError
from trimtab.files import write_text
from trimtab.metrics import KINDS, METRICS, compared, counts_rows, main_metric
from trimtab.runs.read import read_study_results
from trimtab.runs.results import ChoiceResult, MultipleChoiceResult, Result, TagsResult
from trimtab.runs.study_records import (
    CellRecord,
    CorrectedDifference,
    Costs,
    Difference,
    FailedRun,
    MeanInterval,
    MissingRun,
    RateSearch,
    RunFacts,
    StudyArm,
    StudyMachine,
    StudyResults,
    StudyRun,
    SummaryLine,
    TriedRate,
)
from trimtab.studies.cell import finished_cell
from trimtab.studies.compare import chosen_runs
from trimtab.studies.statistics import difference_of_seeds, holm, mean_interval, paired_difference
from trimtab.studies.study_cells import Cell, Study

_FACTS = tuple(RunFacts.model_fields)
_FIGURES = tuple(metric.name for metric in compared())
_BESIDE = [metric for metric in compared() if metric not in map(main_metric, KINDS)]
"""Metrics that a line gives beside the one it compares."""


def write_results(study: Study, failed: Sequence[tuple[Cell, str]] = ()) -> StudyResults:
    """Write both files into the study's folder; return what ``results.json`` holds. ``failed``: as `compare` gives;
    what failed in an earlier call and is not done yet stays told."""
    results = gather(study, failed)
    results = results.updated(failed=[*results.failed, *_failed_before(study, results)])
    results.write_to(study.folder / "results.json")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["task", "arm", "seed", "learning_rate", "test", "rows", *_FIGURES, *_FACTS])
    for run in results.runs:
        for name, result in run.tests.items():
            figures = [result.figures.get(key, "") for key in _FIGURES]
            facts = [getattr(run, key) for key in _FACTS]
            writer.writerow([run.task, run.arm, run.seed, run.learning_rate, name, result.rows, *figures, *facts])
    write_text(study.folder / "results.csv", text.getvalue())
    return results


def _failed_before(study: Study, now: StudyResults) -> Iterator[FailedRun]:
    """The failures that the results on disk name, of runs that are not done and did not fail again."""
    try:
        before = read_study_results(study.folder).failed
    except RunError:  # no results yet, or damaged ones, which are about to be replaced
        return
    open_runs = {_place(run) for run in now.missing} - {_place(run) for run in now.failed}
    yield from (run for run in before if _place(run) in open_runs)


def _place(run: MissingRun | FailedRun) -> tuple[str, str, int, bool]:
    return run.task, run.arm, run.seed, run.searching


def gather(study: Study, failed: Sequence[tuple[Cell, str]] = ()) -> StudyResults:
    """Everything that is known of a study; what is not done is listed under ``missing``."""
    said = study.said
    searches: list[TriedRate] = []
    runs: list[StudyRun] = []
    missing: list[MissingRun] = []
    machines: list[StudyMachine] = []
    tested: dict[tuple[str, str], Any] = {}
    for task in said.tasks:
        for arm in said.arms:
            chosen = chosen_runs(study, task, arm)
            cells = chosen if chosen is not None else study.runs(task, arm, None)
            for cell in (*study.searches(task, arm), *cells):
                record = finished_cell(cell.config) if cell.searching or chosen is not None else None
                here = {"task": task, "arm": arm, "seed": cell.seed, "learning_rate": _rate(cell, record)}
                if record is None:
                    missing.append(MissingRun(**here, searching=cell.searching))
                    continue
                if (machine := _machine(record)) not in machines:
                    machines.append(machine)
                here |= {key: getattr(record, key) for key in _FACTS}
                if cell.searching:
                    taken = chosen is not None and cell.learning_rate == chosen[0].learning_rate
                    searches.append(TriedRate(**here, taken=taken, validation=record.kept))
                else:
                    runs.append(StudyRun(**here, tests=record.tests))
                    tested[task, arm] = record.identity.get("data", {}).get("test", {})
    return StudyResults(
        title=study.title,
        question=said.question,
        file=study.file.name,
        reference=said.reference,
        seeds=list(said.seeds),
        search=RateSearch(**said.search.model_dump(mode="json")) if said.search else None,
        arms=[StudyArm(arm=arm, series=study.series(arm)) for arm in said.arms],
        summary=_summary(study, runs),
        searches=searches,
        runs=runs,
        missing=missing,
        failed=[
            FailedRun(task=cell.task, arm=cell.arm, seed=cell.seed, searching=cell.searching, reason=reason)
            for cell, reason in failed
        ],
        machines=machines,
        doubts=list(_doubts(study, runs, tested)),
        said=said.model_dump(mode="json"),
    )


def _doubts(study: Study, runs: Sequence[StudyRun], tested: Mapping[tuple[str, str], Any]) -> Iterator[str]:
    """What speaks against comparing an arm with its reference on a test set, a sentence each. ``tested``: by task and
    arm, the test sets of a cell's identity."""
    for (task, arm), mine in tested.items():
        against = study.against(arm)
        theirs = tested.get((task, against), {}) if against is not None else {}
        for test in (name for name in mine if name in theirs):
            place = test if task == ONE_TASK else f"{test} of {task}"
            some = {run.arm: run.tests[test] for run in runs if run.task == task and test in run.tests}
            rows, others = some[arm].rows, some[str(against)].rows
            if rows != others:
                yield f"{place}: {arm} was tested on {rows:,} rows and {against} on {others:,}; they are not compared."
            elif rows < 2 and all(counts_rows(result.kind) for result in some.values()):
                yield f"{place}: one row is too few to compare {arm} with {against}."
            elif _content_of(mine[test]) != _content_of(theirs[test]):
                yield (
                    f"{place}: {arm} and {against} were tested on different files. They are compared row by row, which "
                    "is right only where these are the same questions in the same order."
                )


def _content_of(sources: Any) -> list[Any]:
    """What the test set ``sources`` of a cell's identity holds, wherever it lies and whatever it is called."""
    listed = sources if isinstance(sources, list) else [sources]
    places = [source.get("path", source) if isinstance(source, dict) else source for source in listed]
    return [{**one, "file": one["file"].partition("[")[2]} if isinstance(one, dict) else one for one in places]


def _rate(cell: Cell, record: CellRecord | None) -> float | None:
    """The learning rate of a run; None of one that has still to find its own."""
    if cell.learning_rate != "auto":
        return cell.learning_rate
    return record.learning_rate if record is not None else None


def _middle(rates: Sequence[float]) -> float | None:
    """The one that is shown for the runs of an arm: theirs, or where each found its own the middle one."""
    return sorted(rates)[len(rates) // 2] if rates else None


def _machine(cell: CellRecord) -> StudyMachine:
    return StudyMachine(**cell.machine.plain(), versions=cell.versions)


def _summary(study: Study, runs: Sequence[StudyRun]) -> list[SummaryLine]:
    """A line for each arm on each test set of each task, and on each mean of test sets: means over seeds, and the
    comparison with the reference."""
    lines: list[SummaryLine] = []
    differences: list[Difference | None] = []
    for task in study.said.tasks:
        by_arm = {arm: [run for run in runs if (run.task, run.arm) == (task, arm)] for arm in study.said.arms}
        tests = dict.fromkeys(name for of_arm in by_arm.values() for run in of_arm for name in run.tests)
        means = {name: sets for name, sets in study.said.means.items() if tests.keys() >= {*sets}}
        for name, sets in ({test: (test,) for test in tests} | means).items():
            for arm, mine in by_arm.items():
                if mine and all(one in run.tests for run in mine for one in sets):
                    against = study.against(arm)
                    lines.append(_line(mine, name, sets, against))
                    differences.append(_difference(mine, by_arm[against], sets) if against is not None else None)
    corrected = iter(holm([difference.p for difference in differences if difference is not None]))
    return [
        line
        if difference is None
        else line.updated(difference=CorrectedDifference(**difference.plain(), p_holm=next(corrected)))
        for line, difference in zip(lines, differences, strict=True)
    ]


def _line(mine: Sequence[StudyRun], name: str, sets: Sequence[str], against: str | None) -> SummaryLine:
    """What the runs of an arm on a task came to on one test set, or in the mean of several, without the comparison.
    Raises ConfigError where several are measured by different metrics."""
    results = [[run.tests[one] for one in sets] for run in mine]
    first = results[0]
    measures = {main_metric(one.kind).name: test for test, one in zip(sets, first, strict=True)}
    if len(measures) > 1:
        known = ", ".join(f"'{test}' by {METRICS[measure].label}" for measure, test in measures.items())
        raise ConfigError(f"means: '{name}': expected test sets that are measured alike, got {known}")
    return SummaryLine(
        task=mine[0].task,
        test=name,
        arm=mine[0].arm,
        measure=next(iter(measures)),
        rows=sum(one.rows for one in first),
        majority=_mean_of([_majority(one) for one in first]),
        chance=_mean_of([one.chance if isinstance(one, MultipleChoiceResult) else None for one in first]),
        seeds=[run.seed for run in mine],
        learning_rate=_middle([run.learning_rate for run in mine if run.learning_rate]) if mine[0].steps else None,
        figures={metric.name: _spread(results, metric.name) for metric in _BESIDE},
        costs=Costs(**{key: mean_interval([getattr(run, key) for run in mine]) for key in Costs.model_fields}),
        against=against,
        difference=None,
        **mean_interval([fmean(map(_main, of_run)) for of_run in results]).plain(),
    )


def _main(result: Result) -> float:
    assert result.main is not None, "what is compared is a number"
    return result.main


def _majority(result: Result) -> float | None:
    found = result.majority if isinstance(result, ChoiceResult | TagsResult) else None
    return None if found is None else found.accuracy


def _mean_of(values: Iterable[float | None]) -> float | None:
    """None where one is missing."""
    known = list(values)
    return None if None in known else fmean(one for one in known if one is not None)


def _spread(results: Sequence[Sequence[Result]], name: str) -> MeanInterval | None:
    """The mean of a metric with its interval; None where these test results do not have it."""
    means = [_mean_of(result.figures.get(name) for result in of_run) for of_run in results]
    values = [value for value in means if value is not None]
    return mean_interval(values) if len(values) == len(results) else None


def _difference(mine: Sequence[StudyRun], reference: Sequence[StudyRun], sets: Sequence[str]) -> Difference | None:
    """The paired comparison over the seeds that both have; None where nothing can be paired.

    Rows are paired where the measure is the share of those that are right; any other figure, such as an F1, an error or
    a perplexity, is compared by seeds. In a mean of test sets a row of a small set counts more, so that each set counts
    as one.
    """
    tested = [[run.tests[test] for test in sets if test in run.tests] for run in (*mine, *reference)]
    by_rows = all(counts_rows(result.kind) for results in tested for result in results)
    if len({tuple(result.rows for result in results) for results in tested}) > 1:
        return None

    def outcome(run: StudyRun) -> Any:
        results: list[Any] = [run.tests.get(test) for test in sets]
        if not by_rows:
            return _mean_of(None if one is None else one.main for one in results)
        rows = [one.correct for one in results if one is not None and one.correct is not None]
        if len(rows) < len(sets):
            return None
        every = sum(map(len, rows))
        return [float(right) * every / (len(sets) * len(of_set)) for of_set in rows for right in of_set]

    right: list[dict[int, Any]] = []
    for runs in (mine, reference):
        by_seed = {run.seed: outcome(run) for run in runs}
        right.append({seed: value for seed, value in by_seed.items() if value is not None})
        if not by_seed or len(right[-1]) < len(by_seed):
            return None
    if all(run.steps == 0 for run in mine) or all(run.steps == 0 for run in reference):
        pair = [list(of_arm.values()) for of_arm in right]  # the one run of an arm that is not trained
    else:
        both = [seed for seed in right[0] if seed in right[1]]
        if not both:
            return None
        pair = [[of_arm[seed] for seed in both] for of_arm in right]
    if not by_rows:
        return difference_of_seeds(*pair)
    return paired_difference(*pair) if sum(result.rows for result in tested[0]) > 1 else None
