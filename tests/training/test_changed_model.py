"""A model or an adapter that is another when its run is used again: training is refused, everything else says so."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import Kept, rows, write_model, write_rows
from trimtab.config.read import load_config
from trimtab.errors import RunError, TrimtabWarning
from trimtab.export import Wishes, export_format, hand_over
from trimtab.export._combined import combine_folders
from trimtab.files import read_json, write_json
from trimtab.runs.load import doubt_of
from trimtab.runs.named import Named
from trimtab.training.run import finetune

pytestmark = pytest.mark.usefixtures("bare_runs")


def test_another_model_in_the_place_of_the_runs_own(make_yaml: Callable[..., Path], tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    lora = [{"match": "all-linear", "method": "lora", "rank": 2}]  # of which no norm of the base is known
    said = {"model": {"name": str(model)}, "plan": lora}
    config = load_config(make_yaml(train={"max_steps": 2}, **said))
    run = finetune(config).path
    assert Named.find(str(run)).doubt is None
    shutil.copytree(model, tmp_path / "kept")

    write_model(model, initializer_range=0.3)
    told = f"{model} holds another model than the one that {run} was trained on"
    longer = load_config(make_yaml(train={"max_steps": 4}, **said))
    with pytest.raises(RunError, match=r"holds another model than the one that.*Put the model back and resume"):
        finetune(longer, resume=True)
    assert str(Named.find(str(run)).doubt).startswith(told)
    handed = hand_over(export_format("merged"), run, tmp_path / "merged", Wishes())
    assert any(note.startswith(told) for note in handed.notes)

    shutil.rmtree(model)
    shutil.copytree(tmp_path / "kept", model)
    assert finetune(longer, resume=True, listener=Kept()).read_summary().steps == 4
    assert Named.find(str(run)).doubt is None


def test_a_model_that_was_moved_is_named_at_a_resume(make_yaml: Callable[..., Path], tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    plan = [{"match": "all-linear", "method": "lora", "rank": 2}]
    run = finetune(load_config(make_yaml(model={"name": str(model)}, plan=plan, train={"max_steps": 2})))
    moved, other = model.rename(tmp_path / "moved"), write_model(tmp_path / "other", initializer_range=0.3)

    def longer(name: Path) -> Any:
        return load_config(make_yaml(model={"name": str(name)}, plan=plan, train={"max_steps": 4}))

    with pytest.raises(RunError, match="holds another model than the one that"):
        finetune(longer(other), resume=True)
    summary = read_json(run.summary)
    write_json(run.summary, {key: value for key, value in summary.items() if key != "model_digest"})
    with pytest.raises(RunError, match=r"began with other settings: model\.name was"):
        finetune(longer(moved), resume=True)
    write_json(run.summary, summary)
    assert finetune(longer(moved), resume=True).read_summary().steps == 4
    assert load_config(run.config).model.name == str(moved)


def test_the_adapter_of_another_run_in_the_place_of_the_runs_own(
    make_yaml: Callable[..., Path], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "train": {"max_steps": 2},
        "data": {"test": str(write_rows(tmp_path / "t.jsonl", rows(3)))},
    }
    run, other = (finetune(load_config(make_yaml(name, **settings))) for name in ("mine", "other"))
    assert Named.find(str(run.path)).doubt is None  # two runs of the same seed
    other = finetune(load_config(make_yaml("third", **{**settings, "train": {"max_steps": 3}})))
    own = shutil.copytree(run.adapter, tmp_path / "own")
    shutil.rmtree(run.adapter)
    shutil.copytree(other.adapter, run.adapter)

    told = f"{run.adapter} holds another adapter than the one that {run.path} was trained to"
    assert str(Named.find(str(run.path)).doubt).startswith(told)
    assert Named.find(str(run.path), base=True).doubt is None
    handed = hand_over(export_format("merged"), run.path, tmp_path / "merged", Wishes())
    assert any(note.startswith(told) for note in handed.notes)
    combining = [f"{run.path}:0.5", f"{other.path}:0.5"]
    with pytest.warns(TrimtabWarning, match=re.escape(told)):
        combine_folders(combining, tmp_path / "both")
    serving = Named.find(str(other.path)).source
    assert str(doubt_of(run.path, serving)).startswith(told)
    assert doubt_of(other.path, serving) is None
    unfinished = {**read_json(run.summary), "status": "interrupted"}
    shutil.rmtree(run.path / "evaluation")
    write_json(run.summary, unfinished)
    config = load_config(make_yaml("mine", **settings))
    with pytest.raises(RunError, match=r"holds another adapter than .* Put the run's own back and resume; or remove"):
        finetune(config, resume=True)

    # A run of an earlier version did not write down which adapter it was.
    write_json(run.summary, {key: value for key, value in unfinished.items() if key != "adapter_mark"})
    assert Named.find(str(run.path)).doubt is None
    write_json(run.summary, unfinished)
    shutil.rmtree(run.adapter)
    shutil.copytree(own, run.adapter)
    finetune(config, resume=True)
    assert Named.find(str(run.path)).doubt is None
