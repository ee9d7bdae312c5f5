"""The page of a search over plans says what ``explore.json`` holds, and no more."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from trimtab.files import write_json
from trimtab.reports.search.search_page import write_explore_page
from trimtab.reports.search.search_pictures import draw_trials
from trimtab.reports.search.search_words import best_quarter, best_uniform_runs, confirmation_words, trials_table
from trimtab.runs.study_records import SearchResults

GROUPS = ("outer attention", "<b>inner</b>")


def row(number: int, kind: str, score: float | None, methods: tuple[str, str], state: str = "complete") -> Any:
    parts = [
        {"group": group, "method": method, "rank": 0 if method == "none" else 4 + number, "parameters": 10}
        for group, method in zip(GROUPS, methods, strict=True)
    ]
    return {
        "number": number,
        "kind": kind,
        "state": state,
        "score": score,
        "parts": parts,
        "parameters": 20,
        "learning_rate": 1e-3,
        "validations": [],
        "seconds": 60.0,
        "same_as": None,
        "why": "diverged" if state == "failed" else None,
    }


def searched(**changes: Any) -> Any:
    """Two uniform plans, four mixed ones to their end, one pruned, one failed, one that was known."""
    trials = [
        row(0, "uniform", 0.80, ("lora", "lora")),
        row(1, "uniform", 0.83, ("dora", "dora")),
        row(2, "mixed", 0.85, ("mora", "none")),
        row(3, "mixed", 0.70, ("lora", "none"), "pruned"),
        row(4, "mixed", 0.82, ("mora", "dora")),
        row(5, "mixed", None, ("dora", "dora"), "failed"),
        row(6, "mixed", 0.81, ("mora", "dora")),
        row(7, "mixed", 0.60, ("lora", "dora")),
        {**row(8, "mixed", 0.85, ("mora", "none")), "same_as": 2},
    ]
    return {
        "model": "tiny",
        "metric": "accuracy",
        "budget": 21,
        "at_least": 0.95,
        "groups": [{"name": name, "match": ["*"], "layers": "all", "modules": 2} for name in GROUPS],
        "methods": ["lora", "dora", "mora", "none"],
        "learning_rates": [1e-3],
        "seed": 0,
        "run_seed": 0,
        "runs": 8,
        "repeated": 1,
        "unfit": 2,
        "best": 2,
        "best_mixed": 2,
        "best_uniform": 1,
        "trials": trials,
        "confirmation": None,
        **changes,
    }


def record(**changes: Any) -> SearchResults:
    return SearchResults(**searched(**changes))


def confirmation(low: float | None, mean: float, high: float | None) -> Any:
    rows = [{"seed": 1, "mixed": 0.5 + mean, "uniform": 0.5}] * (1 if low is None else 2)
    return {"on": ["test"], "rows": rows, "difference": mean, "low": low, "high": high}


def texts(figure: Any) -> list[str]:
    (axes,) = figure.axes
    return [text.get_text() for text in axes.texts]


def test_the_page_and_its_pictures(tmp_path: Path) -> None:
    write_json(tmp_path / "explore.json", searched(confirmation=confirmation(0.001, 0.02, 0.039)))
    page = write_explore_page(tmp_path).read_text(encoding="utf-8")
    assert "8 runs: 6 to the end, 1 pruned, 1 failed." in page
    assert "Proposals without a run: 1 known already, 2 that could not spend the budget." in page
    assert "mora 6, none; 20 parameters" in page
    assert "+2.0 points (95 % interval over seeds +0.1 to +3.9); mixed is better" in page
    assert "<b>inner</b>" not in page  # names are text
    assert not re.search(r"https?:", page)
    assert "default-src 'none'" in page
    for name in ("trials", "shared", "confirmed"):
        for suffix in ("png", "svg"):
            assert (tmp_path / f"explore_{name}.{suffix}").stat().st_size > 3000
    assert page.count('<figure class="picture" tabindex="0"><svg') == 3


def test_names_in_the_confirmation_keep_their_capitals(tmp_path: Path) -> None:
    known = {**confirmation(-0.039, -0.02, -0.001), "on": ["FPB"]}
    write_json(tmp_path / "explore.json", searched(metric="macro_f1", confirmation=known))
    page = write_explore_page(tmp_path).read_text(encoding="utf-8")
    assert "<p>Best mixed minus best uniform, macro F1 on FPB, 2 new seeds" in page


def test_without_what_is_missing(tmp_path: Path) -> None:
    few = [one for one in searched()["trials"] if one["kind"] == "uniform"]
    write_json(tmp_path / "explore.json", searched(trials=few, best=1, best_mixed=None))
    page = write_explore_page(tmp_path).read_text(encoding="utf-8")
    assert page.count('<figure class="picture" tabindex="0"><svg') == 1
    assert "Not confirmed with new seeds" in page


def test_a_rate_that_each_run_finds_for_itself_needs_no_column(tmp_path: Path) -> None:
    trials = [{**one, "learning_rate": "auto"} for one in searched()["trials"]]
    write_json(tmp_path / "explore.json", searched(trials=trials, learning_rates=["auto"]))
    assert "mora 6, none; 20 parameters" in write_explore_page(tmp_path).read_text(encoding="utf-8")


def test_the_lines_are_named_where_they_are() -> None:
    assert texts(draw_trials(record())) == ["uniform lora 4: 80.0 %", "uniform dora 5: 83.0 %", "best mixed: 85.0 %"]
    figure = draw_trials(record())
    heights = [text.xyann[1] for text in figure.axes[0].texts]  # type: ignore[attr-defined]
    # In shares of the axes' height; a line of text takes less than that.
    assert all(after - before >= 0.055 - 1e-9 for before, after in pairwise(heights))


def test_what_is_best_follows_the_metric() -> None:
    assert [one.number for one in best_quarter(record())] == [2, 4, 6]
    assert [one.number for one in best_uniform_runs(record())] == [1, 0]
    assert [one.number for one in best_quarter(record(metric="loss"))] == [7, 6, 4]
    assert best_quarter(record(trials=searched()["trials"][:4])) == []


def test_the_table_has_the_best_first() -> None:
    table = trials_table(record())
    assert list(table.columns[0].cells) == ["3", "2", "5", "7", "1", "8", "4", "6"]
    assert list(table.columns[-1].cells)[-2:] == ["pruned", "failed"]
    assert next(iter(table.columns[-2].cells)) == "85.0 %"


@pytest.mark.parametrize(
    ("metric", "said", "verdict"),
    [
        ("accuracy", (0.001, 0.02, 0.039), "mixed is better"),
        ("accuracy", (-0.039, -0.02, -0.001), "uniform is better"),
        ("accuracy", (-0.001, 0.02, 0.041), "no difference is shown"),
        ("loss", (0.001, 0.02, 0.039), "uniform is better"),
        ("loss", (-0.039, -0.02, -0.001), "mixed is better"),
        ("accuracy", (None, 0.02, None), "(one seed has no interval); no difference is shown"),
    ],
)
def test_no_claim_beyond_the_interval(metric: str, said: Any, verdict: str) -> None:
    assert confirmation_words(record(metric=metric, confirmation=confirmation(*said))).endswith(verdict)


@pytest.mark.full
def test_no_torch_is_needed(tmp_path: Path) -> None:
    write_json(tmp_path / "explore.json", searched())
    code = f"""
import sys
from itertools import pairwise
from pathlib import Path
from trimtab.reports.search.search_page import write_explore_page
write_explore_page(Path({str(tmp_path)!r}))
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
