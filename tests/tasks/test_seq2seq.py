"""Sequence to sequence: the loss is transformers' own, targets are written whatever the batch, a run goes through."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from run_fixtures import make_bare
from tiny_runs import Kept, tiny_tokenizer, write_rows
from tiny_seq2seq import pair_rows, seq2seq_config, write_marking, write_t5
from trimtab import tasks
from trimtab.config.run import EvaluationConfig
from trimtab.data import forms
from trimtab.data.rows import Source
from trimtab.errors import ConfigError, DataError, ModelError
from trimtab.export import Wishes, export_format, hand_over
from trimtab.memory.estimate import estimate_run
from trimtab.models.model_files import load_tokenizer
from trimtab.notes import Notes
from trimtab.predicting import Predictor
from trimtab.runs.load import with_tokens_of
from trimtab.runs.named import Named
from trimtab.runs.read import read_run
from trimtab.tasks.seq2seq import _greedy, _read_before
from trimtab.training.run import finetune

TASK = tasks.find("seq2seq")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_bare(monkeypatch, page=True)
    write_t5(tmp_path / "t5")
    write_rows(tmp_path / "train.jsonl", pair_rows(24))
    return tmp_path


def read(place: Path, **sections: Any) -> tuple[Any, Any, Any]:
    job = tasks.job_of(seq2seq_config(place, **sections))
    reader = load_tokenizer(job.source)
    return job, reader, TASK.read(job, reader, Kept())


def test_an_encoder_with_a_decoder_speaks_for_the_task(place: Path) -> None:
    job, _, inputs = read(place)
    assert job.task == "seq2seq"
    assert job.source.head.model_class == "AutoModelForSeq2SeqLM"
    assert inputs.form == "source_target"


@pytest.mark.parametrize("kind", ["t5", "nllb", "mbart", "blenderbot"])
def test_loss_and_gradients_are_those_of_the_model_itself(place: Path, kind: str) -> None:
    folder = place / "t5" if kind == "t5" else write_marking(place / kind, kind)
    _, reader, inputs = read(place, model=str(folder))
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder).double().eval()
    plain = copy.deepcopy(model)
    batch = TASK.collator(reader)([inputs.rows[at] for at in range(4)])
    loss = TASK.loss(model, batch)
    expected = plain(**batch).loss
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    halves = [TASK.collator(reader)([inputs.rows[at] for at in part]) for part in ((0, 1), (2, 3))]
    count = int((batch["labels"] != -100).sum())
    torch.testing.assert_close(sum(TASK.loss(model, half, count=count) for half in halves), loss, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)


def test_what_is_written_does_not_depend_on_the_batch(place: Path) -> None:
    job, reader, inputs = read(place)
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(place / "t5")
    alone, together = (
        TASK.evaluate(
            model,
            reader,
            inputs.tests["train"],
            tasks.Measurement("t", None, EvaluationConfig(batch_size=size, max_new_tokens=6), job.reading_length),
        )
        for size in (1, 8)
    )
    assert [row.predicted for row in alone.rows] == [row.predicted for row in together.rows]
    assert alone.record.figures == pytest.approx(together.record.figures, rel=1e-5)
    assert {"exact_match", "chrf", "rouge_l", "perplexity"} <= alone.record.figures.keys()


def test_a_run_trains_and_is_measured(place: Path) -> None:
    folder = finetune(seq2seq_config(place, train={"epochs": 4, "learning_rate": 0.02}))
    run = read_run(folder.path)
    assert run.summary is not None
    assert run.summary.task == "seq2seq"
    tokenizer = tiny_tokenizer(None)
    texts = [text for row in pair_rows(24) for text in (row["source"], row["target"])]
    assert run.summary.train_tokens == sum(len(tokenizer(text)["input_ids"]) for text in texts)
    before, after = run.sets[0].before, run.sets[0].after
    assert before is not None
    assert after is not None
    assert after.figures["perplexity"] < before.figures["perplexity"]  # type: ignore[operator]


def test_long_sources_and_targets_are_cut_and_told(place: Path) -> None:
    _, _, inputs = read(place, data={"max_length": 5})
    assert max(len(row["input_ids"]) for row in inputs.rows) == 5
    assert any("cut to data.max_length = 5 tokens" in note for note in inputs.notes)


def test_a_model_that_does_not_say_how_targets_begin_writes_them_as_it_learns_them(place: Path) -> None:
    from transformers import MBartConfig, MBartForConditionalGeneration

    sides = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes = {"vocab_size": 400, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, **sides}
    config = MBartConfig(**sizes, eos_token_id=0, pad_token_id=1, bos_token_id=None, max_position_embeddings=64)
    model: Any = MBartForConditionalGeneration(config).eval()
    assert model.generation_config.decoder_start_token_id is None
    job, reader, inputs = read(place)
    how = tasks.Measurement("test", None, job.config.evaluation, None)
    assert len(TASK.evaluate(model, reader, inputs.tests["train"], how).rows) == 5


def test_a_model_that_hears_is_refused_in_words(place: Path) -> None:
    from transformers import Qwen2VLConfig, WhisperConfig

    for config, told in ((WhisperConfig(), "a whisper writes what it hears"), (Qwen2VLConfig(), "of the kind Qwen2VL")):
        config.save_pretrained(place / "other")
        (place / "other" / "tokenizer.json").write_bytes((place / "t5" / "tokenizer.json").read_bytes())
        (place / "other" / "tokenizer_config.json").write_bytes((place / "t5" / "tokenizer_config.json").read_bytes())
        with pytest.raises((ConfigError, ModelError), match=told):
            _ = tasks.job_of(seq2seq_config(place, model=str(place / "other"))).positions


def test_the_languages_that_a_tokenizer_marks_texts_with_are_told(place: Path) -> None:
    job, reader, inputs = read(place)
    assert not any("marks" in line for line in TASK.held(job, inputs, reader))
    reader.src_lang, reader.tgt_lang = "eng_Latn", None  # as NLLB's has them
    assert any("sources as eng_Latn and targets as eng_Latn" in line for line in TASK.held(job, inputs, reader))


@pytest.mark.parametrize(
    ("kind", "source", "target", "place_of_mark"),
    [("nllb", "fra_Latn", "deu_Latn", 0), ("mbart", "fr_XX", "de_DE", -1)],
)
def test_texts_are_marked_with_the_languages_that_a_run_says(
    place: Path, kind: str, source: str, target: str, place_of_mark: int
) -> None:
    """In training, in what is written before and after, and in a merged folder that transformers reads by itself."""
    model = {"name": str(write_marking(place / kind, kind)), "source_language": source, "target_language": target}
    train, plan = {"epochs": 20, "learning_rate": 0.01}, [{"match": "all-linear", "method": "full"}]
    config = seq2seq_config(place, model=model, train=train, plan=plan, evaluation={"max_new_tokens": 24})
    job = tasks.job_of(config)
    reader: Any = load_tokenizer(job.source)
    inputs = TASK.read(job, reader, Kept())
    marks = [reader.convert_tokens_to_ids(one) for one in (source, target)]
    assert [[row[key][place_of_mark] for row in inputs.rows] for key in ("input_ids", "labels")] == [
        [mark] * len(inputs.rows) for mark in marks
    ]
    assert not any("marks" in line for line in TASK.held(job, inputs, reader))

    head: Any = AutoModelForSeq2SeqLM.from_pretrained(place / kind)
    batch = TASK.collator(reader)([inputs.rows[0]])
    begins = _read_before(head, batch["labels"])[0]
    with _greedy(head, reader, 4, [reader.eos_token_id]):
        written = head.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    known = 2 if place_of_mark == 0 else 1
    assert written[:known].tolist() == begins[:known].tolist(), "the untrained model is asked as it will be trained"
    assert marks[1] in written[:known]

    run = finetune(config)
    texts = [row["source"] for row in pair_rows(6)]
    predictor = Predictor(Named.find(str(run.path)))
    ours = [answer.text for _, answer in predictor.answers([predictor.row(text) for text in texts])]
    alone = with_tokens_of(run.adapter, replace(job.source, languages=None))
    assert alone.languages == (source, target), "an adapter without its run has them, too"
    hand_over(export_format("merged"), run.path, place / "merged", Wishes())
    theirs: Any = AutoTokenizer.from_pretrained(place / "merged")
    assert (theirs.src_lang, theirs.tgt_lang) == (source, target)
    plain: Any = AutoModelForSeq2SeqLM.from_pretrained(place / "merged").eval()
    begin = {} if place_of_mark == 0 else {"decoder_start_token_id": marks[1]}  # as mBART's users give it
    out = [
        plain.generate(**theirs(text, return_tensors="pt"), max_new_tokens=24, num_beams=1, **begin) for text in texts
    ]
    assert [theirs.decode(one[0], skip_special_tokens=True).strip() for one in out] == ours
    assert any(ours)


@pytest.mark.parametrize(
    ("languages", "told"),
    [
        (("eng_Latn", "deu_Lat"), r"model\.target_language: the tokenizer has no language 'deu_Lat'\. .*'deu_Latn'"),
        (("en", "deu_Latn"), r"model\.source_language: the tokenizer has no language 'en'"),
        (("eng_Latn", None), r"target_language: missing; name the languages of sources and of targets, or neither"),
    ],
)
def test_languages_that_a_tokenizer_does_not_have_are_refused(place: Path, languages: Any, told: str) -> None:
    said = dict(zip(("source_language", "target_language"), languages, strict=True))
    model = {"name": str(write_marking(place / "nllb", "nllb")), **said}
    with pytest.raises(ConfigError, match=told):
        load_tokenizer(tasks.job_of(seq2seq_config(place, model=model)).source)


def test_languages_are_refused_where_texts_are_not_marked(place: Path) -> None:
    model = {"name": str(place / "t5"), "source_language": "en", "target_language": "de"}
    with pytest.raises(ConfigError, match=r"model\.source_language: this tokenizer marks no languages"):
        load_tokenizer(tasks.job_of(seq2seq_config(place, model=model)).source)


def test_targets_that_cannot_be_written_to_their_end_are_told(place: Path) -> None:
    job, reader, inputs = read(place)
    told = " ".join(TASK.held(job, inputs, reader))
    lengths = [len(reader(text_target=str(row.answer))["input_ids"]) for row in inputs.tests["train"]]
    assert (longer := sum(length > 6 for length in lengths)) > 0
    assert f"{longer} row" in told
    assert "evaluation.max_new_tokens = 6 tokens" in told


def test_memory_is_counted_over_both_stacks(place: Path) -> None:
    job, _, inputs = read(place)
    memory = estimate_run(job, TASK.sizes(job, inputs))
    assert memory.uncounted is None
    assert {estimate.moment for estimate in memory.moments} == {"loading", "evaluating", "training"}


def test_memory_is_that_of_writing_or_of_the_loss_after_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, _, inputs = read(place)
    seen, foresee = set(), TASK.foresee

    def looked_at(head: Any, batch: Any, *, generates: bool) -> Any:
        seen.add(generates)
        return foresee(head, batch, generates=generates)

    monkeypatch.setattr(type(TASK), "foresee", staticmethod(looked_at))
    sizes = TASK.sizes(job, inputs)
    assert sizes.generates
    estimate_run(job, sizes)
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("sections", "error", "told"),
    [
        ({"data": {"choices": ["a", "b"]}}, ConfigError, "data.choices: seq2seq writes"),
        ({"train": {"prompt_loss_weight": 0.1}}, ConfigError, "train.prompt_loss_weight: the decoder"),
        ({"train": {"class_weights": "balanced"}}, ConfigError, "train.class_weights: targets are texts"),
        ({"train": {"metric": "accuracy"}}, ConfigError, "train.metric: accuracy is not measured for seq2seq"),
        ({"data": {"train": "plain.jsonl"}}, DataError, "a text alone has no target"),
    ],
)
def test_what_has_no_meaning_is_refused(place: Path, sections: Any, error: type[Exception], told: str) -> None:
    write_rows(place / "plain.jsonl", [{"text": "one"}, {"text": "two"}])
    with pytest.raises(error, match=told):
        read(place, **sections)


def test_text_without_a_token_is_told(place: Path) -> None:
    reader = load_tokenizer(tasks.job_of(seq2seq_config(place)).source)
    job = tasks.job_of(seq2seq_config(place))

    def told_with(unknown: str) -> list[str]:
        reader.unk_token, told = unknown, Kept()
        TASK.read(job, reader, told)
        return [remark for remark in told.remarks if "no token for" in remark]

    assert told_with(reader.tokenize(pair_rows(1)[0]["source"])[0]), "as if this word had no token"
    assert not told_with("none of its tokens")


def test_a_row_of_any_form_is_asked_as_in_training(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"instruction": f"Shorten {at}.", "input": "the late ferry", "output": "late"} for at in range(8)]
    write_rows(place / "train.jsonl", rows)
    folder = finetune(seq2seq_config(place, data={"validation": None, "test": "train.jsonl[:3]"}))
    _, reader, _ = read(place)
    trained = [example.prompt.strip() for example in TASK.rows([Source(path="train.jsonl")], reader, Notes())]
    predictor = Predictor(Named.find(str(folder.path)))
    sources: list[str] = []

    def seen(texts: list[str], *_: Any) -> list[Any]:
        sources.extend(texts)
        return []

    monkeypatch.setattr("trimtab.tasks.seq2seq._sources", seen)
    list(predictor.answers(predictor.rows_in("train.jsonl")))
    assert sources == trained
    sources.clear()
    list(predictor.answers([predictor.row("Shorten it.")]))
    assert sources == [forms.find("alpaca").prompt("Shorten it.", reader).strip()]
