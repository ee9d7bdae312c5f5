"""How a run takes up its folder: what it may begin in, what it goes on with, and what is left where it was killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimtab import files
from trimtab.config.read import build_config, load_config
from trimtab.config.run import RunConfig
from trimtab.errors import RunError
from trimtab.files import read_json, write_json, write_jsonl
from trimtab.runs.beginning import Opening, deciding, opened
from trimtab.runs.folder import RECORD, RunFolder, run_at
from trimtab.runs.records import Summary


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    said = {"model": "an/model", "data": {"train": "/rows.jsonl", "test": "/harbour.jsonl"}, "output": "out"}
    return build_config(said, tmp_path, "run.yaml").model_copy(update={"output": tmp_path / "out"})


def begun(config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> RunFolder:
    with opened(config, resume=resume, overwrite=overwrite) as opening:
        opening.begin(config)
        Summary(trained=opening.trained).write_to(opening.folder.summary)
    return opening.folder


def finish(folder: RunFolder) -> None:
    """Make everything that a finished run has."""
    folder.adapter.mkdir(exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder.adapter / name).write_text("{}")
    for stage in ("before", "after"):
        write_jsonl(folder.predictions("harbour", stage), [{}, {}])
        result = {"kind": "generation", "rows": 2, "exact_match": 0.5}
        write_json(folder.evaluation("harbour", stage), result)
    folder.link_adapter()
    folder.report.write_text("<p>")
    Summary(status="finished", trained=True).write_to(folder.summary)


def state(config: RunConfig, **how: bool) -> Opening:
    with opened(config, **{"resume": False, "overwrite": False, **how}) as opening:
        return opening


def test_settings_that_were_edited_in_the_folder_are_told(config: RunConfig) -> None:
    folder = begun(config)
    Summary(settings=deciding(config)).write_to(folder.summary)
    text = folder.config.read_text()
    for free in ("log_every: 10", "name: an/model"):  # what a user may say anew there
        assert free in text
        folder.config.write_text(text.replace(free, f"{free}0"))
        assert state(load_config(folder.config), resume=True).resumes
    for key, value in (("batch_size", config.train.batch_size), ("seed", config.train.seed)):
        folder.config.write_text(text.replace(f"  {key}: {value}\n", f"  {key}: 3\n"))
        with pytest.raises(
            RunError, match=rf"changed since the run began: train\.{key} was {value}, now 3\. Put it back"
        ):
            state(load_config(folder.config), resume=True)
    Summary().write_to(folder.summary)  # of an earlier version
    assert state(load_config(folder.config), resume=True).resumes


class Killed(BaseException):
    """The process is ended."""


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    """End the work just before the n-th time that a file is put, made or removed; gives the list of what was done."""

    def patch(last: int) -> list[str]:
        done: list[str] = []
        for home, name in ((os, "replace"), (os, "rename"), (os, "unlink"), (os, "rmdir"), (os, "mkdir")):
            real = getattr(home, name)

            def change(*arguments: Any, real: Any = real, name: str = name, **named: Any) -> Any:
                done.append(f"{name} {Path(str(arguments[-1])).name}")
                if len(done) >= last:
                    raise Killed
                return real(*arguments, **named)

            monkeypatch.setattr(home, name, change)
        return done

    return patch


def files_in(folder: RunFolder) -> list[str]:
    return sorted(str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.name != ".lock")


@pytest.mark.parametrize("old", [False, True], ids=["in a new folder", "in place of an old run"])
def test_wherever_a_beginning_is_killed_the_same_command_begins_again(
    old: bool, config: RunConfig, kill_at: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = config.model_copy(update={"train": config.train.model_copy(update={"seed": 7})})
    place = RunFolder(config.output)
    for last in range(1, 100):
        shutil.rmtree(config.output, ignore_errors=True)
        if old:
            finish(begun(other))
            (place.path / "thesis.txt").write_text("mine")
        with monkeypatch.context() as patch:
            patch.setattr("os.getpid", lambda: 2**22 + 1)  # that of a process which is no more
            done = kill_at(last)
            try:
                begun(config, overwrite=old)
            except Killed:
                pass
            else:
                assert len(done) < last
                break
            finally:
                monkeypatch.undo()
                files._ours.clear()  # what a process knows of itself is gone with it
        folder = begun(config, overwrite=old)
        mine = ["thesis.txt"] if old else []
        assert files_in(folder) == sorted(["config.yaml", "summary.json", *mine]), (last, done)
        assert load_config(folder.config) == config
        assert not state(config, resume=True).trained
    assert last > (20 if old else 3)


def test_an_old_run_that_is_half_cleared_away_is_never_gone_on_with(config: RunConfig) -> None:
    finish(begun(config))
    RunFolder(config.output).clearing.touch()
    for how in ({}, {"resume": True}, {"overwrite": True}):
        assert not state(config, **how).resumes
    folder = begun(config, resume=True)
    assert files_in(folder) == ["config.yaml", "summary.json"]


def test_a_run_of_which_nothing_is_made_yet_can_be_begun_anew(config: RunConfig) -> None:
    begun(config)
    changed = config.model_copy(update={"train": config.train.model_copy(update={"seed": 3})})
    assert load_config(begun(changed).config).train.seed == 3
    assert state(changed, resume=True).resumes
    folder = RunFolder(config.output)
    folder.metrics.write_text('{"kind": "train", "step": 1, "loss": 1.0}\n')
    with pytest.raises(RunError, match=r"holds a run already \(interrupted\)"):
        begun(config)


def test_what_a_finished_run_lacks_is_made_at_a_resume(config: RunConfig) -> None:
    finish(folder := begun(config))
    with pytest.raises(RunError, match="this run is finished; there is nothing to resume"):
        state(config, resume=True)
    for missing in (
        folder.report,
        folder.path / "adapter_config.json",
        folder.predictions("harbour", "before"),
        folder.evaluation("harbour", "after"),
    ):
        missing.unlink()
        opening = state(config, resume=True)
        assert opening.trained
        assert opening.is_measured(config) == (missing.parent == folder.path)
        finish(folder)
    write_jsonl(folder.predictions("harbour", "after"), [{}])  # one of its two rows
    assert not state(config, resume=True).is_measured(config)
    finish(folder)
    shutil.rmtree(folder.adapter)
    assert not state(config, resume=True).trained


def test_more_training_and_other_evaluations_of_a_finished_run(config: RunConfig) -> None:
    finish(folder := begun(config))
    evaluation = config.evaluation.model_copy(update={"max_new_tokens": 5})
    measured = config.model_copy(update={"evaluation": evaluation})
    opening = state(measured, resume=True)
    assert opening.trained
    assert not opening.is_measured(measured)
    with opened(measured, resume=True, overwrite=False) as opening:
        opening.begin(measured)
    assert read_json(folder.summary) == {"status": "interrupted", "trained": True}
    assert not folder.evaluation("harbour", "after").exists()
    assert load_config(folder.config).evaluation.max_new_tokens == 5

    longer = measured.model_copy(update={"train": config.train.model_copy(update={"epochs": 9.0})})
    with opened(longer, resume=True, overwrite=False) as opening:
        assert not opening.trained
        opening.begin(longer)
    assert read_json(folder.summary) == {"status": "interrupted", "trained": False}
    assert folder.has_adapter  # until there is another
    assert not state(longer, resume=True).trained


def test_a_copy_is_a_run_of_its_own(config: RunConfig, tmp_path: Path) -> None:
    begun(config)
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(config.output, copy)
    for named in (copy, copy / "config.yaml"):
        assert run_at(named) == RunFolder(copy)
    assert (copy / "config.yaml").read_text().startswith(RECORD)
    assert load_config(copy / "config.yaml").output == copy
    assert str(config.output) not in (copy / "config.yaml").read_text()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.yaml").write_text((copy / "config.yaml").read_text().removeprefix(RECORD))
    assert run_at(mine / "config.yaml") is None
    assert run_at(mine) is None
    with pytest.raises(RunError, match="not empty and holds no run"):
        begun(config.model_copy(update={"output": mine}), overwrite=True)
    assert [file.name for file in mine.iterdir()] == ["config.yaml"], "no lock is left in a folder of something else"


def test_a_second_process_is_refused_and_nothing_is_left_of_what_was_not_begun(config: RunConfig) -> None:
    with opened(config, resume=False, overwrite=False):
        with pytest.raises(RunError, match=r"out: another process \(\d+, since [\d: -]+\) is at work here"):
            begun(config)
        assert files_in(RunFolder(config.output)) == []
    assert not config.output.exists()
    begun(config)
    assert (config.output / ".lock").read_text() == ""
