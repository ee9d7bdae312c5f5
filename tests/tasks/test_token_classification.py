"""Tags of words: which piece carries them, what is measured, and what is refused."""

from __future__ import annotations

import html
import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from run_fixtures import counted_memory, make_bare
from tiny_encoders import word_pieces, write_encoder, write_roberta
from tiny_runs import Kept, write_model, write_rows
from trimtab import tasks
from trimtab.config.read import build_config
from trimtab.config.run import EvaluationConfig
from trimtab.data.labelled import Labelled
from trimtab.data.rows import Row
from trimtab.errors import ConfigError, DataError
from trimtab.models.load import load_model
from trimtab.models.locate import locate
from trimtab.models.model_files import load_tokenizer
from trimtab.outcomes import Outcomes
from trimtab.reports.run.run_page import write_run_page
from trimtab.reports.run.run_tables import answers_table, evaluation_table, results_table
from trimtab.runs.read import read_run, read_sets
from trimtab.tasks._tags import judged, mark_entities
from trimtab.tasks.token_classification import TokenClassification
from trimtab.training.run import finetune

IGNORED = -100
TAGS = ["O", "B-PER", "I-PER", "B-LOC"]


def tagged(count: int) -> list[dict[str, Any]]:
    """Rows in which a word decides its tag, apart from the one behind a name."""
    rows = []
    for at in range(count):
        tokens = [*("the", "pilot", "asks")[: 1 + at % 3], "Anna", "line", "for", ("Kiel", "Elbe")[at % 2], "again"]
        tags = [*["O"] * (1 + at % 3), "B-PER", "I-PER", "O", "B-LOC", "O"]
        rows.append({"tokens": tokens, "tags": tags})
    return rows


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Makes the configuration of a run on an encoder; rows lie in train.jsonl and test.jsonl."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_bare(monkeypatch)
    write_encoder(tmp_path / "encoder")

    def make(rows: list[Any], tested: list[Any] | None = None, output: str = "run", **train: Any) -> dict[str, Any]:
        write_rows(tmp_path / "train.jsonl", rows)
        write_rows(tmp_path / "test.jsonl", rows[:9] if tested is None else tested)
        return {
            "task": "auto",
            "model": {"name": str(tmp_path / "encoder")},
            "data": {"train": "train.jsonl", "test": {"test": "test.jsonl"}, "validation": None},
            "plan": [{"match": "all-linear", "method": "lora", "rank": 4}],
            "train": {
                **{"epochs": 5, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1, "precision": "float32"},
                **train,
            },
            "output": output,
        }

    return make


def config_of(configuration: dict[str, Any]) -> Any:
    return build_config(configuration, Path.cwd(), "run.yaml")


def run(configuration: dict[str, Any], **more: Any) -> tuple[Any, Kept]:
    told = Kept()
    return finetune(config_of(configuration), listener=told, **more), told


def example(tokens: list[str], tags: list[str]) -> Labelled:
    return Labelled("r.jsonl", 1, tuple(tags), words=tuple(tokens))


def encoded(reader: Any, tokens: list[str], max_length: int | None = None) -> dict[str, Any]:
    tags = [f"t{at}" for at in range(len(tokens))]
    return TokenClassification().encode([example(tokens, tags)], reader, tags, max_length)[0]


def test_a_run_learns_tags_and_is_measured_by_whole_entities(said: Callable[..., dict[str, Any]]) -> None:
    folder, told = run(said(tagged(24), epochs=12))
    known = read_run(folder.path)
    after = known.sets[0].after
    assert after.kind == "entities"
    assert after.figures["entity_f1"] > 0.9
    assert after.figures["entity_f1"] > known.sets[0].before.figures["entity_f1"]
    assert set(after.per_class) == {"PER", "LOC"}
    assert after.per_class["LOC"].rows == 9
    assert after.words == sum(len(row["tokens"]) for row in tagged(9))
    assert any("4 labels: O, B-LOC, B-PER, I-PER" in note for note in told.notes)
    assert any("task: token_classification" in note for note in told.notes)
    row = known.sets[0].rows_after[0]
    assert row.words == tagged(1)[0]["tokens"]
    assert row.answer.split(" ") == tagged(1)[0]["tags"]
    assert len(row.predicted.split(" ")) == len(row.words)
    console = Console(width=140, file=io.StringIO())
    console.print(results_table(known), answers_table(known), evaluation_table(after))
    assert "F1 over entities (seqeval)" in console.file.getvalue()
    write_run_page(folder.path)
    assert (
        "entity F1" in (folder.path / "report.html").read_text()
        or "Entity F1" in (folder.path / "report.html").read_text()
    )


def test_tags_of_no_scheme_are_measured_word_by_word(said: Callable[..., dict[str, Any]]) -> None:
    numbers = {"O": 0, "B-PER": 1, "I-PER": 2, "B-LOC": 3}
    rows = [{**row, "tags": [numbers[tag] for tag in row["tags"]]} for row in tagged(24)]
    folder, _ = run(said(rows))
    known = read_run(folder.path)
    after, rows_after = known.sets[0].after, known.sets[0].rows_after
    assert after.kind == "tags"
    pairs = [pair for row in rows_after for pair in zip(row.answer.split(" "), row.predicted.split(" "), strict=True)]
    assert after.figures["accuracy"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    assert sum(map(sum, after.confusion)) == after.words == len(pairs)
    write_run_page(folder.path)
    commonest, count = Counter(truth for truth, _ in pairs).most_common(1)[0]
    told = f"always answering '{commonest}' would give {100 * count / len(pairs):.1f} %"
    assert told in html.unescape((folder.path / "report.html").read_text(encoding="utf-8"))


def test_what_is_measured_does_not_depend_on_the_size_of_batches(said: Callable[..., dict[str, Any]]) -> None:
    found = []
    for size in (1, 5):
        configuration = said(tagged(16), output=f"of-{size}", epochs=1)
        folder, _ = run({**configuration, "evaluation": {"batch_size": size}})
        found.append(next(iter(read_sets(folder.path))))
    assert [row.predicted for row in found[0].rows_after] == [row.predicted for row in found[1].rows_after]
    # float32: padded rows add up in another order.
    assert found[0].after.figures["loss"] == pytest.approx(found[1].after.figures["loss"], rel=1e-5)


def test_the_first_piece_of_a_word_carries_its_tag() -> None:
    reader = word_pieces()
    row = encoded(reader, ["Kiel", "qz.x", "harbour"])
    pieces = reader.convert_ids_to_tokens(row["input_ids"])
    assert pieces == ["[CLS]", "kiel", "q", "##z", ".", "x", "harbour", "[SEP]"]
    assert row["labels"] == [IGNORED, 0, 1, IGNORED, IGNORED, IGNORED, 2, IGNORED]


def test_a_tokenizer_that_puts_spaces_into_its_tokens_finds_the_words(tmp_path: Path) -> None:
    reader = load_tokenizer(locate(str(write_roberta(tmp_path / "roberta"))))
    words = ["Kiel", "asks", "for", "qzx", "Elbe"]
    row = encoded(reader, words)
    starts = [at for at, label in enumerate(row["labels"]) if label != IGNORED]
    assert [row["labels"][at] for at in starts] == [0, 1, 2, 3, 4]
    ends = [*starts[1:], len(row["input_ids"]) - 1]
    read = [reader.decode(row["input_ids"][start:end]).strip() for start, end in zip(starts, ends, strict=True)]
    assert read == words


def test_words_with_spaces_in_them_and_words_of_which_nothing_is_left_keep_the_others_in_step() -> None:
    reader = word_pieces()
    row = encoded(reader, ["\u200b", "Kiel tug", "", "Elbe"])
    pieces = reader.convert_ids_to_tokens(row["input_ids"])
    assert [(pieces[at], label) for at, label in enumerate(row["labels"]) if label != IGNORED] == [
        ("kiel", 1),
        ("elbe", 3),
    ]
    assert row["firsts"][0] is row["firsts"][2] is None


def test_texts_and_tokens_without_tags_are_answered_word_by_word(said: Callable[..., dict[str, Any]]) -> None:
    job = tasks.job_of(config_of(said(tagged(6))))
    task = TokenClassification()
    reader = job.reader
    head = task.head_for(job, task.read(job, reader, Kept()))
    model = load_model(job.read_for(head).source)
    values = [{"text": "Anna  asks"}, {"tokens": ["Anna", "asks", "\u200b"]}, task.as_row("Elbe")]
    asked = [task.asked(Row("f", 1, "f, row 1", value), head) for value in values]
    found = task.answers(model, reader, asked, head=head, evaluation=EvaluationConfig(batch_size=2), max_length=None)
    assert [answer.fields["tokens"] for answer in found] == [["Anna", "asks"], ["Anna", "asks", "\u200b"], ["Elbe"]]
    assert found[0].fields["tags"] == found[1].fields["tags"][:2]
    assert found[1].fields["tags"][2] == "O"
    assert found[1].fields["probabilities"][2] is None
    assert found[0].text == " ".join(f"{a}/{b}" for a, b in zip(["Anna", "asks"], found[0].fields["tags"], strict=True))
    assert task.told(values[1]) == "Anna asks \u200b"
    rows = [task.example(Row("f", 1, "f, row 1", {**values[1], "tags": ["O"] * 3}))]
    assert task.compared(model, reader, rows, head=head, length=None).shape == (2, 4)
    with pytest.raises(DataError, match="f, row 1: it has no tokens"):
        task.asked(Row("f", 1, "f, row 1", {"text": " "}), head)


def test_a_long_row_is_cut_behind_a_word() -> None:
    row = encoded(word_pieces(), ["Kiel", "qzx", "Elbe"], max_length=5)  # [CLS] kiel q ##z [SEP]
    assert row["cut"]
    assert len(row["input_ids"]) == 5
    assert [label for label in row["labels"] if label != IGNORED] == [0]
    assert row["firsts"] == [1, None, None]


def test_words_without_room_count_as_tagged_with_nothing_and_are_told(said: Callable[..., dict[str, Any]]) -> None:
    rows = [*tagged(8), {"tokens": ["Anna"] * 80, "tags": ["B-PER"] * 80}]
    folder, told = run(said(rows, tested=rows[-1:], epochs=1))
    known = next(iter(read_sets(folder.path)))
    assert known.after.cut == 1
    assert known.rows_after[0].predicted.split(" ")[62:] == ["O"] * 18  # 64 positions, two of them special
    assert any("cut to data.max_length = 64" in text for text in told.remarks)


def test_words_of_which_a_tokenizer_leaves_nothing_are_told(said: Callable[..., dict[str, Any]]) -> None:
    rows = [*tagged(4), {"tokens": ["Anna", "\u200b"], "tags": ["B-PER", "O"]}]
    job = tasks.job_of(config_of(said(rows)))
    inputs = TokenClassification().read(job, job.reader, Kept())
    assert any("row 5" in note and "1 word" in note for note in inputs.notes)


def test_a_causal_model_tags_words_too(said: Callable[..., dict[str, Any]]) -> None:
    configuration = {**said(tagged(8), epochs=1), "task": "token_classification"}
    write_model(Path("llama"))
    configuration["model"]["name"] = "llama"
    configuration["plan"][0]["match"] = "*.q_proj"
    folder, _ = run(configuration)
    known = next(iter(read_sets(folder.path)))
    assert len(known.rows_after) == 8
    assert known.after.figures["loss"] < known.before.figures["loss"]


def test_the_loss_is_that_of_transformers_and_weighed_that_of_a_plain_formula(
    said: Callable[..., dict[str, Any]],
) -> None:
    plain = tasks.job_of(config_of(said(tagged(6))))
    weighed = tasks.job_of(config_of(said(tagged(6), class_weights="balanced")))
    task = TokenClassification()
    reader = plain.reader
    inputs, weighed_inputs = (task.read(job, reader, Kept()) for job in (plain, weighed))
    model = load_model(plain.read_for(task.head_for(plain, inputs)).source)
    batch = task.collator(reader)(list(inputs.rows))
    own = model(**batch).loss
    # One sum in float32, in another order.
    torch.testing.assert_close(task.loss(model, batch), own, rtol=1e-5, atol=0)

    batch = task.collator(reader)(list(weighed_inputs.rows))
    words = [tag for row in tagged(6) for tag in row["tags"]]
    counts = torch.tensor([words.count(label) for label in inputs.choices], dtype=torch.float64)
    weights = len(words) / (len(inputs.choices) * counts)  # scikit-learn's "balanced": 1 on average
    logits = model(**{name: one for name, one in batch.items() if name not in ("labels", "weight")}).logits.double()
    summed = F.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), weight=weights, ignore_index=IGNORED, reduction="sum"
    )
    torch.testing.assert_close(task.loss(model, batch).double(), summed / len(words), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("value", "said_of_it"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens, but 1 tags"),
        ({"tokens": "a b", "tags": ["O", "O"]}, "expected a list of words under 'tokens', but got str"),
        ({"text": "a b", "tags": ["O", "O"]}, "but its keys are"),
        ({"tokens": ["a"], "tags": None}, "expected a list of tags under 'tags'.*got nothing"),
        ({"tokens": [], "tags": []}, "it has no tokens"),
        ({"tokens": ["a", 3], "tags": ["O", "O"]}, "expected words under 'tokens', got 3"),
        ({"tokens": ["a"], "tags": [None]}, "expected a label under 'tags'"),
        ({"tokens": ["a"], "tags": ["B PER"]}, "has a space in it"),
    ],
)
def test_rows_that_cannot_be_are_refused_with_their_place(value: dict[str, Any], said_of_it: str) -> None:
    with pytest.raises(DataError, match=rf"^f.jsonl, line 3: .*{said_of_it}"):
        TokenClassification().example(Row("f.jsonl", 3, "f.jsonl, line 3", value))


def test_a_tag_that_only_the_test_rows_have_is_refused(said: Callable[..., dict[str, Any]]) -> None:
    tested = [{"tokens": ["Anna"], "tags": ["B-ORG"]}]
    with pytest.raises(DataError, match=r"test.jsonl, row 1: the label 'B-ORG' is not among those of the training"):
        run(said(tagged(4), tested=tested))
    named = said(tagged(4), tested=tested, epochs=1)
    named["data"]["choices"] = [*TAGS, "B-ORG"]
    folder, _ = run(named)
    assert next(iter(read_sets(folder.path))).after.per_class["ORG"].recall == 0.0


def test_a_metric_that_such_tags_have_not_is_refused(said: Callable[..., dict[str, Any]]) -> None:
    configuration = said(tagged(12), metric="macro_f1")
    configuration["data"]["validation"] = 0.25
    with pytest.raises(ConfigError, match=r"macro_f1 is not measured .* choose one of loss, entity_f1, accuracy"):
        run(configuration)


def test_one_tag_alone_has_nothing_to_tell_apart(said: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(DataError, match="every token has the tag 'O'"):
        run({**said([{"tokens": ["a"], "tags": ["O"]}]), "task": "token_classification"})


def test_schemes_are_known_by_their_letters() -> None:
    assert mark_entities(["O", "B-PER", "I-PER", "E-PER", "S-LOC", "U-LOC", "L-LOC"])
    assert not mark_entities(["O"])
    assert not mark_entities(["O", "B-PER", "NOUN"])
    assert not mark_entities(["PER", "O"])


def test_an_entity_is_right_only_whole_in_any_scheme() -> None:
    for last in ("L", "E"):
        tags = ["O", "B-A", "I-A", f"{last}-A", f"{'U' if last == 'L' else 'S'}-B"]
        truth = [["B-A", "I-A", tags[3], "O", tags[4]], ["O", "O"]]
        given = [["B-A", tags[3], "O", "O", tags[4]], ["O", "O"]]
        rows = [example(["w"] * len(tags_of), tags_of) for tags_of in truth]
        logits = [torch.tensor([[10.0 * (tag == one) for tag in tags] for one in row]) for row in given]
        found = judged(logits, rows, tags)
        assert found.outcomes.entities["micro avg"]["f1-score"] == pytest.approx(0.5)  # one of two, on both sides
        assert found.details["per_class"]["B"].f1 == 1.0


def test_rows_without_any_entity_score_nothing_and_warn_of_nothing() -> None:
    assert Outcomes(true_tags=[["O"]], given_tags=[["O"]]).entities["micro avg"]["f1-score"] == 0.0


def test_memory_is_counted(said: Callable[..., dict[str, Any]]) -> None:
    memory = counted_memory(config_of(said(tagged(8))))
    assert memory.uncounted is None
    assert {estimate.moment for estimate in memory.moments} == {"loading", "evaluating", "training"}
