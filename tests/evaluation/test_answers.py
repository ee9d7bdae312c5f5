"""Written answers against what they should be read as, and their metrics against scikit-learn."""

from __future__ import annotations

from typing import Any

import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from evaluation_cases import example
from trimtab.evaluation import answers
from trimtab.evaluation.generation import Generated
from trimtab.metrics import measure
from trimtab.outcomes import word_f1
from trimtab.runs.results import RESULTS

SENTIMENT = ["negative", "neutral", "positive"]
LEVELS = ["strong negative", "mildly negative", "neutral", "mildly positive", "strong positive"]


def written(*texts: str) -> list[Generated]:
    """Texts as a model writes them."""
    return [Generated(text, usable=bool(text)) for text in texts]


def as_files(judged: answers.Judged) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The figures and details of a result, and its predictions, as their files hold them."""
    figures = measure(judged.kind, judged.outcomes)
    result = RESULTS[judged.kind](kind=judged.kind, rows=len(judged.rows), figures=figures, **judged.details).plain()
    return result, [row.plain() for row in judged.rows]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("positive", "positive"),
        (" Positive.\n", "positive"),
        ("The sentiment is NEGATIVE", "negative"),
        ("\n\nneutral\nInstruction: What is the sentiment? negative/neutral/positive", "neutral"),
        ("positive, positive", "positive"),
        ("negative/neutral/positive", None),
        ("not positive but neutral", None),
        ("positively", None),
        ("nonpositive", None),
        ("good", None),
        ("good\npositive", None),
        ("", None),
    ],
)
def test_a_label_is_read_as_words_of_the_first_line(text: str, label: str | None) -> None:
    assert answers.label_reader(SENTIMENT)(text) == label


@pytest.mark.parametrize(
    ("labels", "text", "label"),
    [
        (LEVELS, "Strong  negative", "strong negative"),
        (LEVELS, "mildly positive news", "mildly positive"),
        (LEVELS, "negative", None),
        (["Yes", "No"], "no", "No"),
        (["Yes", "No"], "Not at all", None),
        (["A", "B", "C"], "B. A firm", None),
        (["A", "B", "C"], "(C) a firm", "C"),
        (["A", "B", "C"], "a firm", None),
        (["Goodwill", "GoodwillImpairmentLoss"], "us-gaap:GoodwillImpairmentLoss", "GoodwillImpairmentLoss"),
        (["a+b", "(c)"], "it is (c)", "(c)"),
    ],
)
def test_labels_of_other_kinds(labels: list[str], text: str, label: str | None) -> None:
    assert answers.label_reader(labels)(text) == label


def test_many_labels_are_told_apart() -> None:
    tags = [f"Tag{number}" for number in range(300)]
    read = answers.label_reader(tags)
    assert [read(tag.lower()) for tag in tags] == tags


def test_metrics_of_written_labels() -> None:
    """F1 is over the true labels: an unusable answer is a miss of its own class and never a class."""
    truth = ["negative", "neutral", "neutral", "positive", "positive", "positive", "neutral", "negative"]
    texts = ["negative", "neutral", "positive", "positive", "no idea", "negative or positive", "neutral.", "???"]
    said = ["negative", "neutral", "positive", "positive", "", "", "neutral", ""]
    rows = [example("News: x\nAnswer: ", label, number) for number, label in enumerate(truth, 1)]
    result, predictions = as_files(answers.labels(rows, written(*texts), known=SENTIMENT))

    assert result["kind"] == "choice"
    assert result["choices"] == SENTIMENT
    assert result["unusable"] == pytest.approx(3 / 8)
    assert result["accuracy"] == pytest.approx(accuracy_score(truth, said)) == pytest.approx(4 / 8)
    for average in ("macro", "weighted"):
        expected = f1_score(truth, said, labels=SENTIMENT, average=average, zero_division=0.0)
        assert result[f"{average}_f1"] == pytest.approx(expected)
    # Over whatever was written, as the benchmark's script has it, the macro average is that of six classes.
    inflated = f1_score(truth, [said or text for said, text in zip(said, texts, strict=True)], average="macro")
    assert result["macro_f1"] > inflated * 1.5
    assert result["confusion"] == confusion_matrix(truth, said, labels=SENTIMENT).tolist()
    assert [row["read"] for row in predictions] == [label or None for label in said]
    assert [row["usable"] for row in predictions] == [label != "" for label in said]
    assert [row["correct"] for row in predictions] == [one == other for one, other in zip(truth, said, strict=True)]
    assert [row["predicted"] for row in predictions] == texts
    assert list(predictions[0]) == ["row", "prompt", "answer", "predicted", "correct", "usable", "read"]


def test_a_label_that_never_occurs_counts_in_the_macro_average() -> None:
    rows = [example("x ", "positive"), example("y ", "positive", 2)]
    result, _ = as_files(answers.labels(rows, written("positive", "positive"), known=SENTIMENT))
    assert (result["accuracy"], result["weighted_f1"], result["unusable"]) == (1, 1, 0)
    assert result["macro_f1"] == pytest.approx(1 / 3)


def test_several_labels_are_counted_one_by_one() -> None:
    known = ["Debt", "Goodwill", "Revenues", "SharePrice"]
    truth = ["Debt,Goodwill,Revenues,Debt", "SharePrice, Debt", "Goodwill"]
    texts = ["Debt, Revenues, revenues", "1. SharePrice\n2. Debt", "Assets,Goodwill,Debt"]
    rows = [example("tags: ", label, number) for number, label in enumerate(truth, 1)]
    result, predictions = as_files(answers.labels(rows, written(*texts), known=known, several=True))
    flat = ["Debt", "Goodwill", "Revenues", "Debt", "SharePrice", "Debt", "Goodwill"]
    said = ["Debt", "Revenues", "Revenues", "", "SharePrice", "Debt", ""]  # the fourth is missing, "Assets" unknown
    assert result["answers"] == 7
    assert result["unusable"] == pytest.approx(2 / 7)
    assert result["accuracy"] == pytest.approx(accuracy_score(flat, said))
    for average in ("macro", "weighted"):
        expected = f1_score(flat, said, labels=known, average=average, zero_division=0.0)
        assert result[f"{average}_f1"] == pytest.approx(expected)
    assert predictions[0]["read"] == ["Debt", "Revenues", "Revenues", None]
    assert [row["correct"] for row in predictions] == [False, True, False]
    assert [row["usable"] for row in predictions] == [False, True, False]


@pytest.mark.parametrize(
    ("text", "true", "correct", "usable"),
    [
        ("15092.44", "15092.44", True, True),
        ("$15,092.440 in all", "15092.44", True, True),
        ("-3", "-3.0", True, True),
        ("It is .5", "0.5", True, True),
        ("15092.4", "15092.44", False, True),
        ("15092.44\n15092.44", "15092.44", True, True),
        ("none", "3", False, False),
        ("2023-12-31", "not a date", False, True),
        ("Not  stated", "not stated", True, False),
    ],
)
def test_numbers(text: str, true: str, correct: bool, usable: bool) -> None:
    result, (row,) = as_files(answers.numbers([example("x ", true)], written(text)))
    assert (row["correct"], row["usable"]) == (correct, usable)
    assert (result["exact_match"], result["unusable"]) == (correct, not usable)


def test_formulas_match_but_for_white_space() -> None:
    rows = [example("x ", "(us-gaap:Revenues - us-gaap:Costs) / 2", number) for number in (1, 2, 3)]
    texts = ("(us-gaap:Revenues-us-gaap:Costs)/2\nso", "us-gaap:Revenues / 2", "")
    result, found = as_files(answers.formulas(rows, written(*texts)))
    assert [row["correct"] for row in found] == [True, False, False]
    assert result == {
        "kind": "generation",
        "rows": 3,
        "exact_match": pytest.approx(1 / 3),
        "unusable": pytest.approx(1 / 3),
    }


def test_words_in_common() -> None:
    # 2 of 3 and of 4 words: precision 2/3, recall 1/2.
    assert word_f1("The net debt", "a debt, net of cash") == pytest.approx(2 * 2 / (3 + 5))
    assert word_f1("debt debt", "Debt!") == pytest.approx(2 / 3)
    assert word_f1("", "") == 1
    rows = [example("x ", "net debt"), example("y ", "cash", 2)]
    result, _ = as_files(answers.texts(rows, written("net debt", "")))
    assert (result["word_f1"], result["exact_match"], result["unusable"]) == (0.5, 0.5, 0.5)
