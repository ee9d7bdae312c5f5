"""Rows that are others when a run is resumed: refused, or evaluated anew; rows that have only moved are no matter."""

from __future__ import annotations

import datetime
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import CHATML, Kept, rows, write_rows
from trimtab.config.read import load_config
from trimtab.config.run import RunConfig
from trimtab.errors import Interrupted, RunError
from trimtab.files import read_json
from trimtab.training.run import finetune

pytestmark = pytest.mark.usefixtures("bare_runs")


class StopAt(Kept):
    """Interrupts the run after a step of training."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def step(self, step: int, steps: int) -> None:
        if step == self.at:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def _signals_are_heard(monkeypatch: pytest.MonkeyPatch) -> Any:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def interrupted(make_yaml: Callable[..., Path], tmp_path: Path) -> tuple[Path, RunConfig]:
    """The YAML and the configuration of a run of 24 rows that stopped in its second epoch."""
    test = write_rows(tmp_path / "test.jsonl", rows(6))
    file = make_yaml(data={"validation": 0.25, "test": str(test)}, train={"epochs": 3, "save_every": 2})
    config = load_config(file)
    with pytest.raises(Interrupted):
        finetune(config, listener=StopAt(6))
    return file, config


def test_changed_rows_are_refused_and_the_same_ones_go_on(interrupted: tuple[Path, RunConfig]) -> None:
    _, config = interrupted
    place = Path(config.data.train[0].path)
    as_then = "24 rows as then, but others, or in another order"
    for found, said in [
        (rows(20), "the training rows are not those that the run began with (24 rows were read then, 20 now)"),
        ([*rows(24)[1:], rows(1)[0]], as_then),
        ([*rows(23), rows(30)[29]], as_then),
    ]:
        write_rows(place, found)
        before = contents(config.output)
        with pytest.raises(RunError) as caught:
            finetune(config, resume=True)
        assert said in str(caught.value)
        assert f"Put the rows back ({place})" in str(caught.value)
        assert "config.yaml output=NEW" in str(caught.value)
        assert contents(config.output) == before
    write_rows(place, rows(24))
    finetune(config, resume=True)
    assert read_json(config.output / "summary.json")["status"] == "finished"


def contents(folder: Path) -> dict[Path, bytes]:
    """What every file of a run holds, its lock aside."""
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}


def test_rows_that_moved_and_other_test_rows(interrupted: tuple[Path, RunConfig], tmp_path: Path) -> None:
    file, config = interrupted
    Path(config.data.train[0].path).rename(tmp_path / "moved.jsonl")
    was = read_json(config.output / "evaluation" / "test.before.json")
    write_rows(Path(config.data.test["test"][0].path), rows(9))
    told = Kept()
    finetune(load_config(file, [f"data.train={tmp_path / 'moved.jsonl'}"]), resume=True, listener=told)
    now = read_json(config.output / "evaluation" / "test.before.json")
    assert (was["rows"], now["rows"]) == (6, 9)
    assert read_json(config.output / "evaluation" / "test.after.json")["rows"] == 9
    summary = read_json(config.output / "summary.json")
    assert any("the test rows of 'test' are others" in note for note in summary["notes"])
    assert summary["sources"][0]["path"] == str(tmp_path / "moved.jsonl")


def test_a_template_that_writes_the_date_goes_on_on_another_day(
    make_yaml: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    dated = "{{ 'Today is ' + strftime_now('%d %b %Y') + '\n' }}" + CHATML
    made = make_yaml(form="chat", model={"chat_template": dated}, train={"epochs": 3, "save_every": 2})
    config = load_config(made)
    with pytest.raises(Interrupted):
        finetune(config, listener=StopAt(6))

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return datetime.datetime.now(tz) + datetime.timedelta(days=1)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    assert finetune(config, resume=True).read_summary().status == "finished"
