"""``model.add_tokens``: tokens of a run's own, from its YAML to the merged folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from command_line import Result
from tiny_runs import rows, tiny_tokenizer, write_model, write_rows
from trimtab.config.read import load_config
from trimtab.config.resolve import Job
from trimtab.errors import ConfigError
from trimtab.memory.estimate import estimate_run
from trimtab.runs.load import load_run
from trimtab.tasks import RowSizes
from trimtab.training.run import finetune

pytestmark = pytest.mark.usefixtures("bare_runs")

TOKENS = ["<tool>", "</tool>"]
OLD = len(tiny_tokenizer())
IDS = torch.tensor([[5, OLD, OLD + 1, 7, OLD, 33]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
        return found


@pytest.fixture
def train_file(tmp_path: Path) -> Path:
    found = rows(16)
    for row in found:
        row["completion"] = f"<tool>{row['completion']}</tool>"
    return write_rows(tmp_path / "tools.jsonl", found)


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_with_new_tokens(
    tied: bool, make_yaml: Callable[..., Path], train_file: Path, tmp_path: Path, cli: Callable[..., Result]
) -> None:
    base = write_model(tmp_path / "base", tie_word_embeddings=tied)
    before = AutoModelForCausalLM.from_pretrained(base)
    yaml = make_yaml(
        model={"name": str(base), "add_tokens": TOKENS},
        data={"train": str(train_file), "choices": None},
        plan=[{"match": "*.q_proj", "method": "lora", "rank": 2}],
    )
    config = load_config(yaml)
    folder = finetune(config)
    plan = json.loads(folder.plan.read_text())
    assert plan["rules"][-1]["options"] == {"rows": [OLD, OLD + 1]}
    updates = 2 * 2 * (32 + 32)
    assert plan["trainable_parameters"] == updates + (1 if tied else 2) * 2 * 32
    assert (
        estimate_run(Job.of(config), RowSizes(length=40, labels=8)).attached.counts["trainable"]
        == (plan["trainable_parameters"])
    )

    loaded = load_run(folder.path)
    assert loaded.reader.tokenize("a<tool>b") == ["a", "<tool>", "b"]
    weight = loaded.model.get_input_embeddings().weight + 0
    assert len(weight) == OLD + 2
    assert torch.equal(weight[:OLD], before.get_input_embeddings().weight)
    untrained = load_run(folder.path, adapter=False).model.get_input_embeddings().weight
    assert not torch.equal(weight[OLD:], untrained[OLD:])
    again = load_run(folder.path, adapter=False).model.get_input_embeddings().weight
    assert torch.equal(untrained, again), "the new rows begin alike at every load"
    assert AutoTokenizer.from_pretrained(folder.adapter).convert_tokens_to_ids(TOKENS) == [OLD, OLD + 1]

    if not tied:  # the card's code makes room for the new rows
        assert cli("export", str(folder.path), "lora", "--to", "lora").code == 0
        code = (Path("lora") / "README.md").read_text().partition("```python")[2].partition("```")[0]
        pasted: dict[str, Any] = {}
        exec(
            code.replace("THIS_FOLDER", "lora").replace('from_pretrained("base")', f"from_pretrained({str(base)!r})"),
            pasted,
        )
        torch.testing.assert_close(logits(pasted["model"].eval()), logits(loaded.model), rtol=1e-5, atol=1e-5)

    out = tmp_path / "merged"
    assert cli("merge", str(folder.path), str(out)).code == 0
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.config.vocab_size == OLD + 2
    torch.testing.assert_close(logits(merged), logits(loaded.model), rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids(TOKENS) == [OLD, OLD + 1]
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    assert cli("evaluate", str(folder.path), "--data", str(train_file)).code == 0
    assert cli("generate", str(folder.path), "Message: wind").code == 0


@pytest.mark.parametrize("value", [["<a>", "<a>"], [""], [3], {"<a>": 1}])
def test_what_are_no_tokens(value: Any, make_yaml: Callable[..., Path], model_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"add_tokens.*expected"):
        load_config(make_yaml(model={"name": str(model_folder), "add_tokens": value}))
