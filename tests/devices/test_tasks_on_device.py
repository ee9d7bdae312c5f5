"""Short runs of every task, and one on a GGUF file's weights, on a device: the processor's losses, a model that
lies there whole, and steps that wait for nothing and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import Trainer

import sampling
from accelerator import NAME, Seen, accelerator
from run_fixtures import bare_runs, own_cache  # noqa: F401
from tiny_encoders import write_encoder
from tiny_gguf import write_gguf
from tiny_runs import Kept, labelled, rows, write_config, write_rows
from tiny_seq2seq import pair_rows, write_t5
from trimtab.config.read import load_config
from trimtab.runs.load import load_run
from trimtab.training.run import finetune

TEXT = ["the", "pilot", "asks", "Anna", "line", "for", "Kiel", "again"]
TAGS = ["O", "O", "O", "B-PER", "I-PER", "O", "B-LOC", "O"]


def classes(folder: Path) -> tuple[Path, Path]:
    return write_encoder(folder / "model"), write_rows(folder / "rows.jsonl", labelled(12))


def tags(folder: Path) -> tuple[Path, Path]:
    found = [{"tokens": TEXT[at % 3 :], "tags": TAGS[at % 3 :]} for at in range(12)]
    return write_encoder(folder / "model"), write_rows(folder / "rows.jsonl", found)


def sequences(folder: Path) -> tuple[Path, Path]:
    write_t5(folder / "model")
    return folder / "model", write_rows(folder / "rows.jsonl", pair_rows(12))


def pictures(folder: Path) -> tuple[Path, Path]:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ViTConfig(image_size=16, patch_size=8, id2label={0: "red", 1: "blue"}, **sizes)
    ViTForImageClassification(config).save_pretrained(folder / "model")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "model")
    for label, colour in (("red", (220, 30, 30)), ("blue", (20, 40, 230))):
        (folder / "rows" / label).mkdir(parents=True)
        for at in range(6):
            Image.new("RGB", (20 + at, 24), colour).save(folder / "rows" / label / f"{at}.png")
    return folder / "model", folder / "rows"


def gguf(folder: Path) -> tuple[Path, Path]:
    write_gguf(folder / "tiny.gguf")
    return folder / "tiny.gguf", write_rows(folder / "rows.jsonl", rows(12))


@pytest.mark.parametrize("made", [classes, *([sequences, pictures, gguf, tags] if sampling.everything else [])])
def test_a_run_is_that_of_the_processor(
    made: Callable[[Path], tuple[Path, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bare_runs: None,  # noqa: F811
) -> None:
    model, train = made(tmp_path)
    said = {"data": {"test": str(train)}, "train": {"max_steps": 2}, "evaluation": {"max_new_tokens": 3}}
    here, there = Kept(), Kept()
    plain = finetune(load_config(write_config(tmp_path / "here.yaml", model, train, **said)), listener=here)
    steps: list[Seen] = []
    step = Trainer.training_step

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        with accelerator() as seen:
            loss = step(self, *args, **kwargs)
        steps.append(seen)
        return loss

    monkeypatch.setattr(Trainer, "training_step", watched)
    with accelerator():
        folder = finetune(load_config(write_config(tmp_path / "there.yaml", model, train, **said)), listener=there)
        loaded = load_run(folder.path).model
        assert {tensor.device.type for tensor in (*loaded.parameters(), *loaded.buffers())} == {NAME}
    assert len(steps) == 2
    for one in steps:
        # Where attention goes both ways, transformers looks once or twice whether a mask hides anything at all.
        assert one.waits.total() <= (0 if made in (pictures, gguf) else 2), "a training step waits for the device"
        assert all(place.startswith("item tasks/") for place in one.waits), "it waits in a line of ours"
        assert not one.uploads, "a training step copies from the processor"
        assert not one.left, "a training step makes tensors on the processor"
    assert there.column("loss") == pytest.approx(here.column("loss"), rel=1e-4)
    predicted = [sorted((one.path / "predictions").glob("*.jsonl")) for one in (plain, folder)]
    assert [path.name for path in predicted[0]] == [path.name for path in predicted[1]] != []
