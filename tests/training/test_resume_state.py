"""Damaged and hostile checkpoints: none is gone on from, each is told by the file that is to blame, and nothing else is
raised, run or changed."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import trimtab
from tiny_runs import Kept, rows, write_config, write_model, write_rows
from trimtab.config.read import load_config
from trimtab.config.run import RunConfig
from trimtab.errors import Interrupted, MachineError
from trimtab.files import read_json, write_json
from trimtab.runs.checkpoints import COMPLETE, STATE, UNLOGGED, _sum, numbered
from trimtab.runs.events import Listener
from trimtab.surgery.attach import trainable_parameters
from trimtab.surgery.attach_report import AttachReport
from trimtab.training import callbacks
from trimtab.training.optimizer import make_optimizer
from trimtab.training.resume_state import why_not
from trimtab.training.run import finetune

OPTIMIZER, SCHEDULE, GENERATORS, AVERAGE = "optimizer.pt", "scheduler.pt", "rng_state.pth", "average.safetensors"
ADAPTER, TENSORS = "adapter_config.json", "adapter_model.safetensors"
STEP = 6


class Stop(Listener):
    """Ends the run after a step, as Ctrl-C does."""

    def step(self, step: int, steps: int) -> None:
        if step == STEP + 1:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunConfig]:
    """A run of 12 steps that was stopped after its checkpoints at steps 3 and 6."""
    place = tmp_path_factory.mktemp("cut-off")
    train = write_rows(place / "rows.jsonl", rows(30))
    settings = {"epochs": 2, "save_every": 3, "validate_every": 3, "early_stopping": 5, "average": 0.7}
    plan = [{"match": ["*.q_proj", "*.down_proj"], "method": "dora", "rank": 3, "alpha": 5, "dropout": 0.1}]
    model = write_model(place / "model", num_hidden_layers=1)
    config = load_config(
        write_config(place / "run.yaml", model, train, data={"validation": 0.2}, train=settings, plan=plan)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_CACHE", str(place / "cache"))
        patch.setattr("trimtab.training.checks.check_run", lambda *_: AttachReport((), (), 0, 0))
        patch.setattr("trimtab.reports.run.run_page.write_run_page", lambda *_: None)
        with pytest.raises(Interrupted):
            finetune(config, listener=Stop())
        assert [step for step, _ in numbered(config.output / "checkpoints")] == [3, STEP]
        yield config


@pytest.fixture(scope="module")
def ask(cut_off: RunConfig) -> Callable[[Path], str | None]:
    """What is said of a checkpoint of that run."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(cut_off.model.name)
    trimtab.attach(model, [trimtab.Rule(**rule) for rule in cut_off.plan])

    def said(checkpoint: Path) -> str | None:
        return why_not(
            checkpoint,
            optimizer=make_optimizer(model, cut_off.train),
            averaged=trainable_parameters(model),
            patience=5,
            keeps_best=True,
        )

    return said


@pytest.fixture
def checkpoint(cut_off: RunConfig, tmp_path: Path) -> Path:
    """A copy of the newest one, beside the adapters of the best validations."""
    shutil.copytree(cut_off.output / "checkpoints", tmp_path / "checkpoints")
    return tmp_path / "checkpoints" / f"checkpoint-{STEP}"


def seal(checkpoint: Path) -> None:
    """Make the sums agree with what is there: as if it had been written so."""
    write_json(
        checkpoint / COMPLETE,
        {file.name: _sum(file) for file in checkpoint.iterdir() if file.is_file() and file.name != COMPLETE},
    )


def put(file: Path, value: Any) -> None:
    torch.save(value, file)


def changed(file: Path, change: Callable[[Any], Any]) -> None:
    """Write ``file`` with what ``change`` gives of its value, or has made of it."""
    if file.suffix == ".json":
        value = read_json(file)
        found = change(value)
        file.write_text(json.dumps(value if found is None else found))
        return
    value = torch.load(file, weights_only=False)
    found = change(value)
    put(file, value if found is None else found)


def at(*keys: Any, value: Any) -> Callable[[Any], None]:
    """Set what ``keys`` lead to."""

    def change(found: Any) -> None:
        for key in keys[:-1]:
            found = found[key]
        found[keys[-1]] = value

    return change


def without(*keys: Any) -> Callable[[Any], None]:
    def change(found: Any) -> None:
        for key in keys[:-1]:
            found = found[key]
        del found[keys[-1]]

    return change


def moment(key: str, make: Callable[[torch.Tensor], Any]) -> Callable[[Any], None]:
    """Replace a moment of the first tensor."""

    def change(found: Any) -> None:
        found["state"][0][key] = make(found["state"][0][key])

    return change


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[0] = float("nan")
    return tensor


def packed(file: Path) -> None:
    """The same archive, compressed: 20 bytes of such a file may unfold to gigabytes."""
    with zipfile.ZipFile(file) as old:
        content = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in content.items():
            new.writestr(name, data)


class Code:
    """Unpickled, it makes a folder."""

    def __reduce__(self) -> Any:
        return Path.mkdir, (Path("ran"),)


def hostile(file: Path) -> None:
    put(file, {"state": Code(), "param_groups": []})


def as_pickle(file: Path) -> None:
    file.write_bytes(pickle.dumps({"state": {}, "param_groups": [], "more": Code()}))


def halved(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


ALL = (OPTIMIZER, SCHEDULE, GENERATORS, STATE, AVERAGE, ADAPTER, TENSORS)
FILES: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "halved": halved,
    "text": lambda file: file.write_text("a note of somebody's"),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "a folder": as_folder,
}
TORCH: dict[str, Callable[[Path], Any]] = {
    "hostile": hostile,
    "an old pickle": as_pickle,
    "compressed": packed,
    "a list": lambda file: put(file, [1, 2]),
    "a tensor": lambda file: put(file, torch.zeros(3)),
    "an empty mapping": lambda file: put(file, {}),
}
CHANGES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    # The optimiser: torch believes all of this.
    "no state": (OPTIMIZER, without("state")),
    "no moments": (OPTIMIZER, at("state", value={})),
    "moments of more tensors": (OPTIMIZER, lambda found: found["state"].update({99: found["state"][0]})),
    "moments by name": (OPTIMIZER, lambda found: found["state"].update(weight=found["state"][0])),
    "a moment missing": (OPTIMIZER, without("state", 0, "exp_avg_sq")),
    "a moment more": (OPTIMIZER, at("state", 0, "momentum_buffer", value=torch.zeros(1))),
    "a larger moment": (OPTIMIZER, moment("exp_avg", lambda old: torch.zeros(old.shape[0] + 7, *old.shape[1:]))),
    "a smaller moment": (OPTIMIZER, moment("exp_avg_sq", lambda old: torch.zeros(1))),
    "a turned moment": (OPTIMIZER, moment("exp_avg", lambda old: old.T.contiguous())),
    "a moment that is one number": (OPTIMIZER, moment("exp_avg", lambda old: torch.zeros(1).expand(old.shape))),
    "a moment with another layout": (OPTIMIZER, moment("exp_avg", lambda old: old.T.contiguous().T)),
    "a sparse moment": (OPTIMIZER, moment("exp_avg", lambda old: old.to_sparse())),
    "a moment of whole numbers": (OPTIMIZER, moment("exp_avg", lambda old: old.long())),
    "a moment of complex numbers": (OPTIMIZER, moment("exp_avg", lambda old: old.to(torch.complex64))),
    "a moment without memory": (OPTIMIZER, moment("exp_avg", lambda old: old.to("meta"))),
    "a moment that is a list": (OPTIMIZER, moment("exp_avg", lambda old: old.tolist())),
    "a moment that is no number": (OPTIMIZER, moment("exp_avg", with_nan)),
    "a negative square": (OPTIMIZER, moment("exp_avg_sq", lambda old: old - 1)),
    "step 0": (OPTIMIZER, moment("step", torch.zeros_like)),
    "a step to come": (OPTIMIZER, moment("step", lambda old: old + 1000)),
    "steps in a row": (OPTIMIZER, moment("step", lambda old: old.repeat(3))),
    "a group less": (OPTIMIZER, lambda found: found["param_groups"].pop()),
    "groups by name": (OPTIMIZER, at("param_groups", value={"a": 1})),
    "a group that is none": (OPTIMIZER, at("param_groups", 0, value=3)),
    "tensors in another order": (OPTIMIZER, lambda found: found["param_groups"][0]["params"].reverse()),
    "a rate that is no number": (OPTIMIZER, at("param_groups", 0, "lr", value=float("nan"))),
    "a rate that is text": (OPTIMIZER, at("param_groups", 0, "lr", value="fast")),
    "a rate that is a tensor": (OPTIMIZER, at("param_groups", 0, "lr", value=torch.ones(2))),
    "other betas": (OPTIMIZER, at("param_groups", 0, "betas", value=(0.5, 2.0))),
    "another decay": (OPTIMIZER, at("param_groups", 0, "weight_decay", value=1.0)),
    "a setting more": (OPTIMIZER, at("param_groups", 0, "centered", value=True)),
    "another beginning": (OPTIMIZER, at("param_groups", 0, "initial_lr", value=3.0)),
    # The schedule.
    "a schedule of another step": (SCHEDULE, at("last_epoch", value=2)),
    "a schedule of text": (SCHEDULE, at("last_epoch", value="6")),
    "a schedule without a count": (SCHEDULE, without("_step_count")),
    "a schedule of other rates": (SCHEDULE, lambda found: at("base_lrs", 0, value=7.0)(found)),
    "a schedule of fewer rates": (SCHEDULE, lambda found: found["base_lrs"].pop()),
    "a last rate that is no number": (SCHEDULE, at("_last_lr", 0, value=float("inf"))),
    "a schedule with a function": (SCHEDULE, at("lr_lambdas", 0, value={"a": 1})),
    # The generators.
    "no generator of Python's": (GENERATORS, without("python")),
    "no generator of numpy's": (GENERATORS, without("numpy")),
    "no generator of torch's": (GENERATORS, without("cpu")),
    "a short generator of Python's": (GENERATORS, at("python", value=(3, (1, 2, 3), None))),
    "a short generator of torch's": (GENERATORS, at("cpu", value=torch.zeros(5, dtype=torch.uint8))),
    "a generator of other numbers": (GENERATORS, at("cpu", value=torch.zeros(5056))),
    "another generator of numpy's": (GENERATORS, at("numpy", value=("PCG64", [1], 0, 0, 0.0))),
    # Losses that no line has yet.
    "losses in a list": (UNLOGGED, lambda found: [found]),
    "a loss that is none": (UNLOGGED, at("loss", value=float("nan"))),
    "a loss in a text": (UNLOGGED, at("loss", value="1.5")),
    "losses of more steps": (UNLOGGED, at("steps", value=7)),
    "losses of half a step": (UNLOGGED, at("steps", value=0.5)),
    # The counts.
    "counts in a list": (STATE, lambda found: [found]),
    "counts of another step": (STATE, at("global_step", value=3)),
    "a step in a text": (STATE, at("global_step", value="6")),
    "a step that is true": (STATE, at("global_step", value=True)),
    "an epoch that is none": (STATE, at("epoch", value=float("nan"))),
    "a count less": (STATE, without("max_steps")),
    "a count more": (STATE, at("hooks", value=[])),
    "a history that is none": (STATE, at("log_history", value="x")),
    "no callbacks": (STATE, at("stateful_callbacks", value={})),
    "a callback less": (STATE, without("stateful_callbacks", "EarlyStoppingCallback")),
    "a callback with a method": (
        STATE,
        at("stateful_callbacks", "EarlyStoppingCallback", "attributes", "on_step_end", value="gone"),
    ),
    "patience in a text": (
        STATE,
        at("stateful_callbacks", "EarlyStoppingCallback", "args", "early_stopping_patience", value="5"),
    ),
    "a best step to come": (STATE, at("best_global_step", value=7)),
    "a best step that nobody kept": (STATE, at("best_global_step", value=1)),
    "a best metric that is text": (STATE, at("best_metric", value="good")),
}


def test_a_whole_checkpoint_is_gone_on_from(ask: Callable[[Path], str | None], checkpoint: Path) -> None:
    assert ask(checkpoint) is None
    (checkpoint / COMPLETE).unlink()  # as an earlier version left one
    assert ask(checkpoint) is None
    seal(checkpoint)
    assert ask(checkpoint) is None


@pytest.mark.parametrize("file", ALL)
def test_a_file_that_is_not_as_it_was_written(file: str, ask: Callable[[Path], str | None], checkpoint: Path) -> None:
    content = bytearray((checkpoint / file).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / file).write_bytes(content)
    assert ask(checkpoint) == f"{file} is not as it was written"


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "without sums"])
@pytest.mark.parametrize("how", FILES)
def test_every_file_is_needed_and_read(
    how: str, sealed: bool, ask: Callable[[Path], str | None], checkpoint: Path
) -> None:
    for file in ALL:
        before = (checkpoint / file).read_bytes()
        FILES[how](checkpoint / file)
        seal(checkpoint) if sealed else (checkpoint / COMPLETE).unlink(missing_ok=True)
        said = ask(checkpoint)
        named = (file, "no adapter here") if file in (ADAPTER, TENSORS) else (file,)
        assert said is not None, (how, file)
        assert any(name in said for name in named), (how, file, said)
        assert "Traceback" not in said
        if (checkpoint / file).is_dir():
            (checkpoint / file).rmdir()
        (checkpoint / file).write_bytes(before)
    seal(checkpoint)
    assert ask(checkpoint) is None


@pytest.mark.parametrize("how", TORCH)
def test_what_torch_would_read_otherwise(
    how: str, ask: Callable[[Path], str | None], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    for file in (OPTIMIZER, SCHEDULE, GENERATORS):
        before = (checkpoint / file).read_bytes()
        TORCH[how](checkpoint / file)
        seal(checkpoint)
        said = ask(checkpoint)
        assert said is not None, (how, file)
        assert said.startswith(file), (how, file, said)
        (checkpoint / file).write_bytes(before)
    assert not Path("ran").exists()  # the code in it


@pytest.mark.parametrize("what", CHANGES)
def test_a_value_that_is_not_what_training_writes(
    what: str, ask: Callable[[Path], str | None], checkpoint: Path
) -> None:
    file, change = CHANGES[what]
    changed(checkpoint / file, change)
    seal(checkpoint)
    said = ask(checkpoint)
    assert said is not None
    assert said.startswith(file) or "best-1" in said, said


@pytest.mark.parametrize("what", ["other names", "another shape", "no count", "no number"])
def test_a_mean_that_is_not_of_these_tensors(what: str, ask: Callable[[Path], str | None], checkpoint: Path) -> None:
    means, metadata = load_file(checkpoint / AVERAGE), {"count": "2"}
    name = next(iter(means))
    if what == "other names":
        means["other"] = means.pop(name)
    elif what == "another shape":
        means[name] = torch.zeros(2, 2)
    elif what == "no number":
        means[name] = with_nan(means[name])
    else:
        metadata = {"count": "-1"}
    save_file(means, checkpoint / AVERAGE, metadata=metadata)
    seal(checkpoint)
    assert str(ask(checkpoint)).startswith(AVERAGE)


def test_states_that_nest_without_end_or_are_huge(ask: Callable[[Path], str | None], checkpoint: Path) -> None:
    (checkpoint / STATE).write_text("[" * 100_000)
    seal(checkpoint)
    assert str(ask(checkpoint)).startswith(STATE)
    with (checkpoint / STATE).open("w") as file:
        file.truncate(17 * 1024**2)
    seal(checkpoint)
    assert "17,825,792 bytes" in str(ask(checkpoint))
    (checkpoint / COMPLETE).write_text("[]")
    assert str(ask(checkpoint)).startswith(COMPLETE)


def resumed(config: RunConfig, tmp_path: Path, damage: Callable[[Path], object]) -> tuple[RunConfig, Kept]:
    """Go on with a copy of the run after ``damage`` to its folder of checkpoints."""
    copy = config.model_copy(update={"output": tmp_path / "copy"})
    shutil.copytree(config.output, copy.output)
    damage(copy.output / "checkpoints")
    told = Kept()
    told.remark = told.note  # type: ignore[method-assign]
    finetune(copy, resume=True, listener=told)
    return copy, told


@pytest.mark.usefixtures("bare_runs")
def test_the_checkpoint_before_a_damaged_one_is_taken_and_the_run_ends_the_same(
    cut_off: RunConfig, tmp_path: Path
) -> None:
    whole, _ = resumed(cut_off, tmp_path / "whole", lambda _: None)
    config, told = resumed(cut_off, tmp_path, lambda folder: halved(folder / "checkpoint-6" / OPTIMIZER))
    assert any("checkpoint-6 is damaged (optimizer.pt is not as it was written)" in note for note in told.notes)
    assert "resuming at step 3" in told.notes
    assert any("damaged-checkpoint-6" in note for note in read_json(config.output / "summary.json")["notes"])
    assert (config.output / "checkpoints" / "damaged-checkpoint-6" / OPTIMIZER).is_file()
    adapters = [load_file(one.output / "adapter" / TENSORS) for one in (whole, config)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    assert len(adapters[0]) == len(adapters[1])

    def all_damaged(folder: Path) -> None:
        for _, place in numbered(folder):
            (place / GENERATORS).unlink()

    config, told = resumed(cut_off, tmp_path / "all", all_damaged)
    assert not any("resuming" in note for note in told.notes)
    again = load_file(config.output / "adapter" / TENSORS)
    assert all(torch.equal(adapters[0][name], again[name]) for name in again)


def test_callbacks_that_are_kept_in_a_checkpoint_are_known() -> None:
    from transformers.trainer_callback import ExportableState

    found = [kind for kind in vars(callbacks).values() if isinstance(kind, type)]
    mine = [kind for kind in found if kind.__module__ == callbacks.__name__]
    assert mine
    assert not any(issubclass(kind, ExportableState) for kind in mine)  # else resume_state would have to know of it


@pytest.mark.usefixtures("bare_runs")
def test_half_a_checkpoint_is_not_left_where_the_disk_is_full(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The earlier one stays whole, the error is in words, and the run goes on from there once there is room."""
    config = make_config(train={"epochs": 1, "save_every": 2})
    real = torch.save

    def full(value: Any, file: Any, *rest: Any) -> None:
        if "checkpoint-4" in str(file) and file.endswith(SCHEDULE):
            Path(file).write_bytes(b"PK")
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
        real(value, file, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("torch.save", full)
        with pytest.raises(MachineError, match=r"then go on with: trimtab finetune .* --resume"):
            finetune(config)
    assert sorted(place.name for place in (config.output / "checkpoints").iterdir()) == ["checkpoint-2"]
    told = Kept()
    assert finetune(config, resume=True, listener=told).status == "finished"
    assert "resuming at step 2" in told.notes
