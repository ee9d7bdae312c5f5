"""Settings are written into a run's YAML where they stand; everything else in it stays."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from trimtab.config.read import load_config
from trimtab.config.rewrite import edited, with_settings

HEAD = "model: some/model # the base\ndata:\n  train: rows.jsonl\n"
RATE = "train.learning_rate=0.0012"


@pytest.mark.parametrize(
    ("train", "before"),
    [
        ("train:\n  epochs: 2 # twice\n  RATE # found\n", "auto"),
        ("train:\n    RATE\n    # how\n    epochs: 2\n", None),
        ("train: {epochs: 2, RATE}\n", "5e-4"),
        ("train:\n  RATE\n", ...),
        ("train:\n  magnitude_learning_rate: 1e-3\n\n  RATE", "1e-4"),
        ("train: {epochs: 2,\n  RATE, # found\n  seed: 1}\n", "5e-4"),
        ("train: {RATE, epochs: 2} # twice\n", "missing"),
        ("train: &how\n  epochs: 2\n  RATE\n", "1e-4"),
        ("'train':\n  epochs: 2\n  RATE\n...\n", "1e-4"),
        ("train: # nothing yet\n".replace(" #", "\n  RATE #"), "section"),
    ],
)
def test_the_rate_alone_is_changed(tmp_path: Path, train: str, before: Any) -> None:
    """``before``: what the rate was; None, missing or section where it was not said, ... where there was no section to
    say it in."""
    line = {
        None: re.sub(r"RATE\n +", "", train),
        "missing": train.replace("RATE, ", ""),
        "section": train.replace("\n  RATE", ""),
        ...: "",
    }.get(before, train.replace("RATE", f"learning_rate: {before}"))
    file = tmp_path / "run.yaml"
    for ends in ("\n", "\r\n"):
        file.write_bytes((HEAD + line).replace("\n", ends).encode())
        written = with_settings(file, [RATE], beside=tmp_path / "new.yaml")
        assert written == (HEAD + train.replace("RATE", "learning_rate: 0.0012")).replace("\n", ends)


def test_several_settings_are_put_in_their_places(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(HEAD + "train:\n  epochs: 2\n# the end\n", encoding="utf-8")
    settings = [RATE, "train.epochs=3", "train.tune.budget=0.5", "evaluation.max_new_tokens=5"]
    assert edited(file, settings) == HEAD + (
        "train:\n  tune: {budget: 0.5}\n  learning_rate: 0.0012\n  epochs: 3\n# the end\n"
        "evaluation:\n  max_new_tokens: 5\n"
    )


def test_where_there_is_no_place_all_is_written_anew(tmp_path: Path) -> None:
    file, new = tmp_path / "run.yaml", tmp_path / "new.yaml"
    file.write_text(HEAD + "train: &how {epochs: 2, learning_rate: 1e-3}\n", encoding="utf-8")
    assert edited(file, ["data.train=other.jsonl"]) is None
    new.write_text(with_settings(file, [RATE], beside=new), encoding="utf-8")
    wanted = load_config(file, [RATE])
    assert load_config(new).train == wanted.train
    assert load_config(new).data == wanted.data


def test_in_another_folder_and_with_other_rows_paths_lead_to_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    file = tmp_path / "run.yaml"
    file.write_text(HEAD, encoding="utf-8")
    for new, settings in (
        (tmp_path / "elsewhere" / "new.yaml", [RATE]),
        (tmp_path / "other.yaml", [RATE, "data.train=mine.jsonl"]),
    ):
        new.write_text(with_settings(file, settings, beside=new), encoding="utf-8")
        assert load_config(new).data == load_config(file, settings).data
        assert load_config(new).train.learning_rate == 0.0012
