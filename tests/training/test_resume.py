"""Runs that are interrupted and go on: the same adapter, the same lines of metrics, and clear refusals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerState

import trimtab
from stopped_runs import StopAt, adapter_of, interrupt, metrics_of, signals_are_heard
from tiny_runs import rows, tiny_model, write_rows
from trimtab.config.read import load_config
from trimtab.config.run import RunConfig
from trimtab.errors import Interrupted, RunError
from trimtab.files import read_json, read_jsonl, write_json, write_jsonl
from trimtab.runs.beginning import opened
from trimtab.runs.checkpoints import numbered
from trimtab.runs.events import Listener
from trimtab.runs.folder import RunFolder
from trimtab.training.callbacks import Idle
from trimtab.training.run import finetune
from trimtab.training.work import Work

__all__ = ["signals_are_heard"]
pytestmark = pytest.mark.usefixtures("bare_runs")


def checkpoints_of(config: RunConfig) -> list[int]:
    return [step for step, _ in numbered(RunFolder(config.output).checkpoints)]


DROPOUT = [{"match": "all-linear", "method": "dora", "rank": 4, "alpha": 8, "dropout": 0.2}]


@pytest.mark.parametrize(
    "train",
    [
        {},
        pytest.param({"group_by_length": False, "gradient_accumulation": 2, "batch_size": 2}, marks=pytest.mark.full),
        pytest.param({"average": 0.5, "save_every": 4}, marks=pytest.mark.full),
    ],
    ids=["plain", "accumulated", "averaged"],
)
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(make_config: Callable[..., Any], train: Any) -> None:
    # Interrupted in the middle of an epoch, at the end of one (where a validation is due), and right before the end.
    settings = {"count": 30, "plan": DROPOUT, "data": {"validation": 0.2}, "train": {"epochs": 3, **train}}
    whole, parts = make_config("whole", **settings), make_config("parts", **settings)
    finetune(whole)
    interrupt(parts, step=4)
    assert checkpoints_of(parts) == [4]
    interrupt(parts, resume=True, step=12)
    interrupt(parts, resume=True, step=18)
    finetune(parts, resume=True)

    # Bit for bit: one core or several, the same kernels see the same numbers in the same order.
    wanted, found = adapter_of(whole), adapter_of(parts)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert metrics_of(parts) == metrics_of(whole)
    one, other = read_json(whole.output / "summary.json"), read_json(parts.output / "summary.json")
    for key in ("status", "steps", "epochs", "best_step", "train_rows", "trainable_parameters"):
        assert one[key] == other[key]
    seconds = [row["seconds"] for row in read_jsonl(parts.output / "metrics.jsonl")]
    assert seconds == sorted(seconds)


def test_a_run_that_was_interrupted_at_its_last_step_is_not_trained_further(make_config: Callable[..., Any]) -> None:
    # In the middle of an epoch, where there would be more rows.
    whole, parts = (make_config(name, train={"epochs": 2, "max_steps": 4}) for name in ("whole", "parts"))
    finetune(whole)
    interrupt(parts, step=4)
    finetune(parts, resume=True)
    assert metrics_of(parts) == metrics_of(whole)
    wanted, found = adapter_of(whole), adapter_of(parts)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert read_json(parts.output / "summary.json")["steps"] == 4


@pytest.mark.parametrize("how", ["interrupted", "without its adapter"])
def test_a_run_that_stopped_early_is_not_trained_further(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    found = iter([(0.5, 0.8), (0.9, 0.7), (0.1, 0.9)])
    monkeypatch.setattr(Work, "validation", lambda *_: dict(zip(("loss", "accuracy"), next(found), strict=True)))
    config = make_config(count=30, data={"validation": 0.2}, train={"epochs": 5, "early_stopping": 1})
    if how == "interrupted":
        interrupt(config, step=12)
    else:
        finetune(config)
        for file in (config.output / "adapter").iterdir():
            file.unlink()
        write_json(config.output / "summary.json", {**read_json(config.output / "summary.json"), "trained": False})
    finetune(config, resume=True)
    summary = read_json(config.output / "summary.json")
    assert (summary["steps"], summary["best_step"]) == (12, 6)


@pytest.mark.parametrize("step", [7, 10, 11])
def test_a_line_after_an_interruption_is_the_mean_since_the_line_before(
    make_config: Callable[..., Any], step: int
) -> None:
    whole, parts = (make_config(name, train={"epochs": 3, "log_every": 5}) for name in ("whole", "parts"))
    finetune(whole)
    interrupt(parts, step=step)
    finetune(parts, resume=True)
    assert metrics_of(parts) == metrics_of(whole)


def test_steps_that_float16_leaves_out_do_not_damage_a_checkpoint(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # So large a scale lets the first gradients overflow, as on a GPU.
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**22))
    whole, parts = (make_config(name, train={"epochs": 2, "precision": "float16"}) for name in ("whole", "parts"))
    finetune(whole)
    norms = [line["grad_norm"] for line in metrics_of(whole)]
    assert norms[:3] == [None] * 3
    assert norms[-1] is not None
    interrupt(parts, step=3)
    interrupt(parts, resume=True, step=9)
    finetune(parts, resume=True)
    assert not [note for note in read_json(parts.output / "summary.json")["notes"] if "damaged" in note]
    assert metrics_of(parts) == metrics_of(whole)


def test_modules_that_were_reached_before_a_run_was_interrupted_are_not_idle() -> None:
    model = tiny_model()
    trimtab.attach(model, trimtab.Rule(match=["*.q_proj", "*.v_proj"], method="lora", rank=2))
    trained = trimtab.trainable_parameters(model)
    optimizer = torch.optim.AdamW(trained.values())
    for name, parameter in trained.items():
        parameter.grad = torch.zeros_like(parameter) if "q_proj" in name else None
    optimizer.step()
    optimizer.zero_grad()
    idle = Idle(model)
    assert idle.names == []
    state: Any = TrainerState(global_step=3)
    idle.on_train_begin(None, state, None, optimizer=optimizer)  # type: ignore[arg-type]
    assert [name.rpartition(".")[2] for name in idle.names] == ["v_proj"] * 2


def test_how_often_a_resumed_run_writes_may_change(make_config: Callable[..., Any]) -> None:
    config = make_config(train={"epochs": 2, "log_every": 6, "save_every": 6, "keep_checkpoints": 9})
    interrupt(config, step=7)
    said = ["train.log_every=2", "train.save_every=4"]
    finetune(load_config(RunFolder(config.output).config, said), resume=True)
    assert [line["step"] for line in metrics_of(config)] == [1, 6, 8, 10, 12]
    assert checkpoints_of(config) == [6, 7, 8, 12]


def test_a_second_signal_is_obeyed_at_once(make_config: Callable[..., Any]) -> None:
    config = make_config(train={"epochs": 2, "save_every": 2})
    interrupt(config, step=5, times=2)
    assert checkpoints_of(config) == [2, 4]  # step 5 was not saved
    finetune(config, resume=True)
    assert [row["step"] for row in metrics_of(config)] == list(range(1, 13))


def test_interrupted_before_and_after_training(make_config: Callable[..., Any], tmp_path: Path) -> None:
    test = write_rows(tmp_path / "test.jsonl", rows(6))
    config = make_config(data={"test": str(test)})
    with pytest.raises(Interrupted, match="nothing was begun"):
        finetune(config, listener=StopAt(stage="Loading"))
    assert not config.output.exists()
    interrupt(config, stage="Evaluating test before")
    assert checkpoints_of(config) == []
    interrupt(config, resume=True, stage="Evaluating test after")
    before = (config.output / "evaluation" / "test.before.json").read_text()
    trained, lines = adapter_of(config), metrics_of(config)

    class Quiet(Listener):
        def training_began(self, step: int, steps: int) -> None:
            pytest.fail("training was over")

    finetune(config, resume=True, listener=Quiet())
    assert (config.output / "evaluation" / "test.before.json").read_text() == before
    assert (config.output / "evaluation" / "test.after.json").is_file()
    assert metrics_of(config) == lines
    assert all(torch.equal(value, trained[name]) for name, value in adapter_of(config).items())
    assert read_json(config.output / "summary.json")["steps"] == 6


@pytest.mark.parametrize("lost", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_finished_run_that_lost_its_adapter_makes_it_again(make_config: Callable[..., Any], lost: str) -> None:
    config = make_config(train={"save_every": 2})
    finetune(config)
    trained = adapter_of(config)
    (config.output / "adapter" / lost).unlink()
    finetune(config, resume=True)
    assert all(torch.equal(value, trained[name]) for name, value in adapter_of(config).items())
    with pytest.raises(RunError, match="nothing to resume"):
        finetune(config, resume=True)


def test_ties_and_patience_are_remembered(make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([(0.5, 0.8), (0.9, 0.8), (0.8, 0.7), (0.1, 0.9)])
    monkeypatch.setattr(Work, "validation", lambda *_: dict(zip(("loss", "accuracy"), next(found), strict=True)))
    config = make_config(count=30, data={"validation": 0.2}, train={"epochs": 5, "early_stopping": 2})
    interrupt(config, step=8)  # after the first validation
    interrupt(config, resume=True, step=14)  # a tie with a higher loss: not the best, and one without improvement
    finetune(config, resume=True)
    summary = read_json(config.output / "summary.json")
    assert (summary["steps"], summary["best_step"]) == (18, 6)


def test_a_run_that_was_killed_while_it_wrote(make_config: Callable[..., Any]) -> None:
    config = make_config(train={"epochs": 2})
    interrupt(config, step=3)
    folder = RunFolder(config.output)
    with folder.metrics.open("a") as file:
        file.write('{"kind": "train", "st')
    (folder.checkpoints / "checkpoint-9").mkdir()  # begun, and without its state
    finetune(config, resume=True)
    assert [row["step"] for row in metrics_of(config)] == list(range(1, 13))


def test_events_of_steps_that_are_made_again_are_shown_once(make_config: Callable[..., Any]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(train={"epochs": 2, "save_every": 4, "tensorboard": True})
    interrupt(config, step=7, times=2)  # at once: steps 5 to 7 are lost
    finetune(config, resume=True)
    events = EventAccumulator(str(config.output / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 13))


def test_the_time_of_a_run_that_was_killed_counts(make_config: Callable[..., Any]) -> None:
    config = make_config(train={"epochs": 2})
    interrupt(config, step=3)
    summary, metrics = config.output / "summary.json", config.output / "metrics.jsonl"
    # Killed, it cannot write down how long it took; its last line says it.
    write_json(summary, {**read_json(summary), "training_seconds": 0.0, "total_seconds": 0.0})
    lines = list(read_jsonl(metrics))
    write_jsonl(metrics, [*lines[:-1], {**lines[-1], "seconds": 1000.0}])
    finetune(config, resume=True)
    seconds = [row["seconds"] for row in read_jsonl(metrics)]
    assert seconds == sorted(seconds)
    assert 1000 < read_json(summary)["training_seconds"] <= read_json(summary)["total_seconds"]


def test_a_run_that_trains_nothing_and_was_killed_at_its_end(make_config: Callable[..., Any], tmp_path: Path) -> None:
    test = write_rows(tmp_path / "test.jsonl", rows(6))
    config = make_config(data={"test": str(test)}, train={"epochs": 0})
    folder = finetune(config)
    whole = read_json(folder.summary)
    assert whole["total_parameters"] > whole["trainable_parameters"] == 0
    # What is written when it begins, and no more.
    begun = {key: value for key, value in whole.items() if not key.endswith("_parameters")}
    write_json(folder.summary, {**begun, "status": "interrupted"})
    folder.report.unlink()
    finetune(config, resume=True)
    again = read_json(folder.summary)
    assert {key: again[key] for key in ("status", "total_parameters", "trainable_parameters")} == {
        **{"status": "finished", "trainable_parameters": 0},
        "total_parameters": whole["total_parameters"],
    }
    assert folder.report.is_file()


def test_resuming_is_refused(make_config: Callable[..., Any]) -> None:
    config = make_config()
    with pytest.raises(RunError, match="there is no run to resume; start it without --resume"):
        finetune(config, resume=True)
    interrupt(config, step=2)
    changed = make_config(train={"learning_rate": 1e-3, "seed": 4})
    words = r"train\.learning_rate was 0\.01, now 0\.001; train\.seed was 0, now 4\. Resume it with its own"
    with pytest.raises(RunError, match=words):
        finetune(changed, resume=True)
    with pytest.raises(RunError, match=r"holds a run already \(interrupted\).*--resume; or to replace it, add --ov"):
        finetune(config)
    finetune(config, resume=True)
    with pytest.raises(RunError, match="this run is finished; there is nothing to resume"):
        finetune(config, resume=True)
    with pytest.raises(RunError, match=r"holds a run already \(finished\)\. To keep both, choose another output; to r"):
        finetune(config)


def test_settings_edited_in_its_folder_do_not_spoil_a_run(make_config: Callable[..., Any]) -> None:
    """Its checkpoints would not fit, be put aside as damaged, and the run begin again."""
    config = make_config(train={"epochs": 2})
    interrupt(config, step=3)
    file = config.output / "config.yaml"
    text = file.read_text()
    for before, now in (("learning_rate: 0.01", "learning_rate: 0.02"), ("rank: 4", "rank: 2")):
        assert before in text
        file.write_text(text.replace(before, now))
        with pytest.raises(RunError, match=r"config\.yaml: changed since the run began: .* Put it back and resume"):
            finetune(load_config(file), resume=True)
    assert checkpoints_of(config) == [3]
    file.write_text(text)
    finetune(load_config(file), resume=True)
    assert read_json(config.output / "summary.json")["status"] == "finished"


def test_a_run_goes_on_in_a_folder_that_was_moved(make_config: Callable[..., Any]) -> None:
    config = make_config(train={"epochs": 2})
    interrupt(config, step=3)
    moved = config.model_copy(update={"output": config.output.with_name("moved")})
    config.output.rename(moved.output)
    finetune(moved, resume=True)
    assert [row["step"] for row in metrics_of(moved)] == list(range(1, 13))


def test_what_is_no_run_is_never_replaced(make_config: Callable[..., Any], tmp_path: Path) -> None:
    config = make_config()
    config.output.mkdir()
    (config.output / "config.yaml").write_text("mine: true\n")
    with pytest.raises(RunError, match="not empty and holds no run"):
        finetune(config, overwrite=True)
    assert (config.output / "config.yaml").read_text() == "mine: true\n"
    (config.output / "config.yaml").unlink()

    finetune(config)
    mine = [config.output / place for place in (
        "thesis.txt", "README.md", "adapter/README.md", "adapter/old/thesis.txt", "evaluation/thesis.txt",
        "checkpoints/checkpoint-3-good/adapter_config.json", "trimtab.json",
    )]  # fmt: skip
    for file in mine:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"mine: {file}")
    (config.output / "checkpoints" / "checkpoint-900").mkdir()
    (config.output / "adapter" / "tokenizer.json").write_text("of an earlier run")
    finetune(config, overwrite=True)
    assert all(file.read_text() == f"mine: {file}" for file in mine)
    assert not (config.output / "checkpoints" / "checkpoint-900").exists()
    assert not (config.output / "adapter" / "tokenizer.json").exists()
    assert (config.output / "adapter_config.json").is_symlink()


def test_an_output_that_cannot_be(make_config: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(RunError, match="a file is in the way"):
        finetune(make_config(output=str(file)))
    with pytest.raises(RunError, match=r"the run folder cannot be written \(.+\); choose another output"):
        finetune(make_config(output="/proc/trimtab"))
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "summary.json").write_text("{")
    beginning = opened(make_config(output=str(folder)), resume=False, overwrite=False)
    with pytest.raises(RunError, match=r"summary\.json: a damaged file"), beginning:
        pass
