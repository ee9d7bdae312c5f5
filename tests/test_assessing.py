"""``trimtab evaluate`` of a bare model and of adapters into one folder: what each result is of, and that all stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tiny_runs import rows, tiny_model, tiny_tokenizer, write_model, write_rows
from trimtab.adapters.store import save_adapter
from trimtab.assessing import measure
from trimtab.errors import ModelError
from trimtab.files import read_json, read_jsonl
from trimtab.models.locate import locate
from trimtab.models.model_files import load_tokenizer
from trimtab.runs.load import with_tokens_of
from trimtab.surgery.attach import attach
from trimtab.surgery.plan import Plan, Rule


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and the adapters ``fog`` and ``tide`` of it."""
    root = tmp_path_factory.mktemp("models")
    write_model(root / "base")
    for name in ("fog", "tide"):
        model = tiny_model()
        attach(model, Plan([Rule(match="*.q_proj", method="lora", rank=2, alpha=4)]))
        save_adapter(model, root / name)
    return root


def found(out: Path) -> dict[str, tuple[Any, ...]]:
    """Name of each file of results -> what it is of."""
    results = {file.name: read_json(file) for file in (out / "evaluation").iterdir()}
    return {name: (said["model"], said.get("adapter"), said["source"]) for name, said in results.items()}


def test_results_of_a_model_and_of_two_adapters_stand_side_by_side(models: Path, tmp_path: Path) -> None:
    base, file, out = str(models / "base"), str(write_rows(tmp_path / "flags.jsonl", rows(6))), tmp_path / "out"
    for adapter in (None, models / "fog", models / "tide", models / "fog"):  # the last one once more
        measure(base, [file], adapter=adapter, out=out, limit=3)
    assert found(out) == {
        "flags.before.json": (base, None, file),
        "flags.after.json": (base, str(models / "fog"), file),
        "flags-tide.after.json": (base, str(models / "tide"), file),
    }
    assert {path.name for path in (out / "predictions").iterdir()} == {
        name.replace(".json", ".jsonl") for name in found(out)
    }

    (tmp_path / "other").mkdir()
    other = str(write_rows(tmp_path / "other" / "flags.jsonl", rows(3)))
    for _ in range(2):
        measure(base, [other], out=out, limit=3)
    assert found(out)["flags-base.before.json"] == (base, None, other)
    assert len(found(out)) == 4


def test_a_damaged_result_is_not_replaced(models: Path, tmp_path: Path) -> None:
    file, out = str(write_rows(tmp_path / "flags.jsonl", rows(6))), tmp_path / "out"
    (out / "evaluation").mkdir(parents=True)
    (out / "evaluation" / "flags.before.json").write_text("{")
    measure(str(models / "base"), [file], out=out, limit=3)
    assert (out / "evaluation" / "flags.before.json").read_text() == "{"
    assert read_json(out / "evaluation" / "flags-base.before.json")["rows"] == 3


def test_rows_that_are_cut_are_counted_in_the_result(models: Path, tmp_path: Path) -> None:
    long = {"prompt": "the crane is free again " * 90, "completion": "calm and clear"}
    wide = {"prompt": "fog", "completion": "a tug " * 300}
    file = write_rows(tmp_path / "long.jsonl", [*rows(4, "open"), long, wide])
    _, (record,) = measure(str(models / "base"), [str(file)], max_new_tokens=4, out=tmp_path)
    assert (record.rows, record.cut, record.left_out) == (6, 1, 1)
    assert read_json(tmp_path / "evaluation" / "long.before.json")["cut"] == 1
    assert len(list(read_jsonl(tmp_path / "predictions" / "long.before.jsonl"))) == 6


def test_an_adapter_brings_the_tokens_and_the_template_that_it_was_trained_on(models: Path) -> None:
    adapter = models / "tide"
    tokenizer = tiny_tokenizer("{% for m in messages %}{{ m.content + '<|eos|>' }}{% endfor %}")
    tokenizer.add_tokens(["<crane>", "<berth>"])
    tokenizer.save_pretrained(adapter)
    source = with_tokens_of(adapter, locate(str(models / "base")))
    assert (source.add_tokens, source.chat_template) == (("<crane>", "<berth>"), tokenizer.chat_template)
    assert load_tokenizer(source).get_vocab() == tokenizer.get_vocab()
    assert with_tokens_of(models / "fog", locate(str(models / "base"))) == locate(str(models / "base"))


def test_a_token_that_the_model_does_not_have_is_an_error(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tiny_model(len(tokenizer)).save_pretrained(tmp_path / "short")
    tokenizer.add_tokens(["<crane>"])
    tokenizer.save_pretrained(tmp_path / "short")
    file = write_rows(tmp_path / "r.jsonl", [{"prompt": "the <crane> is", "completion": " free"}] * 2)
    with pytest.raises(ModelError, match=r"<crane> \(token 341\)"):
        measure(str(tmp_path / "short"), [str(file)], out=tmp_path)
