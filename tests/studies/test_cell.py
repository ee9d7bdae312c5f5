"""One cell: what it leaves, what it never does twice, and how it fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tiny_runs import Kept, cell_of, rows, write_rows
from trimtab.errors import Interrupted, RunError
from trimtab.files import read_json, read_jsonl, write_json
from trimtab.machine import memory_gib
from trimtab.studies.cell import digest, finished_cell, identity, run_cell
from trimtab.studies.process import run_here
from trimtab.training.run import finetune

pytestmark = pytest.mark.usefixtures("bare_runs")


@pytest.fixture
def test_rows(tmp_path: Path) -> str:
    return str(write_rows(tmp_path / "test.jsonl", rows(9)))


def test_a_cell_gives_what_the_run_gives_and_leaves_one_file(
    make_config: Callable[..., Any], test_rows: str, tmp_path: Path
) -> None:
    settings: Any = {"data": {"test": {"harbour": test_rows}, "validation": 0.25}, "train": {"epochs": 2}}
    config = make_config("cell", **settings)
    listener = Kept()
    # This process holds more than the cell needs, and the cell must not inherit that.
    ballast = bytearray(700 * 2**20)
    ballast[::4096] = b"1" * len(ballast[::4096])
    found = run_cell(config, listener)
    assert 0.1 < found.peak_memory_gib < memory_gib() - 0.3
    del ballast

    run = finetune(make_config("plain", **settings))
    summary = run.read_summary()
    for key in ("trainable_parameters", "total_parameters", "steps", "epochs", "train_rows", "status", "best_step"):
        assert getattr(found, key) == getattr(summary, key)
    for key, stage in (("tests", "after"), ("before", "before")):
        want = read_json(run.evaluation("harbour", stage))
        predictions = read_jsonl(run.path / "predictions" / f"harbour.{stage}.jsonl")
        mine = getattr(found, key)["harbour"].plain()
        assert mine.pop("correct") == "".join(str(int(row["correct"])) for row in predictions)
        for key in ("model", "adapter", "source"):  # places on this machine
            want.pop(key, None)
        assert {**mine, "seconds": 0} == {**want, "seconds": 0}
    assert [row.loss for row in found.validation] == [
        row.loss for row in run.read_metrics() if row.kind == "validation"
    ]
    assert found.kept.step == summary.best_step
    assert 0 < found.training_seconds < found.total_seconds
    assert len(listener.column("loss")) == found.steps  # heard across the processes
    assert [file.name for file in config.output.rglob("*")] == ["cell.json"]
    assert read_json(config.output / "cell.json") == found.plain()


@pytest.mark.usefixtures("here")
def test_what_is_done_is_not_done_again(
    make_config: Callable[..., Any], test_rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(data={"test": test_rows}, train={"max_steps": 1}, evaluation={"before": False})
    found = run_cell(config, keep="adapters")
    assert (config.output / "run" / "adapter").is_dir()
    assert not (config.output / "run" / "checkpoints").exists()
    monkeypatch.setattr("trimtab.studies.cell.run_apart", None)
    assert run_cell(config) == found == finished_cell(config)

    # Another configuration is another cell: another digest, and refused in this folder. So are other rows.
    other = config.model_copy(update={"train": config.train.model_copy(update={"seed": 1})})
    assert digest(other) != digest(config) == digest(config.model_copy(update={"output": Path("/elsewhere")}))
    with pytest.raises(RunError, match="another configuration"):
        run_cell(other)
    write_rows(Path(test_rows), rows(12))
    with pytest.raises(RunError, match="another configuration"):
        run_cell(config)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "Expecting property name"), ("[]", "Input should be"), ("{}", "'identity': Field required")],
)
def test_a_damaged_cell_is_told(make_config: Callable[..., Any], text: str, reason: str) -> None:
    config = make_config()
    config.output.mkdir()
    (config.output / "cell.json").write_text(text)
    with pytest.raises(RunError, match=rf"cell\.json: a damaged file \({reason}.*\); remove it to run this cell again"):
        finished_cell(config)


@pytest.mark.usefixtures("here")
def test_results_of_a_model_or_an_adapter_that_has_changed_since_are_refused(
    make_config: Callable[..., Any], test_rows: str, model_folder: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(model_folder, tmp_path / "model")
    settings: Any = {"model": {"name": str(model)}, "data": {"test": test_rows}, "train": {"max_steps": 1}}
    first = finetune(make_config("first", **settings))
    adapter = tmp_path / "kept"
    shutil.copytree(first.path / "adapter", adapter)
    config = make_config("cell", **settings, adapter=str(adapter), plan=None)
    found = run_cell(config)
    assert finished_cell(config) == found

    for file, what in (
        (adapter / "adapter_model.safetensors", f"the adapter {adapter} that the run began from has changed"),
        (model / "model.safetensors", f"the model {model} has changed, its weights or its tokenizer,"),
    ):
        kept = file.read_bytes()
        file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(RunError, match=rf"cell\.json: {re.escape(what)} since .* remove the folder"):
            finished_cell(config)
        file.write_bytes(kept)
        assert finished_cell(config) == found
    shutil.rmtree(model)  # results can be looked at where the model is not
    assert finished_cell(config) == found


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tests": {}}, "'tests': the test sets should be test"),
        ({"correct": "01"}, r"'tests\.test\.correct': should be a 0 or a 1 for each of 9 rows"),
        ({"correct": "2" * 9}, r"'tests\.test\.correct': should be a 0 or a 1 for each of 9 rows"),
        (None, "maximum recursion depth"),
    ],
)
def test_results_that_are_not_whole_are_told(
    make_config: Callable[..., Any], test_rows: str, changes: dict[str, Any] | None, reason: str
) -> None:
    config = make_config(data={"test": test_rows})
    config.output.mkdir()
    said = cell_of([{"kind": "validation", "step": 1, "loss": 1.0}]).plain()
    result = {"kind": "generation", "rows": 9, "exact_match": 1.0, "correct": "1" * 9}
    said |= {"identity": identity(config), "tests": {"test": result}}
    file = config.output / "cell.json"
    write_json(file, said)
    assert finished_cell(config) is not None
    for key, value in (changes or {}).items():
        (said if key in said else result)[key] = value
    file.write_text("[" * 100_000 if changes is None else json.dumps(said), encoding="utf-8")
    with pytest.raises(RunError, match=rf"cell\.json: a damaged file \({reason}.*\); remove it"):
        finished_cell(config)


@pytest.mark.usefixtures("here")
def test_rows_may_be_several_files_or_a_part_of_one(make_config: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for name, part in (("a", rows(24)[:12]), ("b", rows(24)[12:])):
        write_rows(folder / f"{name}.jsonl", part)
    pattern = make_config(data={"train": f"{folder}/*.jsonl"}, train={"max_steps": 1})
    before = digest(pattern)
    assert run_cell(pattern).train_rows == 24
    assert digest(make_config(data={"train": f"{folder}/a.jsonl[:4]"})) != digest(
        make_config(data={"train": f"{folder}/a.jsonl"})
    )
    write_rows(folder / "b.jsonl", rows(12))
    assert digest(pattern) != before
    (folder / "b.jsonl").rename(folder / "c.jsonl")
    assert digest(pattern) != before
    with pytest.raises(RunError, match=r"nosuch\*: the rows cannot be read"):
        digest(make_config(data={"train": f"{folder}/nosuch*"}))


def test_pictures_that_rows_name_are_known_by_what_they_hold(
    make_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("red", "blue", "unnamed"):
        Image.new("RGB", (4, 4), "red").save(tmp_path / f"{name}.png")
    named = [{"picture": f"{name}.png", "label": name} for name in ("red", "blue", "gone")]
    said: Any = {"data": {"train": str(write_rows(tmp_path / "named.jsonl", named)), "columns": {"image": "picture"}}}
    config = make_config(**said, task="image_classification")
    before = digest(config)
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "unnamed.png")
    assert digest(config) == before
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "blue.png")
    assert (other := digest(config)) != before
    # All of it is read once, however often it is asked for.
    monkeypatch.setattr("trimtab.files.open_file", None)
    monkeypatch.setattr("trimtab.studies.cell.pictures_of", None)
    assert digest(config) == other


@pytest.mark.usefixtures("here")
def test_the_same_files_elsewhere_are_the_same_cell(make_config: Callable[..., Any], tmp_path: Path) -> None:
    config = make_config(data={"validation": str(write_rows(tmp_path / "held.jsonl", rows(9)))})
    (tmp_path / "moved").mkdir()
    moved = {
        "train": [str(write_rows(tmp_path / "moved" / "completion.jsonl", rows(24)))],
        "validation": str(write_rows(tmp_path / "moved" / "held.jsonl", rows(9))),
    }
    assert digest(make_config("there", data=moved)) == digest(config)


@pytest.mark.usefixtures("here")
def test_no_epochs_measure_the_model_as_it_is(make_config: Callable[..., Any], test_rows: str) -> None:
    config = make_config(data={"test": test_rows}, train={"epochs": 0}, evaluation={"before": False})
    found = run_cell(config)
    assert (found.steps, found.trainable_parameters) == (0, 0)
    assert found.total_parameters > 10_000
    plain = finetune(make_config("plain", data={"test": test_rows}, train={"max_steps": 1}))
    want = read_json(plain.evaluation("test", "before"))
    assert found.tests["test"].figures["accuracy"] == want["accuracy"]
    assert found.tests["test"].figures["perplexity"] == want["perplexity"]


class _Stop(Kept):
    """Raises ``error`` once training is at step ``at``."""

    def __init__(self, at: int, error: BaseException) -> None:
        super().__init__()
        self.at, self.error = at, error

    def step(self, step: int, steps: int) -> None:
        if step == self.at:
            raise self.error


@pytest.mark.full
def test_an_interrupted_cell_goes_on(
    make_config: Callable[..., Any], test_rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: Any = {"data": {"test": test_rows}, "train": {"epochs": 6}, "evaluation": {"before": False}}
    config = make_config("cut", **settings)
    with pytest.raises(Interrupted):
        run_cell(config, _Stop(3, KeyboardInterrupt()))
    assert finished_cell(config) is None
    assert read_json(config.output / "run" / "summary.json")["status"] == "interrupted"
    monkeypatch.setattr("trimtab.studies.cell.run_apart", run_here)
    listener = Kept()
    found = run_cell(config, listener)
    assert any(note.startswith("resuming at step") for note in listener.notes)
    whole = run_cell(make_config("whole", **settings))
    assert found.tests["test"].figures == whole.tests["test"].figures
    assert found.steps == whole.steps == 36


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put a shell script in the place of the run's process."""

    def put(*lines: str) -> None:
        script = tmp_path / "child.sh"
        script.write_text("\n".join(["#!/bin/sh", *lines, ""]))
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return put


def test_a_listener_may_end_a_cell(make_config: Callable[..., Any], child: Callable[..., None], tmp_path: Path) -> None:
    child(f"echo $$ > {tmp_path}/pid", """echo '["step", 4, 9]'""", """echo '["step", 5, 9]'""", "exec sleep 60")
    with pytest.raises(ZeroDivisionError):
        run_cell(make_config(), _Stop(5, ZeroDivisionError()))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize(
    ("lines", "error", "words"),
    [
        (
            ["""echo '["failed", "DataError", "no such file"]'""", "exit 1"],
            RunError,
            "^no such file$",
        ),
        (["""echo '["failed", "Interrupted", "stopped"]'""", "exit 130"], Interrupted, "^stopped$"),
        (["kill -9 $$"], RunError, r"run: the run's process was killed, as the system does when memory runs out"),
        (["kill -11 $$"], RunError, r"the run's process died \(SIGSEGV\)\.$"),
        (["echo one >&2", "echo two >&2", "exit 3"], RunError, r"died \(exit code 3\)\. It said last: two$"),
    ],
)
def test_how_a_process_ends_is_told(
    make_config: Callable[..., Any], child: Callable[..., None], lines: list[str], error: type[Exception], words: str
) -> None:
    child(*lines)
    with pytest.raises(error, match=words):
        run_cell(make_config())


@pytest.mark.usefixtures("here")
def test_a_cell_that_fails_says_why_and_can_be_tried_again(make_config: Callable[..., Any], tmp_path: Path) -> None:
    missing = tmp_path / "later.jsonl"
    config = make_config(data={"test": str(missing)}, train={"max_steps": 1}, evaluation={"before": False})
    with pytest.raises(RunError, match=r"later\.jsonl"):
        run_cell(config)
    write_rows(missing, rows(6))
    assert run_cell(config).tests["later"].rows == 6


@pytest.mark.full
def test_the_child_goes_when_its_parent_is_killed(make_config: Callable[..., Any], tmp_path: Path) -> None:
    make_config(train={"epochs": 3000, "save_every": 10})
    code = (
        "from trimtab.config.read import load_config\nfrom trimtab.studies.cell import run_cell\n"
        f"run_cell(load_config({str(tmp_path / 'run.yaml')!r}))"
    )
    metrics = tmp_path / "run" / "run" / "metrics.jsonl"
    parent = subprocess.Popen([sys.executable, "-c", code])
    for _ in range(1200):
        if metrics.is_file() and metrics.read_text().count("\n") > 12:
            break
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    time.sleep(0.5)
    size = metrics.stat().st_size
    time.sleep(0.5)
    assert metrics.stat().st_size == size > 0
