"""A model that is another when its run is used again: training is refused, everything else says so."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tiny_runs import Kept, write_model
from trimtab.config.read import load_config
from trimtab.errors import RunError
from trimtab.export import Wishes, export_format, hand_over
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
