"""A whole run on a device: what it writes is what it writes on the processor, its model lies there from the first pass
on, and a training step waits for nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from accelerator import NAME, Seen, accelerator
from run_fixtures import bare_runs, make_yaml, model_folder, own_cache  # noqa: F401
from tiny_runs import Kept, rows, write_rows
from trimtab.config.read import load_config
from trimtab.errors import ModelError
from trimtab.memory.described import describe_run
from trimtab.memory.estimate import check_run
from trimtab.reports.run.run_tables import memory_lines
from trimtab.runs.load import load_run
from trimtab.tasks import RowSizes, job_of
from trimtab.training.run import finetune
from trimtab.training.work import Work


@contextmanager
def steps_watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Seen]]:
    """What happens in each forward and backward pass of training."""
    found: list[Seen] = []
    step = Trainer.training_step

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        with accelerator() as seen:
            loss = step(self, *args, **kwargs)
        found.append(seen)
        return loss

    monkeypatch.setattr(Trainer, "training_step", watched)
    yield found


@pytest.mark.parametrize(
    ("form", "quantisation", "method"),
    [("completion", "none", "dora"), pytest.param("open", "int8", "lora", marks=pytest.mark.full)],
)
def test_a_run_on_a_device_is_the_run_on_the_processor(
    form: str,
    quantisation: str,
    method: str,
    make_yaml: Callable[..., Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bare_runs: None,  # noqa: F811
) -> None:
    test = str(write_rows(tmp_path / "test.jsonl", rows(6, form)))
    sections = {
        "quantisation": quantisation,
        "plan": [{"match": "all-linear", "method": method, "rank": 4}],
        "data": {"validation": 0.2, "test": {"test": test}},
        "train": {"average": 0.3, "save_every": 2, "log_every": 2, "prompt_loss_weight": 0.1 * (method == "dora")},
        "evaluation": {"before": method == "dora", "max_new_tokens": 4},
    }
    here, there = Kept(), Kept()
    plain = finetune(load_config(make_yaml("here", form=form, **sections)), listener=here)
    with accelerator() as seen, steps_watched(monkeypatch) as steps:
        models: list[Any] = []
        made = Work.__init__

        def noted(self: Any, *args: Any, **kwargs: Any) -> None:
            made(self, *args, **kwargs)
            models.append(self.model)

        monkeypatch.setattr(Work, "__init__", noted)
        folder = finetune(load_config(make_yaml("there", form=form, **sections)), listener=there)
        tensors = [*models[0].parameters(), *models[0].buffers()]
        assert {tensor.device.type for tensor in tensors} == {NAME}

        assert len(steps) == 5
        for step in steps:
            assert not step.waits, "a training step waits for the device"
            assert not step.uploads, "a training step copies from the processor"
            assert not step.left, "a training step makes tensors on the processor"
        # A line of the log takes its two numbers, the loss and the gradient's norm, at once.
        logged = sum(count for place, count in seen.waits.items() if " training/metrics_log.py" in place)
        assert logged == len(there.column("loss"))

        loaded = load_run(folder.path)
        assert {tensor.device.type for tensor in loaded.model.parameters()} == {NAME}

    for name in ("loss", "grad_norm"):
        assert there.column(name) == pytest.approx(here.column(name), rel=1e-4)
    assert there.column("loss", "validation") == pytest.approx(here.column("loss", "validation"), rel=1e-4)
    summary, other = folder.read_summary(), plain.read_summary()
    assert summary is not None
    assert other is not None
    assert summary.machine.device == "Fake GPU"
    assert summary.peak_device_memory_gib == 2.0
    assert "GiB on Fake GPU" in summary.peaks
    assert other.machine.device is None
    assert "GiB on" not in other.peaks
    assert (folder.path / "predictions").is_dir()
    before = [path.read_text() for path in sorted((plain.path / "predictions").glob("*.jsonl"))]
    after = [path.read_text() for path in sorted((folder.path / "predictions").glob("*.jsonl"))]
    assert len(before) == len(after) > 0


def test_a_run_goes_on_elsewhere(
    make_yaml: Callable[..., Path],  # noqa: F811
    bare_runs: None,  # noqa: F811
) -> None:
    said = {"train": {"save_every": 2, "max_steps": 2}}
    with accelerator():
        finetune(load_config(make_yaml("run", **said)))
    longer = load_config(make_yaml("run", **{**said, "device": "cpu", "train": {"save_every": 2, "max_steps": 4}}))
    summary = finetune(longer, resume=True).read_summary()
    assert summary is not None
    assert summary.steps == 4


def test_a_run_says_where_it_computes(
    make_yaml: Callable[..., Path],  # noqa: F811
    bare_runs: None,  # noqa: F811
) -> None:
    with accelerator() as seen:
        summary = finetune(load_config(make_yaml("run", device="cpu", train={"max_steps": 1}))).read_summary()
    assert summary is not None
    assert summary.machine.device is None
    assert not seen.count, "the processor was asked for"


@pytest.mark.parametrize("quantisation", [pytest.param("none", marks=pytest.mark.full), "nf4"])
def test_plan_holds_a_run_against_its_device(quantisation: str, make_yaml: Callable[..., Path]) -> None:  # noqa: F811
    job = job_of(load_config(make_yaml("run", quantisation=quantisation)))
    here = describe_run(job)["memory"]
    assert not {"device", "host"} & here.keys()
    with accelerator():
        memory = describe_run(job)["memory"]
        check_run(job, RowSizes(length=64, labels=8))
    assert memory["uncounted"] is None
    assert (memory["device"], memory["device_memory_gib"], memory["free"]) == ("Fake GPU", 8.0, 4.5)
    assert memory["fits"]
    assert set(memory["moments"]) == {"loading", "training"}
    # Tensors alone: the process and the holes between tensors are the machine's.
    assert not {"process", "fragmentation", "files"} & memory["moments"]["training"].keys()
    assert memory["moments"]["training"]["weights"] == here["moments"]["training"]["weights"]
    assert 0 < memory["moments"]["training"]["activations"] <= 1.5 * here["moments"]["training"]["activations"]
    assert "on Fake GPU, 4.50 GiB are free there" in memory_lines(memory)[-1]


def test_a_run_that_is_too_large_for_its_device_is_refused(
    make_yaml: Callable[..., Path],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = job_of(load_config(make_yaml("run")))
    monkeypatch.setattr("trimtab.machine.available_memory", lambda device="cpu": 0)
    for place in ("estimate", "described"):
        monkeypatch.setattr(f"trimtab.memory.{place}.available_memory", lambda device="cpu": 0)
    monkeypatch.setattr("trimtab.memory.estimate.suggest", lambda *_: [])
    with accelerator(), pytest.raises(ModelError, match=r"are free on Fake GPU \(fakegpu"):
        check_run(job, RowSizes(length=64, labels=8))
