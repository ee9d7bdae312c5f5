"""What evaluating takes: by the rows that are validated and tested on, and by what is written to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimtab import tasks
from trimtab.memory.estimate import RunMemory, estimate_run
from trimtab.runs.events import Listener
from trimtab.tasks import RowSizes

WORDS = "the pilot asks for a tug at noon "


def counted(config: Any) -> tuple[RowSizes, RunMemory]:
    job, inputs = tasks.inputs_of(tasks.job_of(config), Listener())
    sizes = tasks.of(job).sizes(job, inputs)
    return sizes, estimate_run(job, sizes)


def evaluating(memory: RunMemory) -> int:
    (moment,) = (one for one in memory.moments if one.moment == "evaluating")
    return moment.activations


@pytest.fixture
def rows_of(tmp_path: Path) -> Callable[..., str]:
    def write(times: int, answer: Any = "calm", **more: Any) -> str:
        path = tmp_path / f"{times}-{answer}.jsonl"
        rows = [{"prompt": f"{WORDS * times}{number}\nAnswer: ", "completion": answer, **more} for number in range(3)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize("said", ["validation", "test"])
def test_rows_longer_than_those_that_are_trained_on(
    make_config: Callable[..., Any], rows_of: Callable[..., str], said: str
) -> None:
    def of(times: int) -> tuple[RowSizes, RunMemory]:
        path = rows_of(times)
        return counted(make_config(data={said: path if said == "validation" else {"long": path}}))

    (short, few), (long, many) = of(1), of(20)
    assert long.length == short.length < long.tested
    assert evaluating(many) > 3 * evaluating(few)
    assert [one.needed for one in few.moments if one.moment == "training"] == [
        one.needed for one in many.moments if one.moment == "training"
    ]


def test_what_is_written_has_keys_and_values_too(make_config: Callable[..., Any], rows_of: Callable[..., str]) -> None:
    found = []
    for new in (40, 160):
        config = make_config(
            form="open",
            data={"test": {"open": rows_of(1, "calm and a long way off")}},
            evaluation={"max_new_tokens": new},
        )
        sizes, memory = counted(config)
        assert sizes.generates
        found.append((sizes.tested, evaluating(memory)))
    (short, few), (long, many) = found
    assert long == short + 120
    assert many > 1.5 * few


def test_texts_that_are_classified(make_config: Callable[..., Any], tmp_path: Path) -> None:
    for name, times in (("short", 1), ("long", 20)):
        rows = [{"text": f"{WORDS * times}{label}", "label": label} for label in "abc"]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = [
        counted(
            make_config(
                task="sequence_classification",
                data={"train": str(tmp_path / "short.jsonl"), "test": {"test": str(tmp_path / f"{name}.jsonl")}},
            )
        )
        for name in ("short", "long")
    ]
    (short, few), (long, many) = found
    assert short.tested == short.length == long.length < long.tested
    assert evaluating(many) > 3 * evaluating(few)
