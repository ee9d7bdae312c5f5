"""Rows drawn from the training rows, and validation rows split off them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from trimtab.data.rows import Example, Source
from trimtab.data.split import draw, split_off, times_an_epoch
from trimtab.errors import DataError


def examples(source: str, *answers: str | None) -> list[Example]:
    return [
        Example(source, number, f"p {number}", ((0, 1),), "p", answer, True) for number, answer in enumerate(answers, 1)
    ]


def test_every_answer_of_every_file_gives_its_share() -> None:
    rows = examples("a", *(["yes"] * 60 + ["no"] * 20)) + examples("b", *(["yes"] * 10 + ["no"] * 30))
    training, validation = split_off(rows, 0.1, 0, ["no", "yes"])
    assert Counter((row.source, row.answer) for row in validation) == {
        ("a", "yes"): 6,
        ("a", "no"): 2,
        ("b", "yes"): 1,
        ("b", "no"): 3,
    }
    assert sorted((row.source, row.number) for row in training + validation) == [(r.source, r.number) for r in rows]


def test_both_parts_keep_their_order() -> None:
    rows = examples("a", *("xyz"[number % 3] for number in range(50)))
    for part in split_off(rows, 0.3, 1, ["x", "y", "z"]):
        assert [row.number for row in part] == sorted(row.number for row in part)


@pytest.mark.parametrize("choices", [None, [str(number) for number in range(10)]])
def test_the_size_is_the_one_asked_for_whatever_the_groups(choices: list[str] | None) -> None:
    # Ten groups of three rows each: a tenth of a group is less than a row.
    rows = examples("a", *(str(number % 10) for number in range(30)))
    assert len(split_off(rows, 0.1, 0, choices)[1]) == 3
    assert len(split_off(rows, 0.5, 0, choices)[1]) == 15


def test_the_seed_decides() -> None:
    rows = examples("a", *[None] * 100)
    first = split_off(rows, 0.2, 0, None)
    assert split_off(rows, 0.2, 0, None) == first
    assert split_off(rows, 0.2, 1, None) != first


@pytest.mark.parametrize(("count", "fraction"), [(3, 0.1), (2, 0.9)])
def test_a_part_without_rows_is_refused(count: int, fraction: float) -> None:
    with pytest.raises(DataError, match=rf"data\.validation: {fraction} of {count} rows leaves . to train on and"):
        split_off(examples("a", *["x"] * count), fraction, 0, None)


def test_fewer_rows_are_mixed_as_all_are() -> None:
    rows = examples("a", *(["yes"] * 60 + ["no"] * 20)) + examples("b", *(["yes"] * 10 + ["no"] * 30))
    drawn = draw(rows, 12, 0, ["no", "yes"])
    assert Counter((row.source, row.answer) for row in drawn) == {
        ("a", "yes"): 6,
        ("a", "no"): 2,
        ("b", "yes"): 1,
        ("b", "no"): 3,
    }
    places = [rows.index(row) for row in drawn]
    assert places == sorted(places)
    assert draw(rows, 12, 0, ["no", "yes"]) == drawn != draw(rows, 12, 1, ["no", "yes"])
    for count in (1, 7, 119):  # exactly so many, whatever the groups
        assert len(draw(rows, count, 0, ["no", "yes"])) == count
    assert draw(rows, 120, 0, None) == draw(rows, 5000, 0, None) == rows


def weighted(source: str, count: int, weight: float) -> list[Example]:
    entry = Source(path=source, weight=weight)
    return [replace(row, entry=entry) for row in examples(source, *(["yes"] * count))]


def test_a_weight_is_how_often_a_row_comes_in_an_epoch() -> None:
    rows = weighted("a", 10, 2) + weighted("b", 40, 0.25) + weighted("c", 20, 1.5) + weighted("d", 5, 1)
    times = times_an_epoch(rows, 0, None)
    assert times[:10] == [2] * 10
    assert Counter(times[10:50]) == {0: 30, 1: 10}
    assert Counter(times[50:70]) == {1: 10, 2: 10}
    assert times[70:] == [1] * 5
    assert times_an_epoch(rows, 0, None) == times != times_an_epoch(rows, 1, None)


def test_a_part_that_a_weight_takes_is_even_over_answers() -> None:
    entry = Source(path="a", weight=0.5)
    rows = [replace(row, entry=entry) for row in examples("a", *(["yes"] * 40 + ["no"] * 8))]
    taken = [row.answer for row, count in zip(rows, times_an_epoch(rows, 3, ["no", "yes"]), strict=True) if count]
    assert Counter(taken) == {"yes": 20, "no": 4}
