"""Which rows are shown, and what is left out of their prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.reports.run.pairs import Pair, answered, groups, pairs, sample, template
from trimtab.runs.read import TestSet, read_sets
from trimtab.runs.results import Prediction


def _prediction(row: int, answer: str = "yes", correct: bool = True) -> Prediction:
    return Prediction(row=row, prompt=f"prompt {row}", answer=answer, predicted=answer, correct=correct)


def test_groups_hold_the_rows_that_moved(run: Path) -> None:
    found = {group.title: [pair.shown.row for pair in group.pairs] for group in groups(read_sets(run)[0])}
    assert found == {
        "Wrong before, right now": [1, 3, 6],
        "Right before, wrong now": [4],
        "Wrong before and still wrong": [5],
        "Right before and still right": [2],
    }


def test_only_rows_that_both_sides_have_are_compared() -> None:
    tests = TestSet("t", None, None, [_prediction(1), _prediction(2)], [_prediction(2), _prediction(3)])
    assert [pair.shown.row for pair in pairs(tests)] == [2]


def test_one_side_alone_is_shown_as_it_is() -> None:
    tests = TestSet("t", None, None, [], [_prediction(1), _prediction(2, correct=False)])
    assert [(group.title, len(group.pairs)) for group in groups(tests)] == [("Wrong", 1), ("Right", 1)]


def test_a_sample_has_every_answer_and_is_spread_out() -> None:
    rows = [Pair(None, _prediction(row, "rare" if row == 90 else "often")) for row in range(1, 101)]
    chosen = [pair.shown.row for pair in sample(rows, 4)]
    assert 90 in chosen
    assert len(chosen) == 4
    assert chosen == sorted(chosen)
    assert max(chosen) - min(chosen) > 50


@pytest.mark.parametrize("count", [0, 1, 3, 6, 20])
def test_a_sample_has_no_more_rows_than_there_are(count: int) -> None:
    rows = [Pair(None, _prediction(row, f"answer {row % 2}")) for row in range(1, 7)]
    chosen = sample(rows, count)
    assert len(chosen) == min(count, 6)
    assert len({pair.shown.row for pair in chosen}) == len(chosen)


def test_a_mixed_sample_begins_with_what_was_won_and_hides_no_loss(run: Path) -> None:
    chosen = [pair.shown.row for pair in answered(read_sets(run))[0].mixed(4)]
    assert set(chosen) >= {4, 5}
    assert chosen[0] in (1, 3, 6)
    assert len(chosen) == 4


def test_the_template_is_left_out() -> None:
    prompts = [
        f"System: be brief.\n\nInput: {text}\nAnswer: " for text in ("one two", "three", "four", "five", "six six")
    ]
    found = template(prompts)
    assert [found.own_words(prompt) for prompt in prompts] == ["one two", "three", "four", "five", "six six"]


def test_variants_of_a_template_are_left_out_too() -> None:
    prompts = [f"Sort this {'tweet' if n % 2 else 'headline'}.\nInput: text {n}\nAnswer: " for n in range(20)]
    assert [template(prompts).own_words(prompt) for prompt in prompts] == [f"text {n}" for n in range(20)]


def test_marks_of_a_chat_are_left_out() -> None:
    texts = ["How old is it?", "Who made it.", "Where?", "When", "Why not!"]
    prompts = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in texts]
    assert [template(prompts).own_words(prompt) for prompt in prompts] == texts


def test_questions_keep_the_words_that_they_share() -> None:
    prompts = [f"What is the capital of {place}?" for place in ("Norway", "Peru", "Chad", "Fiji", "Oman")]
    assert [template(prompts).own_words(prompt) for prompt in prompts] == prompts


@pytest.mark.parametrize("prompts", [[], ["one"], ["the same line"] * 10, ["a\nb", "a\nc"]])
def test_few_prompts_or_equal_ones_stay_whole(prompts: list[str]) -> None:
    assert not template(prompts)
    assert [template(prompts).own_words(prompt) for prompt in prompts] == prompts
