"""A study as a whole: what runs, what does not run again, what is gathered, and what a person is told."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from scipy import stats

from tiny_runs import rows, write_rows
from trimtab.errors import ConfigError, Interrupted, RunError
from trimtab.files import read_json
from trimtab.reports.study.comparison import findings, study_tables
from trimtab.reports.study.study_page import write_study_page
from trimtab.reports.study.study_pictures import draw_scores
from trimtab.runs.read import read_study_results
from trimtab.runs.study_records import CellRecord, StudyResults
from trimtab.studies import compare as comparing
from trimtab.studies.cell import finished_cell, run_cell
from trimtab.studies.compare import Selection, chosen_runs, compare
from trimtab.studies.statistics import holm, paired_difference
from trimtab.studies.study_cells import Cell, load_study
from trimtab.studies.study_results import write_results

pytestmark = pytest.mark.usefixtures("here", "bare_runs")

LORA = {"match": "all-linear", "method": "lora", "rank": 2, "alpha": 4}


@pytest.fixture
def make_study(tmp_path: Path, model_folder: Path) -> Callable[..., Path]:
    """Write a study of LoRA, DoRA and the untrained model, each run a few steps of a tiny model."""
    write_rows(tmp_path / "train.jsonl", rows(24))
    write_rows(tmp_path / "test.jsonl", rows(21))

    def make(**said: Any) -> Path:
        study = {
            "base": {
                "model": str(model_folder),
                "data": {"train": "train.jsonl", "test": {"harbour": "test.jsonl"}, "validation": None},
                "train": {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-2, "precision": "float32"},
                "evaluation": {"before": False},
            },
            "arms": {
                "lora": {"plan": [LORA]},
                "dora": {"plan": [{**LORA, "method": "dora"}]},
                "untrained": {"train": {"epochs": 0}},
            },
            "reference": "lora",
            "seeds": [0, 1],
            **said,
        }
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(study, sort_keys=False))
        return path

    return make


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the cells that are really run, in order."""
    found: list[str] = []
    monkeypatch.setattr(comparing, "run_cell", lambda config, *_, **how: _noted(found, config, **how))
    return found


def _noted(found: list[str], config: Any, **how: Any) -> Any:
    if finished_cell(config) is None:  # one that is done is only tidied
        found.append("/".join(re.sub(r"-[0-9a-f]{8}$", "", part) for part in config.output.parts[-2:]))
    return run_cell(config, **how)


def test_a_study_runs_once_and_says_what_its_runs_say(
    make_study: Callable[..., Path], ran: list[str], tmp_path: Path
) -> None:
    search = {"factors": [0.1, 1], "settings": {"data": {"validation": 0.5}}}
    study = load_study(make_study(search=search))
    assert compare(study) == []
    # The search first, then seed by seed; the model that is not trained is neither searched nor run twice.
    assert ran[:4] == ["lora/rate-0.001", "lora/rate-0.01", "dora/rate-0.001", "dora/rate-0.01"]
    assert ran[4:] == ["lora/seed-0", "dora/seed-0", "untrained/seed-0", "lora/seed-1", "dora/seed-1"]
    assert compare(study) == []
    assert len(ran) == 9
    assert not list((study.folder / "cells").rglob("*.safetensors"))

    results = write_results(study)
    assert results.plain() == read_json(study.folder / "results.json")
    for arm in ("lora", "dora"):
        tried = [run for run in results.searches if run.arm == arm]
        best = min(tried, key=lambda run: (-run.validation.figures["accuracy"], run.validation.loss))
        assert [run.taken for run in tried] == [run is best for run in tried]
        assert {run.learning_rate for run in results.runs if run.arm == arm} == {best.learning_rate}
    lines = {line.arm: line for line in results.summary}
    correct = {arm: [run.tests["harbour"].correct for run in results.runs if run.arm == arm] for arm in lines}
    for arm, line in lines.items():
        shares = [run.count("1") / 21 for run in correct[arm]]
        assert line.mean == pytest.approx(sum(shares) / len(shares))
        if len(shares) == 2 and shares[0] != shares[1]:
            want = stats.ttest_1samp(shares, 0).confidence_interval(0.95)
            assert (line.low, line.high) == pytest.approx((want.low, want.high))
    assert lines["lora"].difference is None
    compared = [paired_difference(correct[arm], correct["lora"]) for arm in ("dora", "untrained")]
    for arm, found, p in zip(("dora", "untrained"), compared, holm([one.p for one in compared]), strict=True):
        said = lines[arm].difference
        assert (said.mean, said.p, said.p_holm) == (found.mean, found.p, p)
    assert lines["untrained"].costs.trainable_parameters.mean == 0
    with (study.folder / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["arm"], row["seed"]) for row in table] == [(run.arm, str(run.seed)) for run in results.runs]
    assert float(table[0]["accuracy"]) == pytest.approx(correct["lora"][0].count("1") / 21)
    assert str(tmp_path) not in json.dumps(results.plain()).replace(str(results.said["base"]["model"]), "")


class _StopsAt:
    """Every cell runs but the one of that number, which is cut off by the user."""

    def __init__(self, number: int, error: Exception) -> None:
        self.left, self.error = number, error

    def __call__(self, config: Any, *_: Any, **how: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return run_cell(config, **how)


@pytest.mark.full
def test_a_study_that_was_cut_off_goes_on(
    make_study: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    study = load_study(make_study())
    monkeypatch.setattr(comparing, "run_cell", _StopsAt(3, Interrupted("stopped")))
    with pytest.raises(Interrupted):
        compare(study)
    results = write_results(study)
    assert [(run.arm, run.seed) for run in results.runs] == [("lora", 0), ("dora", 0)]
    assert len(results.missing) == 3
    assert "Not finished: 2 of 5 runs are done" in write_study_page(study.folder).read_text(encoding="utf-8")
    ran = request.getfixturevalue("ran")
    assert compare(study) == []
    assert ran == ["untrained/seed-0", "lora/seed-1", "dora/seed-1"]
    assert write_results(study).missing == []


def test_a_cell_that_fails_does_not_stop_the_others(make_study: Callable[..., Path]) -> None:
    arms = {"broken": {"plan": [{**LORA, "match": "*.x_proj"}]}, "lora": {"plan": [LORA]}}
    study = load_study(make_study(arms=arms, seeds=[0]))
    ((cell, reason),) = compare(study)
    assert (cell.arm, cell.seed) == ("broken", 0)
    assert "rule 1" in reason
    results = write_results(study, [(cell, reason)])
    assert [run.arm for run in results.runs] == ["lora"]
    assert write_results(study).failed == results.failed, "it is still not done, and why is still told"
    other = load_study(make_study(arms={"lora": arms["lora"]}, seeds=[0]))
    page = write_study_page(study.folder).read_text(encoding="utf-8")
    assert "broken on all, seed 0" in page
    assert "ends with no module" in page
    assert write_results(other).failed == [], "an arm that the study has no more"


def test_an_arm_whose_search_fails_is_not_run(make_study: Callable[..., Path], ran: list[str]) -> None:
    arms = {"broken": {"plan": [{**LORA, "match": "*.x_proj"}]}, "lora": {"plan": [LORA]}}
    search = {"factors": [1.0], "settings": {"data": {"validation": 0.5}}}
    study = load_study(make_study(arms=arms, search=search, seeds=[0]))
    assert [cell.name for cell, _ in compare(study)] == ["broken, search at rate 0.01"]
    assert ran == ["broken/rate-0.01", "lora/rate-0.01", "lora/seed-0"]
    assert chosen_runs(study, "all", "broken") is None


def test_another_configuration_is_run_beside_the_first(make_study: Callable[..., Path], ran: list[str]) -> None:
    arms = {"lora": {"plan": [LORA]}, "dora": {"plan": [{**LORA, "method": "dora"}]}}
    file = make_study(arms=arms, seeds=[0])
    compare(load_study(file))
    changed = {**arms, "dora": {"plan": [{**LORA, "method": "dora", "rank": 1}]}}
    study = load_study(make_study(arms=changed, seeds=[0]))
    compare(study)
    assert ran == ["lora/seed-0", "dora/seed-0", "dora/seed-0"]  # LoRA has not changed
    (parameters,) = (run.trainable_parameters for run in write_results(study).runs if run.arm == "dora")
    compare(load_study(make_study(arms=arms, seeds=[0])))
    assert len(ran) == 3  # the first one's results are still there
    results = write_results(load_study(make_study(arms=arms, seeds=[0])))
    assert parameters < next(run.trainable_parameters for run in results.runs if run.arm == "dora")


def test_a_part_of_a_study(make_study: Callable[..., Path], ran: list[str]) -> None:
    tasks = {"one": {}, "two": {"data": {"train_limit": 12}}}
    study = load_study(make_study(tasks=tasks, seeds=[0]))
    compare(study, selection=Selection(frozenset({"two"}), frozenset({"dora"})))
    assert ran == ["dora/seed-0"]
    assert [run.task for run in write_results(study).runs] == ["two"]
    write_study_page(study.folder)


def test_two_at_one_study_are_refused(make_study: Callable[..., Path]) -> None:
    study = load_study(make_study(seeds=[0]))

    class Second(comparing.StudyListener):
        def cell_began(self, cell: Cell, number: int, total: int) -> None:
            with pytest.raises(RunError, match=r"another process .*is at work here"):
                compare(study)

    assert compare(study, Second(), Selection(arms=frozenset({"untrained"}))) == []


# --- what is said, from results that are made up


CLOSED = {
    "kind": "choice",
    "choices": ["calm"],
    "confusion": [[1]],
    "macro_f1": 0.3,
    "majority": {"answer": "calm", "accuracy": 0.4},
}
EXAM = {"kind": "multiple_choice", "accuracy_norm": 0.6, "chance": 0.25}


def made_up(
    tmp_path: Path,
    make_study: Callable[..., Path],
    right: dict[str, list[str]],
    kind: dict[str, Any] = CLOSED,
    **said: Any,
) -> Any:
    """The results of a study whose arms have these rows right, by seed."""
    study = load_study(make_study(**said))
    cells = {}
    for arm, by_seed in right.items():
        for cell, correct in zip(study.runs("all", arm, None), by_seed, strict=True):
            trained = 0 if arm == "untrained" else 1000 * (1 + len(cells))
            share = correct.count("1") / len(correct)
            tests = kind | {"rows": len(correct), "accuracy": share, "correct": correct}
            values = {
                "identity": {},
                "trainable_parameters": trained,
                "training_seconds": 60.0,
                "total_seconds": 90.0,
                "peak_memory_gib": 1.25,
                "steps": trained,
                "train_rows": 24,
                "train_tokens": 100,
                "precision": "float32",
                "machine": {"processor": "an <abacus>", "cores": 2, "memory_gib": 8},
                "versions": {"torch": "2"},  # written by an earlier version
                "tests": {"harbour": tests},
                "validation": [],
                "kept": None,
            }
            cells[cell.config.output] = CellRecord(**values)
    from trimtab.studies import study_results

    study.folder.mkdir(exist_ok=True)
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(study_results, "finished_cell", lambda config: cells.get(config.output))
        return write_results(study), study.folder


@pytest.mark.parametrize(("kind", "words"), [(CLOSED, "The commonest answer alone gives 40.0"), (EXAM, "Guessing")])
def test_what_a_look_at_the_rows_is_worth_is_said(
    make_study: Callable[..., Path], tmp_path: Path, kind: dict[str, Any], words: str
) -> None:
    arms = {"lora": ["1100", "1000"], "dora": ["1100", "1110"], "untrained": ["1000"]}
    _, folder = made_up(tmp_path, make_study, arms, kind)
    page = write_study_page(folder).read_text(encoding="utf-8")
    assert words in page
    assert words.removeprefix("The ").split(" alone")[0].lower() in (folder / "scores.svg").read_text("utf-8")


@pytest.mark.full
def test_a_claim_is_made_where_the_test_holds_it_up_and_nowhere_else(
    make_study: Callable[..., Path], tmp_path: Path
) -> None:
    lora = ["1" * 60 + "0" * 40, "0" * 2 + "1" * 60 + "0" * 38]
    arms = {"lora": lora, "dora": ["1" * 90 + "0" * 10, "1" * 91 + "0" * 9], "untrained": ["1" * 61 + "0" * 39]}
    results, folder = made_up(tmp_path, make_study, arms)
    claim, rest = findings(results)
    assert re.fullmatch(
        r"harbour: dora is 30\.5 points above lora \(95 % interval .* to .*; p < 0\.001 after .*\)\.", claim
    )
    assert rest.startswith("harbour: no difference from lora can be told for untrained (−")
    (table,) = study_tables(results)
    assert [column.header for column in table.columns][2:] == ["accuracy", "above\nlora", "p", "time", "memory"]
    Console(file=(shown := io.StringIO()), width=80).print(table)
    assert "…" not in shown.getvalue()
    assert shown.getvalue().count("1.25 GiB") == 3

    page = write_study_page(folder).read_text(encoding="utf-8")
    assert claim in page.replace("&lt;", "<")
    assert "an &lt;abacus&gt;" in page
    assert not re.search(r"(src|href)=.?https?:", page)
    for part in ("What was found", "Against lora", "Time and memory", "How it was done", "McNemar", "Holm"):
        assert part in page
    for name in ("scores", "differences", "costs"):
        assert (folder / f"{name}.png").stat().st_size > 5000
        assert "<svg" in (folder / f"{name}.svg").read_text(encoding="utf-8")


def test_the_interval_of_a_share_ends_where_shares_do(make_study: Callable[..., Path], tmp_path: Path) -> None:
    """Two seeds far apart, whose interval of Student's reaches from below 0 to above 100 %."""
    results, _ = made_up(tmp_path, make_study, {"lora": ["10" * 20, "11" * 20], "dora": ["10" * 20, "10" * 20]})
    wild = next(line for line in results.summary if line.arm == "lora")
    assert wild.low < 0
    assert wild.high > 1
    (axes,) = draw_scores(results).axes
    drawn = [height for line in axes.lines for height in line.get_ydata()]
    assert (min(drawn), max(drawn)) == (0, 100)


def test_points_of_like_size_stay_near_their_place(make_study: Callable[..., Path], tmp_path: Path) -> None:
    results, _ = made_up(tmp_path, make_study, {"lora": ["10" * 20], "dora": ["11" * 20]}, seeds=[0])
    values = results.plain()
    for line, trained in zip(values["summary"], (1_000_000, 1_050_000), strict=True):
        line["costs"]["trainable_parameters"]["mean"] = trained
    (axes,) = draw_scores(StudyResults(**values)).axes
    dora, lora = sorted(float(line.get_xdata()[0]) for line in axes.lines if line.get_marker() in "oD")
    assert 0.98e6 < dora < 1.02e6 < 1.03e6 < lora < 1.07e6
    low, high = axes.get_xlim()
    assert (lora / dora) == pytest.approx((high / low) ** 0.04, rel=0.01)


@pytest.mark.full
def test_arms_may_be_compared_in_pairs(make_study: Callable[..., Path], tmp_path: Path) -> None:
    arms = {
        "lora": {"plan": [LORA], "series": "lora"},
        "other": {"plan": [{**LORA, "rank": 1}], "series": "lora", "against": None},
        "dora": {"plan": [{**LORA, "method": "dora"}], "against": "other"},
        "more": {"plan": [{**LORA, "rank": 3}]},
    }
    right = {arm: [f"{'1' * (50 + step)}{'0' * (50 - step)}"] * 2 for step, arm in enumerate(arms)}
    results, folder = made_up(tmp_path, make_study, right, arms=arms)
    lines = {line.arm: line for line in results.summary}
    assert [lines[arm].against for arm in arms] == [None, None, "other", "lora"]
    assert lines["dora"].difference.mean == pytest.approx(0.01)
    assert "dora against other (" in findings(results)[0]
    write_study_page(folder)


@pytest.mark.full
def test_a_page_of_one_seed_and_of_texts_without_answers(make_study: Callable[..., Path], tmp_path: Path) -> None:
    results, folder = made_up(tmp_path, make_study, {"lora": ["10" * 20], "dora": ["11" * 20]}, seeds=[0])
    assert results.summary[0].low is None
    write_study_page(folder)
    write_rows(tmp_path / "train.jsonl", rows(24, "text"))
    write_rows(tmp_path / "test.jsonl", rows(9, "text"))
    study = load_study(make_study(seeds=[0, 1], output="texts"))
    assert compare(study) == []
    results = write_results(study)
    assert {line.measure for line in results.summary} == {"perplexity"}
    assert all(line.difference is None for line in results.summary)  # no rows that are right or wrong
    assert findings(results) == []
    write_study_page(study.folder)


def test_nothing_done_yet_is_a_page_too(make_study: Callable[..., Path]) -> None:
    study = load_study(make_study())
    assert write_results(study).runs == []
    assert "Not finished: 0 of 5 runs are done" in write_study_page(study.folder).read_text(encoding="utf-8")
    assert study_tables(read_study_results(study.folder)) == []


def test_each_run_of_a_study_finds_its_own_rate_and_the_results_name_it(make_study: Callable[..., Path]) -> None:
    study = load_study(make_study(), ["train.learning_rate=auto"])
    compare(study, selection=Selection(arms=frozenset({"lora"})))
    results = write_results(study)
    found = {run.seed: run.learning_rate for run in results.runs}
    assert found.keys() == {0, 1}
    assert all(isinstance(rate, float) and 0 < rate < 1 for rate in found.values())
    assert {run.learning_rate for run in results.missing if run.arm == "dora"} == {None}
    assert results.summary[0].learning_rate in found.values()
    assert write_study_page(study.folder).is_file()
    assert not compare(study, selection=Selection(arms=frozenset({"lora"})))  # what is done is found again


def test_a_search_over_factors_of_auto_is_refused(make_study: Callable[..., Path]) -> None:
    path = make_study(search={"factors": [0.5, 2], "settings": {"data": {"validation": 0.25}}})
    with pytest.raises(ConfigError, match="factors multiply"):
        load_study(path, ["train.learning_rate=auto"])
