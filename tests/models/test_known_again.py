"""A model is known again by its weights and its tokenizer, wherever it lies."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tiny_runs import write_model
from trimtab.models import known_again
from trimtab.models.known_again import model_digest
from trimtab.models.locate import Source, locate


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "model")


def digest(folder: Path) -> str | None:
    return model_digest(locate(str(folder)))


def test_a_copy_is_the_same_model_whatever_lies_beside_it(original: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(original, tmp_path / "copy")
    (copy / "README.md").write_text("moved")
    assert digest(copy) == digest(original) is not None


@pytest.mark.parametrize("whole", [known_again.WHOLE, 0], ids=["read whole", "sampled"])
def test_other_weights_and_other_tokens_are_another_model(
    original: Path, tmp_path: Path, whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_again, "WHOLE", whole)
    monkeypatch.setattr(known_again, "SAMPLE", 8)
    other = write_model(tmp_path / "other", initializer_range=0.3)
    assert (other / "model.safetensors").stat().st_size == (original / "model.safetensors").stat().st_size
    assert digest(other) != digest(original) == digest(original)
    words = shutil.copytree(original, tmp_path / "words")
    text = (words / "tokenizer.json").read_text()
    (words / "tokenizer.json").write_text(text[:-3] + "  " + text[-3:])
    assert digest(words) != digest(original)


def test_what_is_not_here_has_none(tmp_path: Path) -> None:
    assert model_digest(Source("owner/name", "hub", "owner/name")) is None
    assert model_digest(Source("gone", "folder", str(tmp_path / "gone"))) is None
