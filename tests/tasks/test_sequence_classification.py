"""Classification of texts: what rows may say, what is refused, and that the loss is what it is said to be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

from run_fixtures import counted_memory, make_bare
from tiny_encoders import write_encoder
from tiny_runs import Kept, write_model, write_rows
from trimtab import tasks
from trimtab.config.read import build_config
from trimtab.data.labelled import Labelled
from trimtab.data.rows import Row
from trimtab.errors import ConfigError, DataError, ModelError
from trimtab.models.load import load_model
from trimtab.runs.read import read_sets
from trimtab.surgery.attach_report import AttachReport
from trimtab.tasks.sequence_classification import SequenceClassification
from trimtab.training.checks import check_before
from trimtab.training.run import finetune

WORDS = ("calm", "fog", "storm")


def labelled(count: int, labels: tuple[Any, ...] = WORDS) -> list[dict[str, Any]]:
    """Rows of different lengths in which the last word decides the label; there are most of the first one."""
    places = [0 if at % 4 in (0, 1) else at % 4 - 1 for at in range(count)]
    return [
        {"text": " ".join([*["berth", "pilot", "tug"][: at % 4], WORDS[place]]), "label": labels[place]}
        for at, place in enumerate(places)
    ]


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Makes the configuration of a run on an encoder; rows lie in train.jsonl and test.jsonl."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_bare(monkeypatch)
    write_encoder(tmp_path / "encoder")

    def make(
        rows: list[Any], tested: list[Any] | None = None, *, output: str = "run", data: Any = None, **train: Any
    ) -> dict[str, Any]:
        write_rows(tmp_path / "train.jsonl", rows)
        write_rows(tmp_path / "test.jsonl", rows[:7] if tested is None else tested)
        usual = {"train": "train.jsonl", "test": {"test": "test.jsonl"}, "validation": None}
        return {
            "task": "sequence_classification",
            "model": {"name": str(tmp_path / "encoder")},
            "data": {**usual, **(data or {})},
            "plan": [{"match": "*.query", "method": "lora", "rank": 2}],
            "train": {
                **{"epochs": 1, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1, "precision": "float32"},
                **train,
            },
            "output": output,
        }

    return make


def run(configuration: dict[str, Any]) -> tuple[Any, Kept]:
    told = Kept()
    folder = finetune(build_config(configuration, Path.cwd(), "run.yaml"), listener=told)
    return next(iter(read_sets(folder.path))), told


def read(configuration: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The inputs of a run, its model and its tokenizer."""
    job = tasks.job_of(build_config(configuration, Path.cwd(), "run.yaml"))
    task = tasks.of(job)
    reader = job.reader
    inputs = task.read(job, reader, Kept())
    return inputs, load_model(job.read_for(task.head_for(job, inputs)).source), reader


def check(configuration: dict[str, Any]) -> list[str]:
    """What is held against the model before a run."""
    job = tasks.job_of(build_config(configuration, Path.cwd(), "run.yaml"))
    task = tasks.of(job)
    inputs = task.read(job, job.reader, Kept())
    return check_before(job.read_for(task.head_for(job, inputs)), inputs, AttachReport((), (), 0, 0))


def example(value: dict[str, Any]) -> Labelled:
    return SequenceClassification().example(Row("f.jsonl", 3, "f.jsonl, row 3", value))


def unlabelled(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in batch.items() if name not in ("labels", "weight")}


@pytest.mark.parametrize("several", [False, True])
def test_the_loss_is_that_of_transformers_own_head(said: Callable[..., dict[str, Any]], several: bool) -> None:
    rows = labelled(12)
    if several:
        rows = [{"text": row["text"], "labels": [row["label"]] * (at % 3)} for at, row in enumerate(rows)]
    inputs, model, reader = read(said(rows))
    task = SequenceClassification()
    batch = task.collator(reader)(list(inputs.rows))
    assert model.config.problem_type == ("multi_label_classification" if several else "single_label_classification")
    # One sum in float32, in another order.
    torch.testing.assert_close(task.loss(model, batch), model(**batch).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weights", ["balanced", {"storm": 3.0, "fog": 0.5}])
def test_weighed_labels_are_those_of_a_plain_formula(said: Callable[..., dict[str, Any]], weights: Any) -> None:
    rows = labelled(16)
    inputs, model, reader = read(said(rows, class_weights=weights))
    task = SequenceClassification()
    batch = task.collator(reader)(list(inputs.rows))
    names = [row["label"] for row in rows]
    raw = [1 / names.count(label) if weights == "balanced" else weights.get(label, 1.0) for label in inputs.choices]
    of_rows = torch.tensor([raw[inputs.choices.index(name)] for name in names], dtype=torch.float64)
    truth = torch.tensor([inputs.choices.index(name) for name in names])
    nats = -model(**unlabelled(batch)).logits.double().log_softmax(-1)[torch.arange(16), truth]
    expected = (of_rows / of_rows.mean() * nats).sum() / 16
    # float32 against float64.
    torch.testing.assert_close(task.loss(model, batch).double(), expected, rtol=1e-5, atol=0)


def test_labels_are_balanced_as_often_as_their_rows_come(said: Callable[..., dict[str, Any]]) -> None:
    once = said(labelled(16))
    parts = [{"path": "train.jsonl[:4]", "weight": 5.0}, {"path": "train.jsonl[4:]", "weight": 0.5}]
    inputs, _, _ = read({**once, "data": {**once["data"], "train": parts}, "train": {"class_weights": "balanced"}})
    counted = [sum(row["weight"] for row in inputs.rows if row["labels"] == at) for at in range(3)]
    assert counted == pytest.approx([len(inputs.rows) / 3] * 3)


def test_weights_of_labels_that_are_not_there_are_refused(said: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match=r"class_weights: 'rain' is not a label; expected some of calm, fog, storm"):
        read(said(labelled(8), class_weights={"rain": 2.0}))


def test_a_row_without_any_label_teaches_as_much_as_others(said: Callable[..., dict[str, Any]]) -> None:
    rows = [{"text": row["text"], "labels": [row["label"]] * (at % 2)} for at, row in enumerate(labelled(8))]
    inputs, model, reader = read(said(rows, class_weights="balanced"))
    assert [row["weight"] for row in inputs.rows][::2] == [1.0] * 4
    batch = SequenceClassification().collator(reader)(list(inputs.rows))
    weights = batch["weight"].double()[:, None]
    costs = F.binary_cross_entropy_with_logits(
        model(**unlabelled(batch)).logits.double(), batch["labels"].double(), reduction="none"
    )
    torch.testing.assert_close(
        SequenceClassification().loss(model, batch).double(), (costs * weights).mean(), rtol=1e-5, atol=0
    )


def test_several_labels_are_learned_and_measured_one_by_one(said: Callable[..., dict[str, Any]]) -> None:
    rows = [{"text": row["text"], "labels": [row["label"]] * (at % 3)} for at, row in enumerate(labelled(24))]
    found, _ = run(said(rows, epochs=4))
    assert found.after.kind == "labels"
    assert found.after.figures["loss"] < found.before.figures["loss"]
    assert found.after.figures["exact_match"] == sum(row.correct for row in found.rows_after) / len(found.rows_after)
    assert all(score > -1e9 for row in found.rows_after for score in row.scores.values())


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ((0, 1, 2), ["0", "1", "2"]),
        ((2, -1, 10), ["-1", "2", "10"]),
        ((1.0, 2.0, 3.0), ["1", "2", "3"]),
        ((True, False, True), ["false", "true"]),
        ((" calm ", "fog", "storm"), ["calm", "fog", "storm"]),
        (("1", 2, "3"), ["1", "2", "3"]),
    ],
)
def test_labels_are_words_numbers_or_truths(
    said: Callable[..., dict[str, Any]], labels: tuple[Any, ...], names: list[str]
) -> None:
    inputs, model, _ = read(said(labelled(12, labels)))
    assert inputs.choices == names
    assert model.config.id2label == dict(enumerate(names))


@pytest.mark.parametrize(
    ("value", "said_of_it"),
    [
        ({"text": "a", "label": None}, "expected a label under 'label', a word or a whole number, got nothing"),
        ({"text": "a", "label": "  "}, "expected a label"),
        ({"text": "a", "label": 2.5}, "got 2.5. For numbers say task: regression"),
        ({"text": "a", "label": {"x": 1}}, "expected a label"),
        ({"text": "a", "label": "x", "labels": ["x"]}, "both 'label' and 'labels'"),
        ({"text": "a", "labels": "x"}, "expected a list of labels under 'labels', got str.*columns={label: labels}"),
        ({"text": "a", "label": ["x"]}, r"got \['x'\].*data.columns={labels: label}"),
        ({"sentence": "a", "label": "x"}, "expected a text under 'text', but its keys are.*columns={text: sentence}"),
        ({"text": 3, "label": "x"}, "expected a text under 'text', got int"),
        ({"text": "a", "text_pair": 3, "label": "x"}, "expected a text under 'text_pair', got int"),
    ],
)
def test_rows_that_cannot_be_are_refused_with_their_place(value: dict[str, Any], said_of_it: str) -> None:
    with pytest.raises(DataError, match=rf"^f.jsonl, row 3: .*{said_of_it}"):
        example(value)


def test_rows_with_one_label_and_rows_with_several_do_not_mix(said: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(DataError, match=r"row 2: some rows have a 'label' and others 'labels'"):
        read(said([{"text": "a", "label": "x"}, {"text": "b", "labels": ["x"]}]))


def test_one_label_alone_has_nothing_to_tell_apart(said: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(DataError, match="'calm' is the only label, so there is nothing to tell apart"):
        read(said([{"text": "a", "label": "calm"}] * 4))


def test_texts_in_place_of_labels_are_no_classes(said: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(DataError, match=r"50 different labels on 50 rows are no classes; for numbers say task: regr"):
        read(said([{"text": "a", "label": f"sentence {at}"} for at in range(50)]))


def test_a_label_that_only_the_test_rows_have_is_refused_before_training_or_named(
    said: Callable[..., dict[str, Any]],
) -> None:
    tested = [{"text": "fog", "label": "rain"}]
    with pytest.raises(DataError, match=r"test.jsonl, row 1: the label 'rain' is not among those of the training rows"):
        read(said(labelled(8), tested))
    found, told = run(said(labelled(8), tested, data={"choices": [*WORDS, "rain"]}))
    assert found.after.choices == [*WORDS, "rain"]
    assert any("no training row has the label rain" in text for text in told.remarks)


def test_empty_texts_are_used_and_told(said: Callable[..., dict[str, Any]]) -> None:
    found, told = run(said([*labelled(7), {"text": "", "label": "fog"}], [{"text": "", "label": "fog"}]))
    assert len(found.rows_after) == 1
    assert any("1 row to train on without any text" in text for text in told.remarks)


@pytest.mark.parametrize("names", [None, ["calm", "fog", "storm"]])
def test_flags_say_which_labels_a_text_has(said: Callable[..., dict[str, Any]], names: list[str] | None) -> None:
    flags: list[list[Any]] = [[1, 0, 0], [0.0, 1.0, 1.0], [False, False, False], [0, 0, 1]]
    rows = [{"text": "fog over berth", "labels": flags[at % 4]} for at in range(8)]
    inputs, _, _ = read(said(rows, rows[3:4], data={"choices": names} if names else None))
    named = names or ["0", "1", "2"]
    assert inputs.choices == named
    assert [row["labels"] for row in inputs.rows][:4] == [[float(flag) for flag in row] for row in flags]
    assert [row.labels for row in inputs.tests["test"]] == [(named[2],)]
    assert any("'labels' are read as 3 flags" in note for note in inputs.notes)


def test_lists_of_numbers_are_labels_where_they_are_no_flags(said: Callable[..., dict[str, Any]]) -> None:
    rows = [{"text": "fog", "labels": one} for one in ([0, 1], [1], [], [1, 1])]
    inputs, _, _ = read(said(rows))
    assert [row["labels"] for row in inputs.rows] == [[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0]]


def test_choices_are_the_names_of_labels_that_are_numbers(said: Callable[..., dict[str, Any]]) -> None:
    names = ["stormy", "calm", "foggy"]  # in the order of the numbers, which is not that of the alphabet
    inputs, model, _ = read(said(labelled(8, (0, 1, 2)), data={"choices": names}))
    assert model.config.id2label == dict(enumerate(names))
    assert [inputs.choices[row["labels"]] for row in inputs.rows[:4]] == ["stormy", "stormy", "calm", "foggy"]
    with pytest.raises(DataError, match=r"row 3: the label '3' is not in data.choices .* name it there"):
        read(said(labelled(8, (0, 3, 2)), data={"choices": names}))


def test_labels_that_differ_in_case_alone_are_told(said: Callable[..., dict[str, Any]]) -> None:
    inputs, _, _ = read(said(labelled(8, ("Yes", "yes", "no"))))
    assert "the labels Yes, yes differ in upper and lower case alone, and are labels apart" in inputs.notes


def test_test_rows_are_held_against_the_model_before_anything_is_trained(said: Callable[..., dict[str, Any]]) -> None:
    configuration = said(labelled(8), [{"text": "", "label": "fog"}])
    write_model(Path("llama"))
    configuration["model"]["name"] = "llama"
    with pytest.raises(DataError, match=r"test.jsonl, row 1: the text is empty"):
        check(configuration)
    told = check(said(labelled(8), [{"text": "fog " * 200, "label": "fog"}]))
    assert "1 row of the test set test cut to 64 tokens" in told


def test_an_empty_text_of_which_a_tokenizer_makes_nothing_is_refused(said: Callable[..., dict[str, Any]]) -> None:
    configuration = said([*labelled(7), {"text": "", "label": "fog"}])
    write_model(Path("llama"))
    configuration["model"]["name"] = "llama"
    with pytest.raises(DataError, match=r"train.jsonl, row 8: the text is empty"):
        read(configuration)


def test_long_texts_are_cut_and_told(said: Callable[..., dict[str, Any]]) -> None:
    rows = [*labelled(7), {"text": "fog " * 200, "label": "fog"}]
    found, told = run(said(rows, rows[-1:]))
    assert any("1 row cut to data.max_length = 64 tokens" in text for text in told.remarks)
    assert found.after.cut == 1


def test_a_text_beside_pairs_is_read_as_by_itself(said: Callable[..., dict[str, Any]]) -> None:
    task = SequenceClassification()
    reader = tasks.job_of(build_config(said(labelled(4)), Path.cwd(), "run.yaml")).reader
    single = example({"text": "fog", "label": "calm"})
    pair = example({"text": "fog", "text_pair": "tug", "label": "calm"})
    alone = task.encode([single], reader, ["calm"], None)[0]
    first, second, third = task.encode([single, pair, single], reader, ["calm"], None)
    assert first == alone == third
    tokens = reader.convert_ids_to_tokens(second["input_ids"])
    assert tokens == ["[CLS]", "fog", "[SEP]", "tug", "[SEP]"]
    assert second["token_type_ids"] == [0, 0, 0, 1, 1]


def test_a_model_that_has_a_head_for_the_labels_keeps_it_in_its_own_order(
    said: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    configuration = said(labelled(8))
    order = ["storm", "calm", "fog"]
    own = AutoModelForSequenceClassification.from_pretrained(
        configuration["model"]["name"],
        id2label=dict(enumerate(order)),
        label2id={one: at for at, one in enumerate(order)},
    )
    own.save_pretrained(configuration["model"]["name"])
    inputs, model, _ = read(configuration)
    assert inputs.choices == order
    assert torch.equal(model.classifier.weight, own.classifier.weight)
    # Other labels, another head.
    inputs, model, _ = read(said(labelled(8, ("a", "b", "c"))))
    assert inputs.choices == ["a", "b", "c"]
    assert not torch.equal(model.classifier.weight, own.classifier.weight)


def test_a_head_is_drawn_by_the_seed(said: Callable[..., dict[str, Any]]) -> None:
    one, again, other = (read(said(labelled(8), seed=seed))[1].classifier.weight for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_a_model_whose_head_reads_the_last_position_answers_alike_in_any_batch(
    said: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    from transformers import XLNetConfig, XLNetLMHeadModel

    configuration = said(labelled(12))
    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": 200, "initializer_range": 0.2}
    XLNetLMHeadModel(XLNetConfig(**sizes)).save_pretrained(tmp_path / "xlnet")
    AutoTokenizer.from_pretrained(tmp_path / "encoder").save_pretrained(tmp_path / "xlnet")
    configuration["model"]["name"] = str(tmp_path / "xlnet")
    inputs, model, reader = read(configuration)
    task = SequenceClassification()
    together = task.logits(model, task.collator(reader)(list(inputs.rows)))
    alone = torch.cat([model(torch.tensor([row["input_ids"]])).logits for row in inputs.rows])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)  # float32, sums of other lengths


def test_a_model_without_a_table_of_tokens_knows_any(said: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Canine hashes characters."""
    from transformers import CanineConfig, CanineModel

    configuration = said(labelled(12))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    local = {"num_hash_buckets": 50, "num_hash_functions": 4, "local_transformer_stride": 8}
    CanineModel(CanineConfig(**sizes, **local)).save_pretrained(tmp_path / "canine")
    AutoTokenizer.from_pretrained(tmp_path / "encoder").save_pretrained(tmp_path / "canine")
    configuration["model"]["name"] = str(tmp_path / "canine")
    assert not any("row for" in line for line in check(configuration))


def test_texts_of_which_an_encoder_with_a_decoder_finds_no_single_end_are_refused(
    said: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    rows = labelled(8)
    configuration = said([*rows[:5], {**rows[5], "text": "tug [SEP] fog"}, *rows[6:]])
    reader = AutoTokenizer.from_pretrained(tmp_path / "encoder")
    sides = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": len(reader), **sides}
    ends = {"eos_token_id": reader.sep_token_id, "pad_token_id": 0, "decoder_start_token_id": 2, "bos_token_id": 2}
    BartForConditionalGeneration(BartConfig(**sizes, **ends)).save_pretrained(tmp_path / "bart")
    reader.save_pretrained(tmp_path / "bart")
    configuration["model"]["name"] = str(tmp_path / "bart")
    with pytest.raises(DataError, match=r"row 6: the text has 2 end tokens and that of .*row 1 has 1"):
        check(configuration)


def test_numbers_that_mark_rows_without_a_label_are_refused_or_told(said: Callable[..., dict[str, Any]]) -> None:
    _, told = run(said(labelled(8, (-1, 0, 1))))
    assert any("-1 is learned as a label like any other" in remark for remark in told.remarks)
    with pytest.raises(DataError, match=r"row 3: -100 under 'label' marks what has no label"):
        example({"text": "a", "label": -100})


def test_the_columns_of_a_pair_are_named(said: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(DataError, match=r"\{text: question, text_pair: sentence\}"):
        example({"question": "a", "sentence": "b", "label": 1})


@pytest.mark.parametrize("pad", [None, 7])
def test_a_causal_model_without_a_padding_token_answers_alike_in_any_batch(
    said: Callable[..., dict[str, Any]], pad: int | None
) -> None:
    configuration = said(labelled(12))
    write_model(Path("llama"), pad_token_id=pad)
    configuration["model"]["name"] = "llama"
    configuration["plan"][0]["match"] = "*.q_proj"
    inputs, model, reader = read(configuration)
    assert model.config.pad_token_id == reader.pad_token_id
    task = SequenceClassification()
    together = task.logits(model, task.collator(reader)(list(inputs.rows)))
    alone = torch.cat([task.logits(model, task.collator(reader)([row])) for row in inputs.rows])
    assert len({len(row["input_ids"]) for row in inputs.rows}) > 1
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)  # float32, sums of other lengths
    found, _ = run(configuration)
    assert len(found.rows_after) == 7


def test_a_padding_token_that_the_model_has_no_row_for_is_refused_or_added(said: Callable[..., dict[str, Any]]) -> None:
    configuration = said(labelled(12))
    tokenizer = AutoTokenizer.from_pretrained(write_model(Path("llama")))
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    tokenizer.save_pretrained("llama")
    configuration["model"]["name"] = "llama"
    with pytest.raises(ModelError, match=r"no row for: <padding> .*model.add_tokens: \[\"<padding>\"\]"):
        read(configuration)
    configuration["model"]["add_tokens"] = ["<padding>"]
    inputs, model, reader = read(configuration)
    assert model.config.pad_token_id == reader.pad_token_id == rows
    task = SequenceClassification()
    together = task.logits(model, task.collator(reader)(list(inputs.rows)))
    alone = torch.cat([task.logits(model, task.collator(reader)([row])) for row in inputs.rows])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)  # float32, sums of other lengths


def test_what_is_measured_does_not_depend_on_the_size_of_batches(said: Callable[..., dict[str, Any]]) -> None:
    found = []
    for size in (1, 5):
        configuration = {**said(labelled(12), output=f"of-{size}"), "evaluation": {"batch_size": size}}
        found.append(run(configuration)[0])
    assert [row.predicted for row in found[0].rows_after] == [row.predicted for row in found[1].rows_after]
    for name, value in found[0].after.figures.items():
        assert value == pytest.approx(found[1].after.figures[name], rel=1e-5), name


def test_accumulated_batches_teach_what_one_large_batch_does(said: Callable[..., dict[str, Any]]) -> None:
    write_encoder(Path("encoder"), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    found = [
        run(said(labelled(8), output=f"in-{parts}", batch_size=8 // parts, gradient_accumulation=parts, epochs=2))
        for parts in (1, 4)
    ]
    losses = [told.column("loss") for _, told in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    norms = [told.column("grad_norm") for _, told in found]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_memory_is_counted(said: Callable[..., dict[str, Any]]) -> None:
    memory = counted_memory(build_config(said(labelled(8)), Path.cwd(), "run.yaml"))
    assert memory.uncounted is None
    assert {estimate.moment for estimate in memory.moments} == {"loading", "evaluating", "training"}
