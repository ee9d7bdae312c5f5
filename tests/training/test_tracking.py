"""Trackers of ``report_to`` are told of a run, and can do nothing to it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from tiny_runs import Kept
from trimtab.config.values import TRACKERS
from trimtab.errors import ConfigError, RunError
from trimtab.files import read_json
from trimtab.training.run import finetune

pytestmark = pytest.mark.usefixtures("bare_runs")


class Heard(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.remarks: list[str] = []

    def remark(self, text: str) -> None:
        self.remarks.append(text)


class Tracker(TrainerCallback):
    """Stands for one that is installed; it fails at the events of ``failing``."""

    failing: tuple[str, ...] = ()
    told: list[tuple[str, Any, dict[str, Any]]]

    def __init__(self) -> None:
        type(self).told = []

    def _hear(self, event: str, args: Any, **given: Any) -> None:
        self.told.append((event, args, given))
        if event in self.failing:
            raise ConnectionError("no\nnetwork")

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._hear("begin", args, **given)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
        self._hear("log", args, **logs)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._hear("end", args)


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> type[Tracker]:
    kind = type("Tracking", (Tracker,), {})
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", kind)
    return kind


def test_the_names_are_those_of_transformers() -> None:
    assert set(TRACKERS) == set(integration_utils.INTEGRATION_TO_CALLBACK)


def test_a_tracker_is_told_of_the_run(tracker: type[Tracker], make_config: Callable[..., Any]) -> None:
    config = make_config("tracked", report_to="wandb", data={"validation": 0.3})
    finetune(config)
    (_, args, _), *rest = tracker.told
    assert args.run_name == "tracked"
    said = args.to_dict()
    assert said["trimtab.data.max_length"] == "auto"
    assert said["trimtab.train.learning_rate"] == 1e-2
    assert said["trimtab.model.name"].endswith("tiny")
    logs = [given for event, _, given in rest if event == "log"]
    assert any("loss" in line for line in logs)
    assert any("eval_loss" in line for line in logs)
    assert rest[-1][0] == "end"


def test_one_that_cannot_begin_is_an_error_before_training(
    tracker: type[Tracker], make_config: Callable[..., Any]
) -> None:
    tracker.failing = ("begin",)
    config = make_config(report_to=["wandb"])
    with pytest.raises(RunError, match=r"report_to: wandb cannot begin \(ConnectionError: no network\)"):
        finetune(config)
    assert not (config.output / "metrics.jsonl").read_text()


def test_one_that_fails_later_changes_nothing(tracker: type[Tracker], make_config: Callable[..., Any]) -> None:
    tracker.failing = ("log",)
    listener = Heard()
    config = make_config(report_to=["wandb"])
    finetune(config, listener=listener)
    assert read_json(config.output / "summary.json")["status"] == "finished"
    (said,) = [remark for remark in listener.remarks if "report_to" in remark]
    assert "wandb has failed and is told nothing more; training goes on" in said
    assert [event for event, _, _ in tracker.told] == ["begin", "log"]


def test_what_is_not_installed_is_named(make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    config = make_config(report_to="wandb")
    with pytest.raises(RunError, match=r"report_to: wandb is not installed .*take it out of report_to"):
        finetune(config)
    assert not config.output.exists()


@pytest.mark.parametrize(
    ("said", "wrong"),
    [("wnadb", r"Did you mean 'wandb'\?"), ([1], "the name of a tracker, a list of them, or none"), ("all", "one of")],
)
def test_names_that_there_are_not(make_config: Callable[..., Any], said: Any, wrong: str) -> None:
    with pytest.raises(ConfigError, match=rf"report_to: .*{wrong}"):
        make_config(report_to=said)


def test_nothing_is_imported_where_nothing_is_asked_for(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("wandb", "mlflow", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    assert make_config(report_to="none").report_to == make_config(report_to=None).report_to == ()
    config = make_config(train={"max_steps": 1})
    finetune(config)
    assert not (config.output / "tensorboard").exists()


def test_tensorboard(make_config: Callable[..., Any]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(report_to=["tensorboard"], data={"validation": 0.3}, train={"max_steps": 3})
    finetune(config)
    events = EventAccumulator(str(config.output / "tensorboard")).Reload()
    assert {"train/loss", "train/learning_rate", "eval/loss"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("train/loss")) == 3
    assert not (config.output / "checkpoints" / "runs").exists()
