"""What a run's page shows of tasks whose answers are no texts: numbers over the true ones, pictures, tagged words."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trimtab.evaluation.evaluate import Evaluation, write
from trimtab.metrics import METRICS
from trimtab.reports.run.run_page import confusion, pieces, write_run_page
from trimtab.reports.run.run_tables import Measured
from trimtab.runs.records import Summary
from trimtab.runs.results import ChoiceResult, ClassScore, EntitiesResult, NumberResult, Prediction


def written(folder: Path, stage: str, record: Any, rows: list[Prediction], **summary: Any) -> str:
    """The page of a run with one measured test set."""
    write(Evaluation("test", record, rows), folder, stage)
    Summary(status="finished", **summary).write_to(folder / "summary.json")
    return write_run_page(folder).read_text("utf-8")


def numbers(*given: float) -> list[Prediction]:
    return [
        Prediction(row=at, prompt=f"row {at}", answer=str(10.0 * at), predicted=str(number), correct=None)
        for at, number in enumerate(given, start=1)
    ]


def test_numbers_are_drawn_over_the_true_ones(tmp_path: Path) -> None:
    record = NumberResult(kind="number", rows=3, spread=8.165, figures={"rmse": 2.0, "pearson": 0.9, "loss": 4.0})
    page = written(tmp_path, "after", record, numbers(12.0, 18.0, 31.0), task="regression", loss_unit="squared error")
    assert 'aria-label="Numbers given over the true ones. RMSE: 2.000 after training"' in page
    assert "always answering the mean would give 8.165" in page
    assert "Some rows" in page
    assert 'class="moved"' not in page  # a number is not right or wrong
    assert "trimtab predict" in page or not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("metric", "before", "after", "change"),
    [("pearson", -0.1, 0.9, "+1.000"), ("matthews", 0.005, 0.969, "+0.964"), ("rmse", 4.0, 3.0, "−25.0 %")],
)
def test_a_correlation_changes_by_what_it_grew(metric: str, before: float, after: float, change: str) -> None:
    assert Measured(METRICS[metric], brief=True, before=before, after=after).change == change


def test_pictures_stand_in_the_page_where_they_are_still_there(tmp_path: Path) -> None:
    Image.new("L", (4, 2), 200).save(tmp_path / "here.png")
    rows = [
        Prediction(row=at, prompt=str(tmp_path / name), answer="a", predicted=said, correct=said == "a")
        for at, (name, said) in enumerate([("here.png", "a"), ("gone.png", "b"), ("summary.json", "b")], start=1)
    ]
    record = ChoiceResult(
        kind="choice", rows=3, choices=["a", "b"], confusion=[[1, 2], [0, 0]], figures={"accuracy": 1 / 3}
    )
    page = written(tmp_path, "after", record, rows, task="image_classification", counted="pictures")
    (found,) = re.findall(
        r'<img class="thumbnail" width="72" height="36" alt="" src="data:image/png;base64,([^"]+)">', page
    )
    assert base64.b64decode(found).startswith(b"\x89PNG")
    assert "img-src data:;" in page
    assert "img-src" not in written(tmp_path, "after", record, rows)  # and nothing is loaded where rows are texts


@pytest.mark.parametrize(
    ("tags", "told"),
    [
        ("B-VES I-VES O B-PER", [("Mary Ann", "VES"), ("meets", ""), ("Jo", "PER")]),
        ("B-VES B-VES O S-PER", [("Mary", "VES"), ("Ann", "VES"), ("meets", ""), ("Jo", "PER")]),
        ("B-VES L-VES O U-PER", [("Mary Ann", "VES"), ("meets", ""), ("Jo", "PER")]),
        ("B-VES I-PER O I-PER", [("Mary", "VES"), ("Ann", "PER"), ("meets", ""), ("Jo", "PER")]),
        ("NOUN NOUN VERB PROPN", [("Mary", "NOUN"), ("Ann", "NOUN"), ("meets", "VERB"), ("Jo", "PROPN")]),
        ("B-VES", [("Mary", "VES"), ("Ann", ""), ("meets", ""), ("Jo", "")]),
    ],
)
def test_words_of_an_entity_are_one_piece(tags: str, told: list[tuple[str, str]]) -> None:
    found = pieces(["Mary", "Ann", "meets", "Jo"], tags, ["PER", "VES"])
    assert [(piece.text, piece.tag) for piece in found] == told
    assert {piece.colour for piece in found if piece.tag == "VES"} <= {1}


def test_tagged_words_are_coloured_by_their_kind(tmp_path: Path) -> None:
    scores = {kind: ClassScore(precision=1.0, recall=0.5, f1=2 / 3, rows=2) for kind in ("PER", "VES")}
    figures = {"entity_f1": 2 / 3, "loss": 0.1}
    record = EntitiesResult(kind="entities", rows=1, choices=["O"], words=3, per_class=scores, figures=figures)
    said = {"words": ["Mary", "Ann", "<b>"], "answer": "B-VES I-VES O", "predicted": "B-VES O O"}
    page = written(tmp_path, "after", record, [Prediction(row=1, prompt="Mary Ann <b>", correct=False, **said)])
    assert '<mark class="tag-1">Mary Ann<small>VES</small></mark> &lt;b&gt;' in page
    assert '<mark class="tag-1">Mary<small>VES</small></mark> Ann &lt;b&gt;' in page
    assert "Precision and recall of each kind of entity" in page
    assert "95 % interval" not in page  # which holds for shares of rows, and an F1 is none


def test_points_that_a_picture_of_numbers_leaves_out_are_told(tmp_path: Path) -> None:
    record = NumberResult(kind="number", rows=900, spread=1.0, figures={"rmse": 2.0})
    rows = numbers(*(10.0 * at for at in range(1, 901)))
    page = written(tmp_path, "after", record, rows, task="regression")
    assert "300 of the 900 rows are drawn." in page
    assert "outside of the picture" not in page
    few = NumberResult(kind="number", rows=3, spread=1.0, figures={"rmse": 2.0})
    write(Evaluation("test", few, numbers(-1e6, 18.0, 31.0)), tmp_path, "before")
    page = written(tmp_path, "after", few, numbers(12.0, 18.0, 31.0), task="regression")
    assert "1 point from before training lies outside of the picture." in page
    assert "rows are drawn" not in page


def test_a_confusion_table_counts_the_answers_that_cannot_be_used(tmp_path: Path) -> None:
    scores = {name: ClassScore(precision=0.0, recall=0.0, f1=0.0, rows=4) for name in "ab"}
    shares = {"accuracy": 0.25, "unusable": 0.375}
    record = ChoiceResult(
        kind="choice", rows=8, choices=["a", "b"], confusion=[[1, 0], [3, 1]], per_class=scores, figures=shares
    )
    first, second = confusion(record)
    assert (first.rows, first.unusable, second.unusable) == (4, 3, 0)
    assert first.cells[0].share == 0.25
    page = written(tmp_path, "after", record, [])
    assert '<th scope="col"><i>unusable</i></th>' in page
    record = record.updated(confusion=[[4, 0], [3, 1]], figures={"accuracy": 0.625, "unusable": 0.0})
    assert "<i>unusable</i>" not in written(tmp_path, "after", record, [])


def test_one_of_a_thing_is_told_as_one(tmp_path: Path) -> None:
    record = ChoiceResult(kind="choice", rows=1, choices=["a"], confusion=[[1]], figures={"accuracy": 1.0})
    page = written(tmp_path, "after", record, [], steps=1, epochs=1.0, train_rows=1)
    assert "<small>1 row, one of 1 answer</small>" in page
    assert "1 epoch of 1 row<" in page
    assert "the 95 % interval that 1 row allows." in page


def test_paths_of_pictures_are_told_whole(tmp_path: Path) -> None:
    rows = [
        Prediction(row=at, prompt=f"C:/seen/p {at} <b>.png", answer="a", predicted="b", correct=False)
        for at in range(1, 7)
    ]
    record = ChoiceResult(
        kind="choice", rows=6, choices=["a", "b"], confusion=[[0, 6], [0, 0]], figures={"accuracy": 0.0}
    )
    page = written(tmp_path, "after", record, rows, task="image_classification", counted="pictures")
    assert '<p dir="auto">C:/seen/p 3 &lt;b&gt;.png</p>' in page
    assert "A prompt in full" not in page
