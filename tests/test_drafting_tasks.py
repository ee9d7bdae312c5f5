"""`trimtab init` writes a file for every task, found from the model and the rows, that trains as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny_encoders import write_encoder
from tiny_runs import labelled, write_rows
from tiny_seq2seq import pair_rows, write_t5
from trimtab import tasks
from trimtab.config.read import load_config
from trimtab.drafting import Wish, draft
from trimtab.runs.events import Listener
from trimtab.tasks import job_of


@pytest.mark.parametrize("task", ["sequence_classification", pytest.param("seq2seq", marks=pytest.mark.full)])
def test_the_draft_names_the_task_and_reads_back(tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if task == "seq2seq":
        write_t5(tmp_path / "model")
        write_rows(tmp_path / "rows.jsonl", pair_rows(20))
    else:
        write_encoder(tmp_path / "model")
        write_rows(tmp_path / "rows.jsonl", labelled(20))
    made = draft(Wish("model", ["rows.jsonl"], "rows.jsonl", "dora"), tmp_path / "run.yaml")
    assert f"task: {task} # found from the model and the rows" in made.text
    assert f"task: {task}" in made.notes
    (tmp_path / "run.yaml").write_text(made.text, "utf-8")
    assert job_of(load_config(tmp_path / "run.yaml")).task == task


def test_a_task_that_no_row_fits_is_told_by_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_encoder(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", [{"sentence": "a", "gold": "b"}])
    with pytest.raises(Exception, match=r"rows.jsonl, line 1: expected a label under 'label'.*data.columns"):
        draft(Wish("model", ["rows.jsonl"], None, "lora"), tmp_path / "run.yaml")


def test_the_draft_leaves_targets_that_are_longer_than_sources_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_t5(tmp_path / "model")
    write_rows(
        tmp_path / "rows.jsonl", [{"source": "fog", "target": "the pilot asks for a tug " * at} for at in (1, 9)]
    )
    made = draft(Wish("model", ["rows.jsonl"], "rows.jsonl", "lora"), tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text(made.text, "utf-8")
    job = job_of(load_config(tmp_path / "run.yaml"))
    targets = [row["labels"] for row in tasks.of(job).read(job, job.reader, Listener()).rows]
    assert len(targets[1]) > len(targets[0]) * 5
    assert job.max_length >= len(targets[1])
    assert job.config.evaluation.max_new_tokens >= len(targets[1])
