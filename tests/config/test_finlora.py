"""FinLoRA's configuration file: every key, every mistake, and where its paths lead."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from source_paths import paths
from trimtab.config.finlora import Entry, check_entry, load_finlora, read_entries
from trimtab.errors import ConfigError

PLAIN = {"base_model": "owner/model", "dataset_path": "rows.jsonl", "quant_bits": 32}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file with the run ``mine``: ``PLAIN`` with changes; None takes a key away."""

    def make(**changes: Any) -> Path:
        (tmp_path / "lora").mkdir(exist_ok=True)
        path = tmp_path / "lora" / "finetune_configs.json"
        entry = {key: value for key, value in {**PLAIN, **changes}.items() if value is not None}
        path.write_text(json.dumps({"mine": entry, "other": PLAIN}))
        return path

    return make


def test_what_is_not_said_is_as_in_its_template(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = load_finlora(write(), "mine")
    assert found.model.name == "owner/model"
    assert found.data.validation == 0.02
    assert found.data.max_length == 4096
    (rule,) = found.plan
    assert rule == {
        "match": ["*.q_proj", "*.k_proj", "*.v_proj"],
        "method": "lora",
        "rank": 8,
        "alpha": 16,
        "rank_stabilised": False,
        "dropout": 0.05,
    }
    train = found.train
    assert (train.learning_rate, train.epochs, train.batch_size, train.gradient_accumulation) == (2e-4, 4, 2, 4)
    assert (train.schedule, train.warmup, train.weight_decay, train.keep_best) == ("cosine", 10, 0, False)
    assert found.output == tmp_path / "lora_adapters" / "32bits_r8" / "mine"


def test_every_key(write: Write) -> None:
    said = {
        "base_model": "owner/other",
        "lora_r": 4,
        "lora_alpha": 6,
        "learning_rate": 1e-3,
        "num_epochs": 2,
        "batch_size": 5,
        "gradient_accumulation_steps": 3,
        "peft_use_dora": True,
        "peft_use_rslora": True,
        "dataset_path": "owner/rows",
        "quant_bits": 16,
    }
    assert set(said) == set(Entry.model_fields)
    found = load_finlora(write(**said), "mine")
    (rule,) = found.plan
    assert (rule["method"], rule["rank"], rule["alpha"], rule["rank_stabilised"]) == ("dora", 4, 6, True)
    train = found.train
    assert (train.learning_rate, train.epochs, train.batch_size, train.gradient_accumulation) == (1e-3, 2, 5, 3)
    assert (found.model.name, paths(found.data.train), train.precision) == ("owner/other", ("owner/rows",), "bfloat16")
    assert load_finlora(write(quant_bits=32), "mine").train.precision == "float32"


@pytest.mark.parametrize(("bits", "kind"), [(4, "nf4"), (8, "int8"), (16, None), (32, None)])
def test_bits_are_a_kind_of_quantisation(bits: Any, kind: str | None) -> None:
    said = Entry(**{**PLAIN, "quant_bits": bits}).to_run("mine")
    assert said.get("quantisation") == kind
    assert (said["train"]["precision"] == "auto") == (kind is not None)


@pytest.mark.parametrize(("bits", "kind"), [(4, "nf4"), (8, "int8"), (16, "none"), (32, "none")])
def test_a_run_is_quantised(write: Write, bits: int, kind: str) -> None:
    found: Any = load_finlora(write(quant_bits=bits), "mine")
    assert found.quantisation == kind


@pytest.mark.parametrize(
    ("said", "folder"),
    [
        ({"quant_bits": 8}, "8bits_r8"),
        ({"quant_bits": 8, "peft_use_dora": True}, "8bits_r8_dora"),
        ({"quant_bits": 8, "peft_use_rslora": True}, "8bits_r8_rslora"),
        ({"quant_bits": 4, "lora_r": 4}, "4bits_r4"),
        ({"quant_bits": 16, "peft_use_dora": True, "peft_use_rslora": True}, "16bits_r8_dora_rslora"),
        ({"quant_bits": 32, "lora_r": 16, "peft_use_dora": False}, "32bits_r16"),
    ],
)
def test_the_names_of_folders(said: dict[str, Any], folder: str) -> None:
    entry = Entry(**{**PLAIN, **said})
    assert entry.variant == folder
    assert entry.to_run("mine")["output"] == f"lora_adapters/{folder}/mine"


def test_paths_are_relative_to_the_file(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = write(base_model="../models/tiny", dataset_path="../data/rows.jsonl")
    for folder in (tmp_path, elsewhere):
        monkeypatch.chdir(folder)
        found = load_finlora(path, "mine")
        assert found.model.name == str(tmp_path / "models" / "tiny")
        assert paths(found.data.train) == (str(tmp_path / "data" / "rows.jsonl"),)
    monkeypatch.chdir(path.parent)
    assert load_finlora(Path(path.name), "mine").data == found.data


def test_overrides_are_in_our_words(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = ["model=smollm2-135m", "train.epochs=1", "plan.0.rank=2", "data.test=t.jsonl", "output=here"]
    found = load_finlora(write(quant_bits=16), "mine", said)
    assert (found.model.name, found.train.epochs, found.plan[0]["rank"]) == ("smollm2-135m", 1, 2)
    assert found.train.precision == "bfloat16"
    assert paths(found.data.test) == {"t": str(tmp_path / "t.jsonl")}
    assert found.output == tmp_path / "here"
    with pytest.raises(ConfigError, match=r"command line: learning_rate: unknown key.*'train\.learning_rate'"):
        load_finlora(write(), "mine", ["learning_rate=1e-3"])


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"dataset_path": None}, r"mine: dataset_path: missing\. The training rows"),
        ({"base_model": None}, r"mine: base_model: missing"),
        ({"quant_bits": None}, r"mine: quant_bits: missing"),
        ({"quant_bits": 5}, r"mine: quant_bits: expected 4, 8, 16 or 32, got 5"),
        ({"quant_bits": "8"}, r'mine: quant_bits: expected 4, 8, 16 or 32, got "8"'),
        ({"lora_rank": 8}, r"mine: lora_rank: unknown key\. Did you mean 'lora_r'\?"),
        ({"per_device_batch_size": 8}, r"unknown key\. Did you mean 'batch_size'\?"),
        ({"num_epochs": 0}, r"num_epochs: expected more than 0, got 0"),
        ({"learning_rate": "1e-4"}, r'learning_rate: expected a number, got "1e-4"'),
        ({"peft_use_dora": "yes"}, r"peft_use_dora: expected true or false"),
        ({"lora_r": 2.5}, r"lora_r: expected a whole number, got 2\.5"),
    ],
)
def test_mistakes_in_an_entry(write: Write, said: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_finlora(write(**said), "mine")
    assert str(caught.value).startswith(str(write()))


def test_several_mistakes_at_once(write: Write) -> None:
    with pytest.raises(ConfigError) as caught:
        load_finlora(write(quant_bits=5, lora_rr=1), "mine")
    assert len(str(caught.value).splitlines()) == 2


def test_an_unknown_run(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"no run 'mime'\. Did you mean 'mine'\? Its runs: mine, other\."):
        load_finlora(write(), "mime")


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "_x"])
def test_a_name_that_is_no_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="begin it with a letter"):
        check_entry(tmp_path, name, PLAIN)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected a JSON object of run names"),
        ("[1]", "expected a JSON object, got list"),
        ("{}", "no run in it"),
        ('{"a": {}, "a": {}}', "stands twice"),
        ('{"mine": 3}', r"mine: expected a JSON object of settings, got 3"),
        ("\xff", "expected a JSON object of run names"),
    ],
)
def test_a_file_that_is_something_else(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "finetune_configs.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=message):
        load_finlora(path, "mine")


def test_a_missing_file(write: Write) -> None:
    path = write()
    with pytest.raises(ConfigError, match=r"no such file\. Did you mean 'finetune_configs\.json'"):
        read_entries(path.with_name("finetune_config.json"))


SHIPPED = Path(__file__).resolve().parents[2] / "studies" / "finlora" / "finetune_configs.json"


def test_the_shipped_file() -> None:
    """Each run is named after its folder, and its rows are those of the finance data beside the repository."""
    entries = {name: check_entry(SHIPPED, name, said) for name, said in read_entries(SHIPPED).items()}
    variants = {
        "8bits_r8",
        "4bits_r4",
        "8bits_r8_dora",
        "8bits_r8_rslora",
        "4bits_r4_dora",
        "16bits_r8",
        "16bits_r8_dora",
    }
    assert {entry.variant for entry in entries.values()} == variants
    assert len(entries) == 2 * len(variants)
    for name, entry in entries.items():
        data = name.split("_")[0]
        assert name == f"{data}_smollm2_135m_{entry.variant}"
        assert entry.dataset_path == f"../../../shared/data/finance/{data}_train.jsonl"
    found = load_finlora(SHIPPED, "fpb_smollm2_135m_16bits_r8")
    assert paths(found.data.train) == (
        str((SHIPPED.parents[3] / "shared" / "data" / "finance").resolve() / "fpb_train.jsonl"),
    )
