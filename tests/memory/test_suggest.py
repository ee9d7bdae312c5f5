"""The estimate of a run, and the changes that are suggested where it does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trimtab.config.read import load_config
from trimtab.config.resolve import Job
from trimtab.data.rows import Source
from trimtab.errors import DataError, ModelError
from trimtab.machine import GIB
from trimtab.memory import estimate
from trimtab.memory.described import describe_run
from trimtab.memory.estimate import MemoryEstimate, RunMemory, check_run, estimate_run, suggest
from trimtab.memory.trace import Trace
from trimtab.surgery.attach_report import AttachReport
from trimtab.tasks import RowSizes

NOTHING = AttachReport((), (), 0, 0)
SIZES = RowSizes(length=64, labels=63)
LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def job(make_yaml: Callable[..., Path]) -> Job:
    return Job.of(load_config(make_yaml(train={"batch_size": 8, "precision": "float32"})))


def changed(job: Job, **changes: Any) -> Job:
    """``job`` with other sections in its configuration."""
    return Job.of(job.config.model_copy(update=changes))


def fake(job: Job, sizes: RowSizes) -> RunMemory:
    """An estimate that goes with tokens, and that each setting makes less."""
    config = job.config
    size = 1000 * config.train.batch_size * sizes.length
    size //= 2 if config.train.gradient_checkpointing else 1
    size //= 2 if config.train.precision == "bfloat16" else 1
    size //= {"none": 1, "int8": 2, "nf4": 4}[config.quantisation]
    evaluated = MemoryEstimate(100 * config.evaluation.batch_size * sizes.tested, moment="evaluating")
    return RunMemory((MemoryEstimate(size, moment="training"), evaluated), NOTHING)


def test_what_is_needed_leaves_out_what_is_there_or_goes_back() -> None:
    size = MemoryEstimate(GIB, activations=GIB // 2, files=GIB, process=GIB, moment="training")
    assert size.total == 3.5 * GIB
    assert size.needed == 1.5 * GIB  # pages of files go back, and the process is there already
    assert size.told == "weights 1.00, activations 0.50"


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.6, ["train.gradient_checkpointing=true", "train.precision=bfloat16"]),
        (0.6, ["train.batch_size=4 train.gradient_accumulation=2", "quantisation=int8"]),
        (0.3, ["train.batch_size=2 train.gradient_accumulation=4", "quantisation=nf4"]),
        (0.02, ["train.gradient_checkpointing=true train.precision=bfloat16 quantisation=nf4 train.batch_size=2 "]),
    ],
)
def test_the_mildest_changes_that_fit(
    monkeypatch: pytest.MonkeyPatch, job: Job, share: float, expected: list[str]
) -> None:
    monkeypatch.setattr("trimtab.memory.estimate.estimate_run", fake)
    room = int(share * 1000 * 8 * 64)
    found = suggest(job, SIZES, room)
    assert all(suggestion.memory.hardest.needed <= room for suggestion in found)
    told = [suggestion.overrides for suggestion in found]
    for text in expected:
        assert any(line.startswith(text) for line in told), told


def test_fewer_rows_are_evaluated_at_once_where_that_takes_most(monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
    monkeypatch.setattr("trimtab.memory.estimate.estimate_run", fake)
    sizes = replace(SIZES, evaluated=True, tested=2000)
    needed = fake(job, SIZES).hardest.needed
    assert fake(job, sizes).hardest.needed > needed
    assert [one.overrides for one in suggest(job, sizes, needed)] == ["evaluation.batch_size=2"]
    (both,) = suggest(job, sizes, needed // 2)
    assert "evaluation.batch_size=1" in both.overrides
    assert "train.batch_size=" in both.overrides


def test_nothing_helps(monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
    monkeypatch.setattr("trimtab.memory.estimate.estimate_run", fake)
    assert suggest(job, SIZES, 1) == []


def test_a_run_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
    needed = estimate_run(job, SIZES).hardest.needed
    monkeypatch.setenv("TRIMTAB_MEMORY_GIB", str(0.7 * needed / GIB))
    with pytest.raises(ModelError, match=r"Training .* needs about .* What would help: train\.gradient_checkpointing"):
        check_run(job, SIZES)
    monkeypatch.setenv("TRIMTAB_MEMORY_GIB", "1")
    check_run(job, SIZES)


def test_a_model_that_cannot_be_traced_is_counted_without_activations(
    monkeypatch: pytest.MonkeyPatch, job: Job
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("values are needed\nhere")

    monkeypatch.setattr(Trace, "run", fail)
    found = estimate_run(job, SIZES)
    assert found.uncounted == "RuntimeError: values are needed"
    assert found.hardest.activations == 0
    assert found.hardest.optimiser == 2 * found.hardest.adapters > 0


def test_rows_are_read_where_they_are(monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
    known = estimate_run(job, SIZES)
    monkeypatch.setattr("trimtab.memory.described.estimate_run", lambda *_: known)
    found = describe_run(job)["memory"]
    assert found["length_from"] == "the longest row"
    assert found["length"] < job.max_length
    assert found["fits"]
    assert describe_run(job, 100)["memory"]["length"] == 100
    gone = changed(job, data=job.config.data.model_copy(update={"train": (Source(path="gone.jsonl"),)}))
    assert describe_run(gone)["memory"]["length"] == job.max_length
    assert describe_run(gone)["rows"] is None
    twice = changed(
        job,
        data=job.config.data.model_copy(
            update={"train": (job.config.data.train[0], Source(path=job.config.data.train[0].path, weight=2))}
        ),
    )
    rows = describe_run(twice)["rows"]
    count = rows["sources"][0]["rows"]
    assert [source["weight"] for source in rows["sources"]] == [1.0, 2.0]
    assert rows["an_epoch"] == sum(source["an_epoch"] for source in rows["sources"])
    assert rows["validation"] + sum(source["training"] for source in rows["sources"]) == 2 * count
    assert "There is no data file gone.jsonl" in describe_run(gone)["memory"]["length_from"]


@pytest.fixture
def llama_8b(tmp_path: Path) -> Job:
    """A run of Llama-3.1-8B, of which nothing but the configuration is there."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_1_8B))
    (tmp_path / "run.yaml").write_text(
        f"model: {tmp_path}\ndata: {{train: none.jsonl, validation: null}}\n"
        "train: {precision: bfloat16, gradient_checkpointing: true, batch_size: 2}\n"
    )
    return Job.of(load_config(tmp_path / "run.yaml"))


@pytest.mark.full
def test_llama_3_1_8b_from_its_config_alone(llama_8b: Job) -> None:
    plain = estimate_run(llama_8b, RowSizes(1024, 1023)).hardest
    assert plain.weights == pytest.approx(16.06e9, rel=1e-3)  # 8,030,261,248 numbers of two bytes
    # 32 inputs of blocks, [2, 1024, 4096] in two bytes, and less than 2 GiB for one block and the logits.
    assert 32 * 2 * 1024 * 4096 * 2 < plain.activations < 32 * 2 * 1024 * 4096 * 2 + 2 * GIB


@pytest.mark.full
def test_llama_3_1_8b_in_nf4(llama_8b: Job) -> None:
    packed = estimate_run(changed(llama_8b, quantisation="nf4"), RowSizes(1024, 1023)).hardest
    linear, rest = 6_979_321_856, 2 * 128256 * 4096
    assert packed.weights == pytest.approx(linear * 0.516 + rest * 2, rel=0.01)


def test_files_are_counted_where_weights_are_converted(job: Job) -> None:
    halves = changed(job, model=job.config.model.model_copy(update={"dtype": "bfloat16"}))
    whole, half = (estimate_run(each, SIZES).moments[0] for each in (job, halves))
    assert (whole.files, half.files) == (0, 2 * half.weights)
    assert half.process > estimate.BEYOND


def test_rows_that_are_there_and_cannot_be_read_are_an_error_of_the_plan(job: Job, tmp_path: Path) -> None:
    (bad := tmp_path / "bad.jsonl").write_text('{"frage": "one?", "antwort": "two"}\n')
    unread = changed(job, data=job.config.data.model_copy(update={"train": (Source(path=str(bad)),)}))
    with pytest.raises(DataError, match=r"bad\.jsonl, line 1: no known form has these keys: frage, antwort"):
        describe_run(unread)
