"""Reading a run folder: what may be missing, and what damage is told by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trimtab.errors import RunError
from trimtab.runs.read import read_run
from trimtab.runs.results import ChoiceResult


def test_everything_is_read(run: Path) -> None:
    known = read_run(run)
    assert known.plan is not None
    assert known.plan.methods == ["dora", "mora"]
    assert known.plan.modules[0].rows == 12
    assert known.plan.modules[0].columns == 16
    assert [tests.name for tests in known.sets] == ["kind"]
    assert isinstance(known.sets[0].after, ChoiceResult)
    assert len(known.measures("train")) == 40
    assert [measure.step for measure in known.measures("validation")] == [20, 40]
    assert not known.interrupted
    assert known.adapter


def test_a_name_with_dots_and_the_word_before(run: Path) -> None:
    (run / "evaluation" / "kind.after.json").rename(run / "evaluation" / "v1.before.2.after.json")
    assert [tests.name for tests in read_run(run).sets] == ["kind", "v1.before.2"]


def test_a_resumed_run_repeats_steps_and_the_later_line_counts(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps({"kind": "train", "step": 39, "loss": 9.0}) + "\n")
    train = read_run(run).measures("train")
    assert [measure.step for measure in train] == list(range(1, 41))
    assert train[38].loss == 9.0


def test_a_line_cut_off_by_a_kill_is_no_damage(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('{"kind": "train", "st')
    assert len(read_run(run).measures("train")) == 40


def test_keys_of_a_newer_version_are_no_damage(run: Path) -> None:
    written = json.loads((run / "summary.json").read_text()) | {"a_new_key": [1, 2]}
    (run / "summary.json").write_text(json.dumps(written))
    assert read_run(run).summary is not None


def test_no_folder_and_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such run folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(RunError, match="not a run folder"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "plan.json",
        "summary.json",
        "evaluation/kind.before.json",
        "evaluation/kind.after.json",
        "predictions/kind.before.jsonl",
        "predictions/kind.after.jsonl",
        "metrics.jsonl",
    ],
)
@pytest.mark.parametrize(
    "content", [b"{\n", b"\xff\xfe\x00", b"[1, 2]\n", b'{"kind": 3, "status": 3}\n', b"[" * 100_000 + b"\n"]
)
def test_damage_names_the_file(run: Path, name: str, content: bytes) -> None:
    (run / name).write_bytes(content)
    with pytest.raises(RunError) as caught:
        read_run(run)
    assert str(run / name) in str(caught.value)
    assert "remove it" in str(caught.value)


def test_damage_names_the_line_and_the_key(run: Path) -> None:
    lines = (run / "predictions" / "kind.after.jsonl").read_text().splitlines()
    lines[2] = lines[2].replace('"correct": true', '"correct": "perhaps"')
    (run / "predictions" / "kind.after.jsonl").write_text("\n".join(lines))
    with pytest.raises(RunError, match=r"line 3: 'correct'"):
        read_run(run)


def test_a_config_that_is_not_text(run: Path) -> None:
    (run / "config.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(RunError, match=r"config\.yaml"):
        read_run(run)


def test_a_confusion_table_that_does_not_fit_its_choices(run: Path, change) -> None:  # type: ignore[no-untyped-def]
    change("evaluation/kind.after.json", confusion=[[1, 2]])
    with pytest.raises(RunError, match="2 rows of 2 counts"):
        read_run(run)


@pytest.mark.parametrize("share", [7, -0.2])
def test_a_share_that_is_none(run: Path, change, share: float) -> None:  # type: ignore[no-untyped-def]
    change("evaluation/kind.after.json", accuracy=share)
    with pytest.raises(RunError, match=f"'accuracy' should be a share from 0 to 1, and is {share}"):
        read_run(run)


def test_two_kinds_of_result_for_one_test_set(run: Path) -> None:
    other = {"kind": "perplexity", "dataset": "kind", "rows": 6, "perplexity": 2.0}
    (run / "evaluation" / "kind.after.json").write_text(json.dumps(other))
    with pytest.raises(RunError, match=r"kind 'choice'.*kind 'perplexity'"):
        read_run(run)


@pytest.mark.parametrize(
    ("trained", "modules", "told"),
    [
        (700, 3, "3 modules adapted: 700 of 20,000,000 parameters trained (0.0035 %)"),
        (500_000, 1, "1 module adapted: 500,000 of 20,000,000 parameters trained (2.50 %)"),
        (0, 3, "3 modules adapted: 0 of 20,000,000 parameters trained (0.00 %)"),
    ],
)
def test_a_plan_in_a_line_names_any_share(run: Path, trained: int, modules: int, told: str) -> None:
    plan = read_run(run).plan
    assert plan is not None
    changed = {"trainable_parameters": trained, "total_parameters": 20_000_000, "modules": plan.modules[:modules]}
    assert plan.updated(**changed).headline == told
