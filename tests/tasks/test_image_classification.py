"""Pictures: read from folders and tables, refused in words, trained with any network that transformers knows."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from run_fixtures import make_bare
from tiny_runs import Kept
from trimtab import tasks
from trimtab.adapters.placing import read_adapter
from trimtab.config.read import build_config
from trimtab.errors import DataError, ModelError, RunError
from trimtab.export import Wishes, export_format, hand_over
from trimtab.memory.estimate import estimate_run
from trimtab.runs.events import Listener
from trimtab.runs.load import load_run
from trimtab.runs.read import read_run
from trimtab.training.rate_trials import _Search
from trimtab.training.run import finetune
from trimtab.training.work import Work

TASK = tasks.find("image_classification")
COLOURS = {"red": (220, 30, 30), "blue": (20, 40, 230)}


def write_vit(folder: Path) -> None:
    """A vision transformer of two blocks that sorts pictures of 16 x 16 into three classes."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ViTConfig(image_size=16, patch_size=8, hidden_dropout_prob=0.0, **sizes)
    config.id2label = {0: "cat", 1: "dog", 2: "ship"}
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)


def write_resnet(folder: Path) -> None:
    """A network of convolutions and batch norms, without a linear layer but its head."""
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    config.id2label = {0: "cat", 1: "dog", 2: "ship"}
    ResNetForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def picture(colour: str, at: int) -> Image.Image:
    red, green, blue = COLOURS[colour]
    return Image.new("RGB", (20 + at, 24), (red, (green + 7 * at) % 256, blue))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_bare(monkeypatch, page=True)
    write_vit(tmp_path / "vit")
    for colour in COLOURS:
        (tmp_path / "train" / colour).mkdir(parents=True)
        for at in range(8):
            picture(colour, at).save(tmp_path / "train" / colour / f"{at}.png")
    lines = [{"image": f"train/{colour}/{at}.png", "label": colour} for colour in COLOURS for at in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return tmp_path


def config(place: Path, model: str = "vit", **sections: Any) -> Any:
    said = {
        "model": str(place / model),
        "data": {"train": "train", "validation": "rows.jsonl", "test": "rows.jsonl"} | sections.pop("data", {}),
        "train": {"epochs": 3, "batch_size": 4, "learning_rate": 0.01, "precision": "float32", "log_every": 1},
        "output": str(place / "run"),
        **sections,
    }
    return build_config(said, place, "run.yaml")


def read(place: Path, **sections: Any) -> tuple[Any, Any, Any]:
    job = tasks.job_of(config(place, **sections))
    reader = job.reader
    return job, reader, TASK.read(job, reader, Kept())


@pytest.mark.parametrize("model", ["vit", pytest.param("resnet", marks=pytest.mark.full)])
def test_a_folder_for_each_label_is_learnt(place: Path, model: str) -> None:
    write_resnet(place / "resnet")
    folder = finetune(config(place, model))
    run = read_run(folder.path)
    assert run.summary is not None
    assert (run.summary.task, run.summary.counted) == ("image_classification", "pictures")
    assert run.summary.choices == ["blue", "red"]
    after = run.sets[0].after
    assert after is not None
    assert after.main == 1.0
    assert all(line.tokens_per_second for line in run.metrics if line.kind == "train")  # each counts its own batch
    assert run.plan is not None
    assert {"full", "dora"} == set(run.plan.methods)


def test_a_run_does_not_go_on_with_other_pictures_under_the_same_names(place: Path) -> None:
    said: dict[str, Any] = {"data": {"train": "rows.jsonl", "validation": None, "test": "rows.jsonl"}}
    folder = finetune(config(place, **said))
    picture("red", 7).save(place / "train" / "blue" / "0.png")
    longer = config(place, **said)
    longer = longer.model_copy(update={"train": longer.train.model_copy(update={"epochs": 4})})
    with pytest.raises(RunError, match=r"the training rows are not those .*8 rows as then, but their pictures are"):
        finetune(longer, resume=True)

    # What an earlier version wrote says nothing of pictures.
    summary = json.loads(folder.summary.read_text())
    summary["digests"]["train"] = summary["digests"]["train"].split()[0]
    folder.summary.write_text(json.dumps(summary))
    listener = Kept()
    finetune(longer, resume=True, listener=listener)
    assert any("the test rows of 'rows' are others" in line for line in listener.remarks)


@pytest.mark.parametrize("form", ["merged", "lora"])
def test_it_is_handed_over(place: Path, form: str) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    folder = finetune(config(place, train={"max_steps": 2, "learning_rate": 0.01, "precision": "float32"}))
    handed = hand_over(export_format(form), folder.path, place / "out", Wishes())
    assert handed.agreement.kl < 1e-9
    loaded = load_run(folder.path)
    batch = AutoImageProcessor.from_pretrained(place / "out")(images=[picture("red", 3)], return_tensors="pt")
    torch.testing.assert_close(
        batch["pixel_values"], loaded.reader(images=[picture("red", 3)], return_tensors="pt")["pixel_values"]
    )
    if form == "merged":
        plain = AutoModelForImageClassification.from_pretrained(place / "out")
        torch.testing.assert_close(plain(**batch).logits, loaded.model(**batch).logits, atol=1e-5, rtol=0)


def test_a_table_may_hold_the_bytes(place: Path) -> None:
    rows = []
    for at, colour in enumerate(("red", "blue") * 3):
        buffer = io.BytesIO()
        picture(colour, at).save(buffer, "png")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": f"{at}.png"}, "label": colour})
    pq.write_table(pa.Table.from_pylist(rows), place / "rows.parquet")
    _, reader, inputs = read(place, data={"train": "rows.parquet"})
    files = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in rows]  # type: ignore[index]
    batch = TASK.collator(reader)([inputs.rows[at] for at in range(6)])
    torch.testing.assert_close(batch["pixel_values"], reader(images=files, return_tensors="pt")["pixel_values"])
    assert batch["labels"].tolist() == [1, 0] * 3
    assert inputs.digests.train != inputs.digests.test["rows"]


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "I;16"])
def test_pictures_of_any_mode_become_three_channels(place: Path, mode: str) -> None:
    grey = Image.new("L", (20, 20), 128)
    made = Image.new("I;16", (20, 20), 128 * 256) if mode == "I;16" else grey.convert(mode, dither=0)
    (place / "any" / "a").mkdir(parents=True)
    (place / "any" / "b").mkdir()
    ending = "tif" if mode in ("CMYK", "LA") else "png"
    made.save(place / "any" / "a" / f"0.{ending}")
    grey.save(place / "any" / "b" / "0.png")
    _, reader, inputs = read(place, data={"train": "any", "validation": None, "test": None})
    one, other = TASK.collator(reader)([inputs.rows[0], inputs.rows[1]])["pixel_values"]
    tolerance = 1.0 if mode == "1" else 0.02  # black and white is half of grey away from it
    assert (one - other).abs().max() <= tolerance


@pytest.mark.parametrize(("method", "rank"), [("lora", {"rank": 16, "alpha": 32}), ("mora", {"rank": 16})])
def test_a_convolution_that_the_rank_does_not_fit_takes_the_largest_at_the_same_scale(
    place: Path, method: str, rank: dict[str, int]
) -> None:
    from trimtab.models.load import load_model
    from trimtab.surgery.adapted import adapted_modules

    write_resnet(place / "resnet")
    job, _, inputs = read(place, model=str(place / "resnet"), plan=[{"match": "all-linear", "method": method, **rank}])
    model: Any = load_model(job.read_for(TASK.head_for(job, inputs)).source)
    job.read_for(TASK.head_for(job, inputs)).attach_to(model)
    found = {name: module.adapter.options for name, module in adapted_modules(model) if module.method == method}
    assert found["resnet.embedder.embedder.convolution"].rank <= 8  # it has eight channels
    assert max(options.rank for options in found.values()) == 16
    if method == "lora":
        assert {options.scale for options in found.values()} == {2.0}


def test_a_picture_lies_as_its_camera_was_held(place: Path) -> None:
    upright = Image.new("RGB", (16, 16))
    upright.paste((255, 255, 255), (0, 0, 16, 4))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    (place / "turned" / "a").mkdir(parents=True)
    (place / "turned" / "b").mkdir()
    upright.save(place / "turned" / "a" / "0.png")
    upright.rotate(180).save(place / "turned" / "b" / "0.png", exif=exif)
    _, reader, inputs = read(place, data={"train": "turned", "validation": None, "test": None})
    one, other = TASK.collator(reader)([inputs.rows[0], inputs.rows[1]])["pixel_values"]
    torch.testing.assert_close(one, other)


def test_a_head_for_the_same_labels_is_kept_and_another_is_drawn_by_the_seed(place: Path) -> None:
    from trimtab.models.load import load_model

    lines = [{"image": f"train/red/{at}.png", "label": label} for at, label in enumerate(("ship", "cat", "dog") * 2)]
    (place / "same.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    job, _, inputs = read(place, data={"train": "same.jsonl", "validation": None, "test": None})
    assert inputs.choices == ["cat", "dog", "ship"]  # as the model has them
    own: Any = load_model(job.read_for(TASK.head_for(job, inputs)).source)
    stored: Any = load_model(job.source)
    torch.testing.assert_close(own.classifier.weight, stored.classifier.weight)
    heads = []
    for seed in (0, 0, 1):
        job, _, inputs = read(place, train={"seed": seed})
        model: Any = load_model(job.read_for(TASK.head_for(job, inputs)).source)
        assert model.config.id2label == {0: "blue", 1: "red"}
        heads.append(model.classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_of_a_model_of_pictures_and_texts_only_the_classifier_is_drawn(place: Path, kind: str) -> None:
    import transformers

    from trimtab.models.load import load_model

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    pictures = {**sizes, "image_size": 16, "patch_size": 8}
    texts = {**sizes, "vocab_size": 40, "max_position_embeddings": 8}
    torch.manual_seed(0)
    whole = getattr(transformers, f"{kind}Config")(vision_config=pictures, text_config=texts)
    both = getattr(transformers, f"{kind}Model")(whole)
    both.save_pretrained(place / kind)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(place / kind)

    job, _, inputs = read(place, model=str(place / kind))
    model: Any = load_model(job.read_for(TASK.head_for(job, inputs)).source)
    theirs = both.vision_model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.vision_model.state_dict().items())
    folder = finetune(config(place, kind, train={"max_steps": 1, "batch_size": 4, "precision": "float32"}))
    trained = read_adapter(folder.adapter)
    assert {name for name, one in trained.items() if one.method == "full"} == {"classifier"}
    notes = " ".join(folder.read_summary().notes)
    # SigLIP sums a picture up by a head of its own, of which its classifier makes no use.
    reached = "no step reached" not in notes
    assert reached == (kind == "CLIP")
    assert reached or "of the adapted modules, the first of them vision_model.head." in notes


def test_a_processor_that_cuts_pictures_into_pieces_is_refused_in_words(place: Path) -> None:
    from trimtab.tasks.image_classification import _processed

    def cutting(**_: Any) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.zeros(1, 16, 48)}

    with pytest.raises(ModelError, match=r"cuts a picture into pieces of the shape \[16, 48\]"):
        _processed([], cutting)


def test_a_processor_of_grey_pictures_is_refused_in_words() -> None:
    from transformers import ViTImageProcessor

    from trimtab.tasks.image_classification import _processed

    grey = ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.5], image_std=[0.5])
    with pytest.raises(ModelError, match="does not take pictures of three channels"):
        _processed([picture("red", 0)], grey)


def test_memory_is_counted_for_pictures(place: Path) -> None:
    job, _, inputs = read(place)
    sizes = TASK.sizes(job, inputs)
    assert sizes.shape == (3, 16, 16)
    assert estimate_run(job, sizes).uncounted is None


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            {"image": "train/red/99.png", "label": "red"},
            "no picture .*99.png; a path starts from the",
        ),
        ({"image": "notes.png", "label": "red"}, "notes.png cannot be read as a picture"),
        ({"image": 3, "label": "red"}, "expected the path of a picture under 'image', got int"),
        ({"label": "red"}, "expected the path of a picture under 'image', got nothing"),
        ({"image": "train/red/0.png"}, "expected a label under 'label'"),
        ({"image": "train/red/0.png", "label": 0.5}, "expected a label under 'label', a word or a whole number"),
    ],
)
def test_what_is_no_labelled_picture_is_refused(place: Path, line: Any, told: str) -> None:
    (place / "notes.png").write_text("a letter", "utf-8")
    (place / "bad.jsonl").write_text(json.dumps(line) + "\n", "utf-8")
    with pytest.raises(DataError, match=rf"bad.jsonl, line 1: .*{told}"):
        read(place, data={"train": "bad.jsonl"})


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "tiff"])
def test_a_picture_that_is_cut_off_is_told_by_its_row_before_anything_is_trained(place: Path, ending: str) -> None:
    pixels = torch.randint(0, 255, (24, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    file = place / f"train/red/cut.{ending}"
    Image.fromarray(pixels).save(file)
    read(place)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2 + 8])
    with pytest.raises(DataError, match=rf"red/cut\.{ending} cannot be read as a picture"):
        read(place)


def test_what_is_no_row_in_a_folder_of_labels_is_told_or_hidden(place: Path) -> None:
    for name in ("red/.hidden.png", ".cache/a.png", "red/notes.txt", "red/deep/9.PNG", "loose.png", "red/a.heic"):
        (place / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        picture("red", 1).save(place / "train" / name, "png")
    (place / "train/none").mkdir()
    _, _, inputs = read(place)
    assert inputs.choices == ["blue", "red"]
    assert len(inputs.rows) == 17
    told = "\n".join(inputs.notes)
    assert "loose.png is in no folder of a label" in told
    assert "2 files, the first red/a.heic, are not among the rows" in told
    assert "no picture in the folder none" in told
    assert "hidden" not in told


def test_a_folder_of_parts_is_no_folder_of_labels(place: Path) -> None:
    (place / "all").mkdir()
    (place / "train").rename(place / "all/train")
    (place / "all/val/red").mkdir(parents=True)
    with pytest.raises(DataError, match=r"folders train, val, which are parts of a data set and no labels"):
        read(place, data={"train": "all"})


def test_pictures_without_a_folder_for_each_label_are_refused_with_what_to_do(place: Path) -> None:
    with pytest.raises(DataError, match="pictures that have no label: put them into a folder for each label"):
        read(place, data={"train": "train/red"})


def test_a_picture_too_large_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.data.pictures.MOST_PIXELS", 100)
    with pytest.raises(DataError, match=r"has 20 x 24 pixels; 100 at most are read"):
        read(place)


def test_trials_of_learning_rates_leave_batch_norms_as_they_were(place: Path) -> None:
    """Else each trial would begin where the one before it ended, and the run after all of them."""
    write_resnet(place / "resnet")
    plan = [{"match": "*convolution", "method": "lora", "rank": 2}]
    said = config(place, "resnet", plan=plan, train={"learning_rate": "auto"}, data={"validation": None, "test": None})
    job, inputs = tasks.inputs_of(tasks.job_of(said), Listener())
    model = Work(job, inputs, Listener()).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    search = _Search(job, inputs, model, listener=Listener(), rows=0)
    losses = [search.trial(1e-3, 1, 2).loss for _ in range(2)]
    assert losses[0] == losses[1]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
