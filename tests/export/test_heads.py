"""Runs with a head of their own, handed over: what transformers, PEFT and sentence-transformers read of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from run_fixtures import make_bare
from tiny_encoders import write_encoder, write_roberta
from tiny_runs import labelled, write_config, write_model, write_rows
from trimtab.config.read import load_config
from trimtab.files import write_json
from trimtab.runs.load import load_run
from trimtab.training.run import finetune

LORA = [{"match": "all-linear", "method": "lora", "rank": 4}]
DORA = [{"match": "all-linear", "method": "dora", "rank": 4}]
MORA = [{"match": "all-linear", "method": "mora", "rank": 4}]
DENSE = [{"match": ["*.query", "*.dense"], "method": "lora", "rank": 4}]
TEXT = labelled(1)[0]["text"]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A run on labelled rows of an encoder (``masked``: whose files have no pooler) or a causal model."""
    root = tmp_path_factory.mktemp("heads")
    models = {
        "masked": lambda: write_encoder(root / "masked", kind="BertForMaskedLM"),
        "bert": lambda: write_encoder(root / "bert"),
        "roberta": lambda: write_roberta(root / "roberta"),
        "llama": lambda: write_model(root / "llama"),
    }
    made: dict[str, Path] = {}

    def run(model: str, plan: list[dict[str, Any]], **sections: Any) -> Path:
        name = f"{model}-{plan[0]['method']}-{len(plan[0]['match'])}-{'-'.join(sections)}"
        if name not in made:
            base = root / model if (root / model).is_dir() else models[model]()
            if model == "bert":
                sentence_transformers(base)
            rows = write_rows(root / "train.jsonl", labelled(18))
            tests = write_rows(root / "flags.jsonl", labelled(6))
            data = {"train": str(rows), "validation": None, "test": {"flags": str(tests)}}
            said = {"data": data, "plan": plan, "task": "sequence_classification", "train": {"epochs": 2}}
            yaml = write_config(root / f"{name}.yaml", base, rows, **{**said, **sections})
            with pytest.MonkeyPatch.context() as patch:
                make_bare(patch)
                made[name] = finetune(load_config(yaml)).path
        return made[name]

    return run


def sentence_transformers(folder: Path) -> None:
    """Make a model of sentence-transformers of an encoder: the files that it writes beside the encoder's."""
    modules = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (path, kind) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling")])
    ]
    write_json(folder / "modules.json", modules)
    write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"})
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 48})
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True})


def logits(model: Any, reader: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**reader(TEXT, return_tensors="pt")).logits
    return found


@pytest.mark.parametrize(("model", "plan"), [("masked", DORA), ("roberta", LORA), ("llama", MORA)])
def test_a_merged_run_is_a_pipeline_whose_labels_have_names(
    cli: Any, train: Callable[..., Path], tmp_path: Path, model: str, plan: list[dict[str, Any]]
) -> None:
    run, out = train(model, plan), tmp_path / "out"
    result = cli("merge", run, out)
    assert result.code == 0, result.err
    assert "6 rows of flags: logits differ by" in result.out
    assert "the likeliest answer is the same for 100 % of them" in result.out
    loaded = load_run(run)
    wanted = logits(loaded.model, loaded.reader)
    plain = AutoModelForSequenceClassification.from_pretrained(out)
    torch.testing.assert_close(logits(plain, AutoTokenizer.from_pretrained(out)), wanted, rtol=1e-4, atol=1e-4)
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == {"0": "calm", "1": "storm", "2": "watch"}
    assert config["label2id"] == {"calm": 0, "storm": 1, "watch": 2}
    assert config["problem_type"] == "single_label_classification"
    said = {one["label"]: one["score"] for one in pipeline("text-classification", str(out), top_k=None)([TEXT])[0]}
    shares = wanted[0].softmax(-1).tolist()
    assert said == pytest.approx(dict(zip(("calm", "storm", "watch"), shares, strict=True)), abs=1e-4)
    assert 'pipeline("text-classification", "THIS_FOLDER")' in (out / "README.md").read_text("utf-8")

    evaluated = cli("evaluate", out, "--data", tmp_path.parent / "none.jsonl")
    assert evaluated.code == 1
    assert json.loads(cli("predict", out, TEXT, "--jsonl").out)["label"] in config["label2id"]


@pytest.mark.parametrize(
    ("model", "plan"),
    [
        ("masked", LORA),
        ("masked", DORA),
        ("masked", DENSE),  # which names the pooler, too, that its files lack
        ("roberta", DORA),
        ("roberta", DENSE),  # which names a layer of the head, too
        ("llama", DORA),
        ("bert", LORA),
    ],
)
def test_the_adapter_of_a_run_is_one_that_peft_reads(
    train: Callable[..., Path], model: str, plan: list[dict[str, Any]]
) -> None:
    run = train(model, plan)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    loaded = load_run(run)
    base = AutoModelForSequenceClassification.from_pretrained(loaded.config.model.name, num_labels=3)
    base.config.pad_token_id = loaded.model.config.pad_token_id
    theirs = PeftModel.from_pretrained(base, run / "adapter")
    torch.testing.assert_close(logits(theirs, loaded.reader), logits(loaded.model, loaded.reader), rtol=1e-4, atol=1e-4)


def test_exported_as_lora_the_head_stays_whole(cli: Any, train: Callable[..., Path], tmp_path: Path) -> None:
    run, out = train("masked", DORA), tmp_path / "out"
    result = cli("export", run, out, "--to", "lora", "--rank", "32")
    assert result.code == 0, result.err
    with safe_open(out / "adapter_model.safetensors", "pt") as file:
        heads = [name for name in file.keys() if "classifier" in name]  # noqa: SIM118
    assert heads == ["base_model.model.classifier.bias", "base_model.model.classifier.weight"]
    loaded = load_run(run)
    base = AutoModelForSequenceClassification.from_pretrained(loaded.config.model.name, num_labels=3)
    theirs = PeftModel.from_pretrained(base, out)
    torch.testing.assert_close(logits(theirs, loaded.reader), logits(loaded.model, loaded.reader), rtol=1e-3, atol=1e-3)
    assert json.loads(cli("predict", loaded.config.model.name, TEXT, "--adapter", out, "--jsonl").out)["label"]
    for form in ("gguf", "mlx"):
        refused = cli("export", run, tmp_path / form, "--to", form)
        assert (refused.code, "this run trained a model for SequenceClassification" in refused.err) == (1, True)


def test_what_sentence_transformers_needs_goes_along(cli: Any, train: Callable[..., Path], tmp_path: Path) -> None:
    run, out = train("bert", LORA), tmp_path / "out"
    assert cli("merge", run, out).code == 0
    assert [one["path"] for one in json.loads((out / "modules.json").read_text())] == ["", "1_Pooling"]
    assert json.loads((out / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"]
    loaded = load_run(run)
    ids = loaded.reader(TEXT, return_tensors="pt")
    with torch.no_grad():
        tuned = loaded.model.bert(**ids).last_hidden_state
        encoder = AutoModel.from_pretrained(out)(**ids).last_hidden_state  # what sentence-transformers pools
    torch.testing.assert_close(encoder, tuned, rtol=1e-4, atol=1e-4)


def test_a_list_of_modules_that_are_not_there_is_left_out(cli: Any, train: Callable[..., Path], tmp_path: Path) -> None:
    run = train("bert", LORA)
    base = Path(load_run(run).config.model.name)
    write_json(base / "modules.json", [{"path": ""}, {"path": "../elsewhere"}])
    try:
        result = cli("merge", run, tmp_path / "out")
    finally:
        sentence_transformers(base)
    assert "so the files for sentence-transformers are not carried along" in result.out
    assert not (tmp_path / "out" / "modules.json").exists()


def test_heads_of_other_labels_are_not_combined(cli: Any, train: Callable[..., Path], tmp_path: Path) -> None:
    one = train("masked", LORA)
    other = train("masked", LORA, data={"choices": ["watch", "storm", "calm"]})
    refused = cli("combine", f"{one}:0.5", f"{other}:0.5", "--out", tmp_path / "both")
    assert refused.code == 1
    assert "the heads of the adapters have different labels" in " ".join(refused.err.split())
    assert not (tmp_path / "both").exists()
