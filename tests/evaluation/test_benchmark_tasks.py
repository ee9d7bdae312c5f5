"""Tasks by name: which labels, which rows, which way of answering, and what the result says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import f1_score

from evaluation_cases import example, llama, markov_chain
from trimtab.data.forms import read_examples
from trimtab.data.rows import Example
from trimtab.errors import ConfigError, DataError
from trimtab.evaluation.benchmark_tasks import TASKS, evaluate_task, find_task
from trimtab.tasks import Head

Make = Callable[..., list[Example]]
FINANCE = Path(__file__).resolve().parents[3] / "shared" / "data" / "finance"
SENTIMENT = ("negative", "neutral", "positive")


def test_the_tasks_of_finlora() -> None:
    names = "fpb fiqa tfns nwgi headline ner finer fnxl xbrl_tags xbrl_value xbrl_formula xbrl_formula_calc formula"
    names += " xbrl_term financebench cfa_level1 cfa_level2 cfa_level3 cpa_reg"
    assert list(TASKS) == [f"finlora/{name}" for name in names.split()]
    assert all(task.file.endswith(".jsonl") for task in TASKS.values())
    assert len({task.file for task in TASKS.values()}) == len(TASKS)
    assert find_task("finlora/fpb").choices == SENTIMENT


@pytest.mark.parametrize(("name", "near"), [("finlora/fbp", "finlora/fpb"), ("headlines", "finlora/headline")])
def test_an_unknown_task(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"no task '{name}'\. Did you mean '{near}'\?.*finlora/headline"):
        find_task(name)


def test_labels_are_scored_or_written(tokenizer: Any, questions: Make) -> None:
    task, model, rows = find_task("finlora/fpb"), llama(), questions(SENTIMENT, 12)
    scored = evaluate_task(task, Head(model), tokenizer, rows, limit=9)
    assert (scored.name, scored.result["task"], scored.result["rows"]) == ("fpb", "finlora/fpb", 9)
    assert scored.result["answered_by"] == "likelihood"
    assert scored.result["choices"] == list(SENTIMENT)
    assert "unusable" not in scored.result
    assert scored.result["seconds"] > 0


def test_written_labels_that_are_right_wrong_or_none(tokenizer: Any, questions: Make) -> None:
    task, choices = find_task("finlora/fpb"), ["good", "bad", "plain"]
    rows, end = questions(choices, 12), tokenizer.eos_token_id
    (good,), (colon,), (dot,) = (tokenizer(text)["input_ids"] for text in (" good", ":", "."))
    always = markov_chain(tokenizer, {colon: good, good: end})
    found = evaluate_task(task, Head(always), tokenizer, rows, generate=True, choices=choices).result
    assert found["answered_by"] == "generation"
    assert (found["accuracy"], found["unusable"]) == (pytest.approx(4 / 12), 0)
    assert found["macro_f1"] == pytest.approx(0.5 / 3)  # of "good", with precision 1/3 and recall 1
    never = markov_chain(tokenizer, {colon: dot, dot: end})
    found = evaluate_task(task, Head(never), tokenizer, rows, generate=True, choices=choices).result
    assert (found["unusable"], found["accuracy"], found["macro_f1"], found["weighted_f1"]) == (1, 0, 0, 0)


def test_labels_from_the_rows_are_found_before_the_limit(tokenizer: Any, questions: Make) -> None:
    levels = ["strong negative", "mildly negative", "mildly positive"]
    found = evaluate_task(find_task("finlora/nwgi"), Head(llama()), tokenizer, questions(levels, 6), limit=2)
    assert found.result["rows"] == 2
    assert found.result["choices"] == sorted(levels)


def test_an_answer_that_is_no_label(tokenizer: Any, questions: Make) -> None:
    rows = questions(["negative", "good"], 4)
    for generate in (False, True):
        with pytest.raises(DataError, match=r"row 2: has the answer 'good', which is not among the choices"):
            evaluate_task(find_task("finlora/fpb"), Head(llama()), tokenizer, rows, generate=generate)
    found = evaluate_task(find_task("finlora/fpb"), Head(llama()), tokenizer, rows, choices=["negative", "good"])
    assert found.result["choices"] == ["negative", "good"]


def test_a_hundred_tags(tokenizer: Any) -> None:
    tags = [f"Tag{letter}{number}" for letter in "abcdefghijk" for number in range(10)]
    rows = [example(f"tag {number}? Answer: ", tag, number) for number, tag in enumerate(tags, 1)]
    found = evaluate_task(find_task("finlora/xbrl_tags"), Head(llama()), tokenizer, rows, limit=3, batch_size=64)
    assert found.result["choices"] == sorted(tags)
    for row in found.predictions:  # the best of them are kept
        assert len(row["scores"]) == 20
        assert list(row["scores"].values()) == sorted(row["scores"].values(), reverse=True)
        assert row["predicted"] == next(iter(row["scores"]))


def test_lists_of_tags_are_written(tokenizer: Any) -> None:
    rows = [example("tags: ", "Debt,Goodwill", 1), example("tags: ", "Goodwill,Debt", 2)]
    found = evaluate_task(find_task("finlora/finer"), Head(llama()), tokenizer, rows, max_new_tokens=4)
    assert found.result["choices"] == ["Debt", "Goodwill"]
    assert (found.result["answers"], found.result["rows"], found.result["answered_by"]) == (4, 2, "generation")


@pytest.mark.parametrize("name", ["finlora/formula", "finlora/xbrl_formula", "finlora/xbrl_term"])
def test_open_answers(name: str, tokenizer: Any) -> None:
    rows = [example("Use formula X. Answer: ", "12.5"), example("Use formula Y. Answer: ", "3", 2)]
    found = evaluate_task(find_task(name), Head(llama()), tokenizer, rows, max_new_tokens=3)
    assert found.result["kind"] == "generation"
    assert {"exact_match", "unusable", "seconds", "task"} <= set(found.result)
    assert ("word_f1" in found.result) == (name == "finlora/xbrl_term")


def test_questions_are_told_apart(tokenizer: Any) -> None:
    """The headline set asks several questions; each is a set of its own, and their F1 are averaged."""
    asked = ["Does the news headline talk about price?", "Does the news headline compare gold with another asset?"]
    rows = [
        example(
            f"Instruction: {asked[n % 2]} Please choose an answer from {{Yes/No}}.\nInput: gold rose {n}\nAnswer: ",
            ("Yes", "No", "No")[n % 3],
            n + 1,
        )
        for n in range(10)
    ]
    for generate in (False, True):
        settings: dict[str, Any] = {"generate": generate, "max_new_tokens": 2}
        found = evaluate_task(find_task("finlora/headline"), Head(llama()), tokenizer, rows, **settings)
        assert [entry["question"] for entry in found.result["questions"]] == asked
        for place, entry in enumerate(found.result["questions"]):
            mine = found.predictions[place::2]
            said = [row.get("read", row["predicted"]) or "" for row in mine]
            truth = [row["answer"] for row in mine]
            assert entry["rows"] == 5
            assert entry["accuracy"] == pytest.approx(sum(map(str.__eq__, said, truth)) / 5)
            labels = ["No", "Yes"]
            expected = f1_score(truth, said, labels=labels, average="weighted", zero_division=0.0)
            assert entry["weighted_f1"] == pytest.approx(expected)
        mean = sum(entry["weighted_f1"] for entry in found.result["questions"]) / 2
        assert found.result["mean_weighted_f1"] == pytest.approx(mean)


def test_permuted_labels_are_read_as_they_were_meant(tokenizer: Any, questions: Make) -> None:
    """Two of three tweets are neutral; where most are positive, the file has 1 for neutral and 2 for positive."""
    task, model = find_task("finlora/tfns"), llama()
    right = questions(["neutral", "negative", "neutral", "positive", "neutral"], 100)
    wrong = questions(["positive", "negative", "positive", "neutral", "positive"], 100)
    one, other = (evaluate_task(task, Head(model), tokenizer, rows, limit=10) for rows in (right, wrong))
    assert "relabelled" not in one.result
    assert other.result["relabelled"] == {"neutral": "positive", "positive": "neutral"}
    assert other.predictions == one.predictions
    assert other.result["perplexity"] == one.result["perplexity"]
    few = evaluate_task(task, Head(model), tokenizer, wrong[:20])
    assert "relabelled" not in few.result, "of so few rows the commonest label tells nothing"
    fpb = evaluate_task(find_task("finlora/fpb"), Head(model), tokenizer, wrong, limit=3)
    assert "relabelled" not in fpb.result


@pytest.mark.skipif(not FINANCE.is_dir(), reason="../shared/data, the finance rows, is not here")
@pytest.mark.parametrize(("name", "rows", "majority"), [("fpb", 1212, "neutral"), ("fiqa", 235, "positive")])
def test_the_real_rows_fit_their_tasks(name: str, rows: int, majority: str, tokenizer: Any) -> None:
    task = find_task(f"finlora/{name}")
    found = read_examples(str(FINANCE / task.file), tokenizer, root=Path.cwd())
    assert len(found) == rows
    assert {row.answer for row in found} == set(task.choices)
    assert Counter(row.answer for row in found).most_common(1)[0][0] == majority
    model = llama(max_position_embeddings=1024)
    result = evaluate_task(task, Head(model), tokenizer, found, limit=3).result
    assert (result["rows"], result["choices"]) == (3, list(SENTIMENT))
