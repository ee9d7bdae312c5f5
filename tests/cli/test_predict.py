"""``trimtab predict`` and ``trimtab evaluate`` of what was trained with a head of its own, and what other verbs say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from run_fixtures import make_bare
from tiny_encoders import word_pieces, write_encoder
from tiny_runs import labelled, write_config, write_rows
from trimtab.adapters.store import load_adapter
from trimtab.assessing import measure
from trimtab.config.read import load_config
from trimtab.errors import AdapterError, ConfigError, DataError, ModelError
from trimtab.files import read_json
from trimtab.predicting import Predictor
from trimtab.runs.folder import RunFolder
from trimtab.runs.load import load_run
from trimtab.runs.named import Named
from trimtab.training.run import finetune


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunFolder]:
    """A run on labelled rows; with ``several``, of several labels each. It has the test set ``flags``."""
    root = tmp_path_factory.mktemp("heads")
    encoder = write_encoder(root / "encoder", kind="BertForMaskedLM")
    done: dict[str, RunFolder] = {}

    def run(name: str, *, several: bool = False, **sections: Any) -> RunFolder:
        if name not in done:
            rows = write_rows(root / f"{name}.jsonl", labelled(24, several=several))
            tests = write_rows(root / "flags.jsonl", labelled(9, several=several))
            data = {"train": str(rows), "validation": None, "test": {"flags": str(tests)}, **sections.pop("data", {})}
            yaml = write_config(
                root / f"{name}.yaml", encoder, rows, **{"data": data, "train": {"epochs": 4}, **sections}
            )
            with pytest.MonkeyPatch.context() as patch:
                make_bare(patch)
                done[name] = finetune(load_config(yaml))
        return done[name]

    return run


@pytest.fixture(scope="module")
def one(train: Callable[..., RunFolder]) -> RunFolder:
    return train("one")


def probabilities(run: Path, text: str) -> torch.Tensor:
    """The softmax of the run's head, by transformers alone around the loaded model."""
    loaded = load_run(run)
    with torch.no_grad():
        logits = loaded.model(**loaded.reader(text, return_tensors="pt")).logits
    return logits[0].double().softmax(-1)


def answers(named: Named, *texts: str, **settings: Any) -> list[dict[str, Any]]:
    predictor = Predictor(named, **settings)
    return [dict(answer.fields) for _, answer in predictor.answers(map(predictor.row, texts))]


# predict


def test_a_text_gets_its_label_and_the_probabilities_of_all(cli: Any, one: RunFolder) -> None:
    text = labelled(1)[0]["text"]
    wanted = probabilities(one.path, text)
    found = json.loads(cli("predict", one.path, text, "--jsonl").out)
    assert list(found) == ["text", "label", "probabilities"]
    assert list(found["probabilities"]) == ["calm", "storm", "watch"]
    assert list(found["probabilities"].values()) == pytest.approx(wanted.tolist(), abs=1e-5)
    assert found["label"] == ["calm", "storm", "watch"][int(wanted.argmax())]
    shown = cli("predict", one.path, "-", stdin=text + "\n").out
    assert shown.startswith(f"{found['label']} ({float(wanted.max()):.1%}), ")


def test_rows_of_a_file_keep_their_keys_and_lose_their_label(cli: Any, one: RunFolder, tmp_path: Path) -> None:
    rows = [{"id": at, **row} for at, row in enumerate(labelled(7))]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    lines = [json.loads(line) for line in cli("predict", one.path, "--file", file, "--jsonl").out.splitlines()]
    assert [line["id"] for line in lines] == list(range(7))
    (tmp_path / "lines.txt").write_text("\n\n".join(row["text"].replace("\n", " ") for row in rows), "utf-8")
    plain = cli("predict", one.path, "--file", tmp_path / "lines.txt")
    assert (len(plain.out.splitlines()), len(plain.err.splitlines())) == (7, 7)


def test_a_text_that_is_not_read_to_its_end_is_told(cli: Any, one: RunFolder) -> None:
    told = cli("predict", one.path, "calm " * 100, "fog")
    assert told.code == 0
    assert "note: 1 row longer than the model reads, and cut to that" in told.err


def test_a_model_of_numbers_that_others_saved_is_asked_in_float32(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "numbers", kind="BertForSequenceClassification", num_labels=1)
    assert Named.find(str(folder)).load().dtype == torch.float32


def test_answers_do_not_depend_on_the_batch(one: RunFolder) -> None:
    texts = [row["text"] for row in labelled(5)]
    named = Named.find(str(one.path))
    alone, together = answers(named, *texts, batch_size=1), answers(named, *texts, batch_size=4)
    for first, second in zip(alone, together, strict=True):
        assert first["label"] == second["label"]
        assert first["probabilities"] == pytest.approx(second["probabilities"], abs=1e-5)


def test_several_labels_are_those_at_least_as_likely_as_not(train: Callable[..., RunFolder]) -> None:
    run = train("several", several=True)
    (found,) = answers(Named.find(str(run.path)), labelled(1)[0]["text"])
    assert list(found["probabilities"]) == ["calm", "short", "storm", "watch"]
    assert found["labels"] == [label for label, share in found["probabilities"].items() if share >= 0.5]


def test_a_row_without_a_text_is_named_and_those_before_it_are_answered(
    cli: Any, one: RunFolder, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "fog"}, {"sentence": "calm"}])
    result = cli("predict", one.path, "--file", file, "--jsonl")
    assert result.code == 1
    assert len(result.out.splitlines()) == 1
    assert "line 2: expected a text under 'text', but its keys are" in result.err


def test_verbs_for_models_that_write_name_predict_and_the_other_way_round(
    cli: Any, one: RunFolder, model_folder: Path
) -> None:
    for verb in ("generate", "chat"):
        result = cli(verb, one.path, *(["x"] if verb == "generate" else []))
        assert (result.code, f"trimtab predict {one.path}" in result.err) == (1, True)
    result = cli("predict", model_folder, "x")
    assert (result.code, f"trimtab generate {model_folder}" in result.err) == (1, True)


def test_an_encoder_by_itself_has_nothing_to_answer_with(one: RunFolder) -> None:
    encoder = load_config(one.config).model.name
    with pytest.raises(ModelError, match="an encoder without a head"):
        Named.find(encoder)


def test_a_head_that_the_files_lack_is_never_drawn_to_answer_with(tmp_path: Path) -> None:
    word_pieces().save_pretrained(tmp_path)
    config = BertConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    model = BertForSequenceClassification(config)
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in model.state_dict().items() if "classifier" not in k})
    with pytest.raises(ModelError, match="its files lack classifier, so it has no head"):
        Named.find(str(tmp_path)).load()


# An adapter beside the name of a model


def test_an_adapter_of_ours_brings_its_head_and_its_labels(one: RunFolder) -> None:
    encoder, text = load_config(one.config).model.name, labelled(1)[0]["text"]
    beside = answers(Named.find(encoder, adapter=one.adapter), text)
    of_run = answers(Named.find(str(one.path)), text)
    assert beside[0]["label"] == of_run[0]["label"]
    # The run computes in float32, a model by itself in what suits the machine.
    assert beside[0]["probabilities"] == pytest.approx(of_run[0]["probabilities"], abs=0.03)


def test_an_adapter_that_peft_made_brings_its_head(one: RunFolder, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    encoder = load_config(one.config).model.name
    torch.manual_seed(3)
    base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=4)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["query"], modules_to_save=["pooler", "classifier"]
    )
    theirs = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            if "lora_B" in name:
                tensor.normal_()
    theirs.save_pretrained(tmp_path / "theirs")
    named = Named.find(encoder, adapter=tmp_path / "theirs")
    assert named.head.labels == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")
    ids = torch.tensor([[5, 6, 7, 8]])
    model = named.load().float()
    torch.testing.assert_close(model(ids).logits, theirs(input_ids=ids).logits, atol=0.05, rtol=0.05)

    theirs = peft.get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=4),
        peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]),
    )
    theirs.save_pretrained(tmp_path / "headless")
    with pytest.raises(AdapterError, match=r"it lacks bert\.pooler\.dense, and so does"):
        Named.find(encoder, adapter=tmp_path / "headless").load()


# evaluate


def test_a_run_is_evaluated_to_the_figures_that_it_had(one: RunFolder, tmp_path: Path) -> None:
    before = read_json(one.path / "evaluation" / "flags.after.json")
    file = write_rows(tmp_path / "flags.jsonl", labelled(9))
    _, (record,) = measure(str(one.path), [str(file)], out=tmp_path)
    assert record.figures == pytest.approx({name: before[name] for name in record.figures}, abs=1e-5)
    assert record.kind == "choice"
    _, (bare,) = measure(str(one.path), [str(file)], base=True, out=tmp_path)
    untuned = read_json(one.path / "evaluation" / "flags.before.json")
    assert bare.figures == pytest.approx({name: untuned[name] for name in bare.figures}, abs=1e-5)


def test_a_classifier_that_others_saved_is_evaluated_by_names_or_numbers(tmp_path: Path) -> None:
    word_pieces().save_pretrained(tmp_path / "theirs")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=400,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        initializer_range=0.5,
        id2label={0: "storm", 1: "calm", 2: "watch"},
        label2id={"storm": 0, "calm": 1, "watch": 2},
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "theirs")
    rows = labelled(9)
    named = write_rows(tmp_path / "named.jsonl", rows)
    numbered = write_rows(tmp_path / "n.jsonl", [row | {"label": config.label2id[row["label"]]} for row in rows])
    _, results = measure(str(tmp_path / "theirs"), [str(named), str(numbered)], out=tmp_path)
    assert results[0].figures == results[1].figures
    strange = write_rows(tmp_path / "s.jsonl", [*rows, {"text": "fog", "label": "Calm"}])
    with pytest.raises(DataError, match=r"row 10: the model does not know the label 'Calm'; its labels are storm, "):
        measure(str(tmp_path / "theirs"), [str(strange)], out=tmp_path)


@pytest.mark.parametrize(
    ("said", "option"),
    [
        ({"generate": True}, "--generate"),
        ({"choices": ["a", "b"]}, "--choices"),
        ({"tasks": ["finlora/fpb"]}, "--task"),
    ],
)
def test_options_for_models_that_write_are_refused(one: RunFolder, said: Any, option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option}: .* is a model of sequence_classification"):
        measure(str(one.path), ["rows.jsonl"], **said)


def test_an_adapter_is_read_for_the_labels_that_it_says(one: RunFolder) -> None:
    loaded = load_run(one.path, adapter=False)
    load_adapter(loaded.model, one.adapter)
    assert loaded.model.config.id2label == {0: "calm", 1: "storm", 2: "watch"}
