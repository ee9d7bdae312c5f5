"""Regression: numbers of any size are learned alike, and said in their own units wherever the model is kept."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from scipy import stats

from run_fixtures import counted_memory, make_bare
from tiny_encoders import write_encoder
from tiny_runs import Kept, write_model, write_rows
from trimtab import tasks
from trimtab.config.read import build_config
from trimtab.data.labelled import Labelled
from trimtab.data.rows import Row
from trimtab.errors import ConfigError, DataError
from trimtab.files import write_json
from trimtab.models.load import load_model
from trimtab.models.locate import ModelHead
from trimtab.reports.run.run_page import write_run_page
from trimtab.reports.run.run_tables import answers_table, evaluation_table, results_table
from trimtab.reports.shared.words import number
from trimtab.runs.load import load_run_model
from trimtab.runs.read import read_run, read_sets
from trimtab.surgery.attach import trained_tensors
from trimtab.tasks._answer import of_logits
from trimtab.tasks.regression import Regression
from trimtab.training.optimizer import make_optimizer
from trimtab.training.run import finetune

WORDS = ("calm", "wind", "fog", "storm")


def numbered(count: int, centre: float = 0.0, spread: float = 1.0) -> list[dict[str, Any]]:
    """Rows whose first word decides the number: four values around ``centre``."""
    values = [centre + spread * step for step in (-1.3, -0.4, 0.4, 1.3)]
    return [
        {"text": f"{WORDS[at % 4]} over berth {at % 7}", "label": values[at % 4] + 0.001 * spread * at}
        for at in range(count)
    ]


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
            "task": "regression",
            "model": {"name": str(tmp_path / "encoder")},
            "data": {"train": "train.jsonl", "test": {"test": "test.jsonl"}, "validation": None},
            "plan": [{"match": "*.query", "method": "lora", "rank": 2}],
            "train": {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1, **train},
            "output": output,
        }

    return make


def run(configuration: dict[str, Any], **more: Any) -> tuple[Any, Kept]:
    told = Kept()
    folder = finetune(build_config(configuration, Path.cwd(), "run.yaml"), listener=told, **more)
    return folder, told


def answers(folder: Any, stage: str = "after") -> list[float]:
    known = next(iter(read_sets(folder.path)))
    rows = known.rows_after if stage == "after" else known.rows_before
    return [float(row.predicted) for row in rows]


def test_numbers_far_from_zero_are_learned_as_those_around_it(said: Callable[..., dict[str, Any]]) -> None:
    plain, _ = run(said(numbered(24), output="plain", epochs=3))
    moved, _ = run(said(numbered(24, centre=5e3, spread=250.0), output="moved", epochs=3))
    tiny, _ = run(said(numbered(24, centre=-0.02, spread=1e-3), output="tiny", epochs=3))
    wanted = answers(plain)
    # Means and deviations of the same numbers differ by rounding only, and the predictions carry eight digits.
    assert [(one - 5e3) / 250.0 for one in answers(moved)] == pytest.approx(wanted, abs=2e-4)
    assert [(one + 0.02) / 1e-3 for one in answers(tiny)] == pytest.approx(wanted, abs=2e-4)
    first, last = (json.loads(line)["loss"] for line in moved.metrics.read_text().splitlines()[:: len(wanted) - 1][:2])
    assert last < first
    losses = [
        [json.loads(line)["loss"] / unit**2 for line in folder.metrics.read_text().splitlines()]
        for folder, unit in ((plain, 1.0), (moved, 250.0), (tiny, 1e-3))
    ]
    for others in losses[1:]:
        assert losses[0] == pytest.approx(others, rel=2e-3)


def test_the_figures_are_those_of_scipy_and_of_a_plain_formula(said: Callable[..., dict[str, Any]]) -> None:
    folder, _ = run(said(numbered(24, centre=40.0, spread=3.0)))
    known = next(iter(read_sets(folder.path)))
    truth = [float(row.answer) for row in known.rows_after]
    given = answers(folder)
    errors = [a - b for a, b in zip(truth, given, strict=True)]
    figures = known.after.figures
    assert figures["rmse"] == pytest.approx(math.sqrt(sum(e * e for e in errors) / len(errors)), rel=1e-5)
    assert figures["loss"] == pytest.approx(figures["rmse"] ** 2, rel=1e-5)
    assert figures["mean_absolute_error"] == pytest.approx(sum(map(abs, errors)) / len(errors), rel=1e-5)
    assert figures["pearson"] == pytest.approx(stats.pearsonr(truth, given).statistic, abs=1e-5)
    assert figures["spearman"] == pytest.approx(stats.spearmanr(truth, given).statistic, abs=1e-6)
    assert all(row.correct is None for row in known.rows_after)
    assert known.after.spread == pytest.approx(torch.tensor(truth, dtype=torch.float64).std(correction=0).item())


def test_the_tables_and_the_page_of_a_run_show_numbers(said: Callable[..., dict[str, Any]]) -> None:
    folder, _ = run(said(numbered(12, centre=40.0, spread=3.0), epochs=1))
    known = read_run(folder.path)
    console = Console(width=140, file=io.StringIO(), force_terminal=False)
    console.print(results_table(known), answers_table(known), evaluation_table(known.sets[0].after))
    shown = console.file.getvalue()
    assert "RMSE" in shown
    assert "Spearman correlation" in shown
    assert "✗" not in shown
    write_run_page(folder.path)
    page = (folder.path / "report.html").read_text()
    assert "mean absolute error" in page.lower()
    assert ">✗<" not in page
    after = known.sets[0].after
    assert (after.figures["rmse"] >= after.spread) == ("No better than" in page)
    told = f"always answering the mean would give {number(after.spread)}"
    assert told in page
    assert f"{number(after.spread)} (the mean)" in shown
    file = next((folder.path / "evaluation").glob("*.after.json"))
    for rmse, worse in ((after.spread / 2, False), (after.spread, True)):
        write_json(file, {**json.loads(file.read_text(encoding="utf-8")), "rmse": rmse})
        write_run_page(folder.path)
        assert ("No better than" in (folder.path / "report.html").read_text(encoding="utf-8")) == worse


def test_a_new_head_begins_around_the_mean(said: Callable[..., dict[str, Any]]) -> None:
    folder, _ = run(said(numbered(24, centre=1e4, spread=10.0)))
    assert all(abs(number - 1e4) < 30 for number in answers(folder, "before"))


def test_what_is_loaded_again_says_the_same_numbers(said: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    configuration = said(numbered(24, centre=700.0, spread=20.0))
    folder, _ = run(configuration)
    config = build_config(configuration, Path.cwd(), "run.yaml")
    model = load_run_model(folder, config, adapter=True)
    task = tasks.find("regression")
    reader = tasks.job_of(config).reader
    rows = [Labelled("r", at + 1, row["label"], text=row["text"]) for at, row in enumerate(numbered(24)[:9])]
    with torch.no_grad():
        again = model(**task.collator(reader)(task.encode(rows, reader, None, None))).logits.flatten().tolist()
    assert again == pytest.approx(answers(folder), rel=1e-6)


def test_a_run_that_is_resumed_ends_as_one_that_was_not(said: Callable[..., dict[str, Any]]) -> None:
    rows = numbered(16, centre=300.0, spread=5.0)
    whole, _ = run(said(rows, output="whole", epochs=4, save_every=4))
    configuration = said(rows, output="cut", epochs=4, save_every=4)
    # Killed after its second checkpoint: what came later is gone.
    folder, _ = run(configuration)
    for later in ("checkpoint-12", "checkpoint-16"):
        for file in sorted((folder.checkpoints / later).rglob("*"), reverse=True):
            file.unlink()
    for name in ("adapter", "evaluation", "predictions"):
        for file in (folder.path / name).rglob("*"):
            file.unlink()
    summary = json.loads(folder.summary.read_text())
    folder.summary.write_text(json.dumps({**summary, "status": "interrupted", "trained": False}))
    again, _ = run(configuration, resume=True)
    assert answers(again) == answers(whole)


def test_the_loss_is_that_of_transformers_own_head(said: Callable[..., dict[str, Any]]) -> None:
    configuration = said(numbered(8, centre=30.0, spread=4.0))
    job = tasks.job_of(build_config(configuration, Path.cwd(), "run.yaml"))
    task = Regression()
    reader = job.reader
    inputs = task.read(job, reader, Kept())
    job = job.read_for(task.head_for(job, inputs))
    model = load_model(job.source)
    batch = task.collator(reader)(list(inputs.rows))
    own = model(**{name: tensor for name, tensor in batch.items() if name != "weight"}).loss
    assert model.config.problem_type == "regression"
    # One sum of eight squares in float32, in another order.
    torch.testing.assert_close(task.loss(model, batch), own, rtol=1e-6, atol=0)
    task.loss(model, batch).backward()
    mine = model.classifier.weight.grad.clone()
    model.zero_grad()
    own.backward()
    spread = job.source.head.spread
    torch.testing.assert_close(mine * spread**2, model.classifier.weight.grad, rtol=1e-5, atol=1e-5)


def test_the_last_layer_moves_in_units_of_the_spread_and_decays_as_it_would(
    said: Callable[..., dict[str, Any]],
) -> None:
    config = build_config(said(numbered(8, spread=50.0), weight_decay=0.1), Path.cwd(), "run.yaml")
    job = tasks.job_of(config)
    task = tasks.of(job)
    job = job.read_for(task.head_for(job, task.read(job, job.reader, Kept())))
    model = load_model(job.source)
    job.attach_to(model)
    spread = job.source.head.spread
    assert {one.unit for one in trained_tensors(model).values()} == {1.0, spread}
    of_head = [group for group in make_optimizer(model, config.train).param_groups if group["lr"] > 0.1]
    assert [group["lr"] * group["weight_decay"] for group in of_head] == pytest.approx([1e-2 * 0.1, 0.0])
    assert of_head[0]["lr"] == pytest.approx(1e-2 * spread)


@pytest.mark.parametrize(
    ("label", "said_of_it"),
    [
        ("three", "expected a number under 'label', got 'three'"),
        ("1,5", "A decimal point is a point"),
        (float("nan"), "expected a number of at most 1e.15"),
        (float("inf"), "expected a number of at most 1e.15"),
        (10**400, "expected a number of at most 1e.15"),
        (True, "expected a number under 'label', got True"),
        (None, "got nothing"),
        ("", "got nothing"),
        ([1.0], r"got \[1.0\]"),
        ("nan", "expected a number"),
        ("1_000", "expected a number"),
    ],
)
def test_what_is_no_number_is_refused_with_its_row(label: object, said_of_it: str) -> None:
    with pytest.raises(DataError, match=rf"^f.csv, row 7: .*{said_of_it}"):
        Regression().example(Row("f.csv", 7, "f.csv, row 7", {"text": "a", "label": label}))


@pytest.mark.parametrize(("label", "number"), [("3.5", 3.5), (" -2 ", -2.0), (4, 4.0), ("1e3", 1000.0), (".5", 0.5)])
def test_texts_that_are_numbers_are_used(label: object, number: float) -> None:
    assert Regression().example(Row("f.csv", 1, "f.csv, row 1", {"text": "a", "label": label})).label == number


def test_rows_of_one_number_have_nothing_to_learn(said: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(DataError, match=r"train.jsonl: every row has the number 2.5: nothing to learn"):
        run(said([{"text": word, "label": 2.5} for word in WORDS]))


def test_a_correlation_with_one_number_is_refused(said: Callable[..., dict[str, Any]]) -> None:
    configuration = said(numbered(8), metric="pearson")
    write_rows(Path("one.jsonl"), [{"text": text, "label": 2.5} for text in ("calm", "fog")])
    configuration["data"]["validation"] = "one.jsonl"
    with pytest.raises(ConfigError, match=r"pearson needs validation rows with different numbers, .* \(2.5\)"):
        run(configuration)


def test_a_number_that_marks_a_place_without_label_is_learned_all_the_same(
    said: Callable[..., dict[str, Any]],
) -> None:
    task = Regression()
    reader = tasks.job_of(build_config(said(numbered(8)), Path.cwd(), "run.yaml")).reader
    rows = task.encode([Labelled("r", 1, -100.0, text="fog"), Labelled("r", 2, 1.0, text="calm")], reader, None, None)
    labels = task.collator(reader)(rows)["labels"]
    assert (labels != -100).all()
    assert labels[0] == pytest.approx(-100.0, abs=1e-4)


def test_numbers_that_are_not_whole_mean_regression_wherever_they_stand(said: Callable[..., dict[str, Any]]) -> None:
    for labels, task in (([1, 2, 2.5, 1], "regression"), ([1, 2, 1, 2], "sequence_classification")):
        rows = [{"text": word, "label": label} for word, label in zip(WORDS, labels, strict=True)]
        configuration = {**said(rows), "task": "auto"}
        assert tasks.job_of(build_config(configuration, Path.cwd(), "run.yaml")).task == task


def test_many_whole_numbers_taken_for_classes_are_told_about(said: Callable[..., dict[str, Any]]) -> None:
    rows = [{"text": f"{WORDS[at % 4]} {at}", "label": at % 8} for at in range(24)]
    configuration = {**said(rows), "task": "auto"}
    job = tasks.job_of(build_config(configuration, Path.cwd(), "run.yaml"))
    inputs = tasks.of(job).read(job, job.reader, Kept())
    assert "8 whole numbers" in inputs.notes[0]


def test_a_run_computes_in_float32_unless_it_is_told_otherwise_and_says_what_is_lost(
    said: Callable[..., dict[str, Any]],
) -> None:
    rows = numbered(8, centre=1000.0, spread=2.0)
    for precision, computed in (("auto", "float32"), ("bfloat16", "bfloat16")):
        job = tasks.job_of(build_config(said(rows, precision=precision), Path.cwd(), "run.yaml"))
        task = tasks.of(job)
        notes = task.read(job, job.reader, Kept()).notes
        assert job.precision == computed
        assert any("told apart only by" in note for note in notes) == (precision == "bfloat16")


def test_a_causal_model_has_no_bias_for_the_mean_and_learns_it(said: Callable[..., dict[str, Any]]) -> None:
    configuration = said(numbered(24, centre=50.0, spread=4.0), epochs=6)
    write_model(Path("llama"), tie_word_embeddings=False)
    configuration["model"]["name"] = "llama"
    configuration["plan"][0]["match"] = "*.q_proj"
    folder, told = run(configuration)
    assert any("no bias" in text for text in told.remarks)
    known = next(iter(read_sets(folder.path)))
    assert known.after.figures["rmse"] < 0.7 * known.before.figures["rmse"]


def test_memory_is_counted(said: Callable[..., dict[str, Any]]) -> None:
    memory = counted_memory(build_config(said(numbered(8)), Path.cwd(), "run.yaml"))
    assert memory.uncounted is None
    assert {estimate.moment for estimate in memory.moments} == {"loading", "evaluating", "training"}


@pytest.mark.parametrize("said", [3.25e-9, 0.125, 136.68, 1234567.0])
def test_a_number_of_any_size_is_answered_with_all_its_digits(said: float) -> None:
    answer = of_logits(torch.tensor([said]), ModelHead(Regression.model_class, "regression"))
    assert answer.fields["label"] == float(answer.text) == pytest.approx(said, rel=1e-6)
