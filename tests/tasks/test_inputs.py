"""The rows of a run: several sources, their weights, and what is recorded of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import Kept, rows, tiny_tokenizer, write_rows
from trimtab.config.read import build_config
from trimtab.config.run import TrainConfig
from trimtab.errors import DataError
from trimtab.tasks import Inputs, read_inputs


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_rows(tmp_path / "chat.jsonl", rows(12, "chat"))
    write_rows(tmp_path / "alpaca.jsonl", rows(20, "alpaca"))


def read(listener: Kept | None = None, **data: Any) -> Inputs:
    said = {"model": "m", "data": {"train": ["chat.jsonl", "alpaca.jsonl"], "validation": None, **data}, "output": "r"}
    return read_inputs(build_config(said, Path.cwd(), "run.yaml"), tiny_tokenizer(), listener or Kept())


def counted(inputs: Inputs) -> Counter[str]:
    return Counter(Path(source).stem for source, _ in inputs.rows.origins)


def test_files_of_two_forms_are_one_training_set() -> None:
    told = Kept()
    inputs = read(told)
    assert counted(inputs) == {"chat": 12, "alpaca": 20}
    assert inputs.form == "alpaca"  # that of most rows
    assert [(record.forms, record.rows, record.an_epoch) for record in inputs.sources] == [
        (["chat"], 12, 12),
        (["alpaca"], 20, 20),
    ]
    assert "32 training rows of the forms 'chat' and 'alpaca'" in told.notes
    assert "chat.jsonl: 12 rows (chat)" in told.notes


def test_weights_count_after_the_limit_and_the_validation_rows() -> None:
    train = [{"path": "chat.jsonl", "weight": 3}, {"path": "alpaca.jsonl", "weight": 0.5}]
    told = Kept()
    inputs = read(told, train=train, train_limit=16, validation=0.25)
    # 16 of the 32 rows, evenly; a quarter of those are for validation; the rest comes 3 times, or half of it once.
    split = Counter(Path(row.source).stem for row in inputs.validation)
    assert sum(split.values()) == 4
    left = {"chat": 6 - split["chat"], "alpaca": 10 - split["alpaca"]}
    assert counted(inputs) == {"chat": 3 * left["chat"], "alpaca": round(left["alpaca"] / 2)}
    validated = {(row.source, row.number) for row in inputs.validation}
    assert not validated & set(inputs.rows.origins)
    assert len(inputs.rows) == sum(counted(inputs).values()) == len(inputs.rows.lengths)
    assert (
        f"weight 3: {3 * left['chat']} in an epoch"
        in told.notes[[n.split(":")[0] for n in told.notes].index("chat.jsonl")]
    )
    again = read(train=train, train_limit=16, validation=0.25)
    assert (again.rows.origins, again.digests) == (inputs.rows.origins, inputs.digests)


def test_a_repeated_row_is_the_row_itself_and_steps_count_it() -> None:
    inputs = read(train=[{"path": "chat.jsonl", "weight": 2}])
    once = read(train="chat.jsonl")
    assert [inputs.rows[2 * n] for n in range(12)] == [inputs.rows[2 * n + 1] for n in range(12)] == list(once.rows)
    assert TrainConfig(batch_size=8, epochs=2).total_steps(len(inputs.rows)) == 6


def test_parts_of_one_file_may_have_weights_of_their_own() -> None:
    inputs = read(train=[{"path": "chat.jsonl[:4]", "weight": 2}, "chat.jsonl[4:]"])
    assert Counter(inputs.rows.origins) == {
        (str(Path("chat.jsonl").absolute()), n): 2 if n <= 4 else 1 for n in range(1, 13)
    }
    assert [record.rows for record in inputs.sources] == [4, 8]


def test_a_weight_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(DataError, match=r"chat\.jsonl: a weight of 0\.01 leaves none of its 12 training rows"):
        read(train=[{"path": "chat.jsonl", "weight": 0.01}, "alpaca.jsonl"])


def test_validation_and_test_rows_take_the_same_words() -> None:
    inputs = read(
        train="chat.jsonl[2:]",
        validation={"path": "*.jsonl[:3]"},
        test={"both": ["chat.jsonl[:2]", "alpaca.jsonl[:50%]"], "one": {"path": "alpaca.jsonl", "form": "alpaca"}},
    )
    assert {name: len(tested) for name, tested in inputs.tests.items()} == {"both": 12, "one": 20}
    assert (len(inputs.validation), len(inputs.rows)) == (3, 10)


def test_the_digest_follows_rows_and_not_their_place(tmp_path: Path) -> None:
    first = read(train="chat.jsonl", test="alpaca.jsonl").digests
    write_rows(tmp_path / "moved.jsonl", rows(12, "chat"))
    assert read(train="moved.jsonl", test={"alpaca": "alpaca.jsonl"}).digests == first
    others = [rows(11, "chat"), list(reversed(rows(12, "chat"))), [*rows(11, "chat"), rows(1, "chat")[0]]]
    for other in others:
        write_rows(tmp_path / "chat.jsonl", other)
        now = read(train="chat.jsonl", test="alpaca.jsonl").digests
        assert now.train != first.train
        assert now.test == first.test
    write_rows(tmp_path / "chat.jsonl", rows(12, "chat"))
    assert read(train={"path": "chat.jsonl", "weight": 2}, test="alpaca.jsonl").digests.train != first.train


def test_measured_rows_that_are_trained_on_are_told() -> None:
    told = Kept()
    write_rows(Path("mixed.jsonl"), [*rows(4, "chat"), *rows(15, "chat")[13:]])
    read(told, train="chat.jsonl", validation="mixed.jsonl", test={"same": "chat.jsonl", "other": "alpaca.jsonl"})
    here = Path.cwd()
    assert [remark.partition(", so figures")[0] for remark in told.remarks] == [
        f"4 of the 6 validation rows are among the training rows, too (the first is {here / 'mixed.jsonl'}, row 1)",
        f"12 of the 12 rows of the test set same are among the training rows, too (the first is "
        f"{here / 'chat.jsonl'}, row 1)",
    ]


def test_rows_that_stand_twice_are_told_where_one_is_split_off() -> None:
    told = Kept()
    write_rows(Path("twice.jsonl"), rows(12, "chat") * 2)
    read(told, train="twice.jsonl", validation=0.5)
    assert any("validation rows are among the training rows" in remark for remark in told.remarks)


def test_answers_that_differ_in_case_alone_are_told() -> None:
    told = Kept()
    said = [{"prompt": f"fog {at}? ", "completion": ("yes", "no", "Yes")[at % 3]} for at in range(30)]
    write_rows(Path("case.jsonl"), said)
    assert read(told, train="case.jsonl").choices == ["Yes", "no", "yes"]
    assert told.remarks == ["the answers Yes, yes differ in upper and lower case alone, and are answers apart"]


def test_rows_with_another_answer_are_others() -> None:
    told = Kept()
    write_rows(Path("train.jsonl"), [{"prompt": "fog? ", "completion": word} for word in ("calm", "storm")])
    write_rows(Path("test.jsonl"), [{"prompt": "fog? ", "completion": "watch out"}])
    read(told, train="train.jsonl", test="test.jsonl")
    assert told.remarks == []
