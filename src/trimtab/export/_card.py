"""The model card, README.md, of a folder that is handed over: how it was made, what was measured, how it is used.

Its head is the metadata that the hub reads. Nothing in it names a place on this machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from trimtab.data.sources import is_local
from trimtab.evaluation.agreement import Agreement
from trimtab.export._export_format import ExportFormat, Written
from trimtab.export._subject import Subject
from trimtab.metrics import METRICS, main_metric
from trimtab.models.load import side_files
from trimtab.models.locate import Source, hub_id
from trimtab.runs.read import Run, TestSet, read_run

_LONGEST = 2**16
ASKED = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForSeq2SeqLM": "text2text-generation",
}
"""What the hub calls what a model is asked for, by its class."""


def card(form: ExportFormat, subject: Subject, written: Written, agreement: Agreement | None, *, name: str) -> str:
    """The text of README.md, for a folder called ``name``."""
    run = read_run(subject.folder.path)
    base = base_of(subject.source)
    tags = ["trimtab", *(run.plan.methods if run.plan is not None else [])]
    results = [one for test in run.sets for one in _metadata_of(test, ASKED.get(subject.head.model_class, "other"))]
    data = ModelCardData(
        model_name=name if results else None,
        base_model=hub_id(subject.source),
        base_model_relation=form.relation if hub_id(subject.source) else None,
        library_name=form.library,
        license=_license(subject.source),
        pipeline_tag=ASKED.get(subject.head.model_class),
        datasets=_datasets(subject) or None,
        tags=list(dict.fromkeys(tags)),
        eval_results=results or None,
    )
    sections = [
        f"# {name}",
        f"{_first_up(form.summary)}. Made of {base} with [trimtab](https://pypi.org/project/trimtab/) "
        f"{metadata.version('trimtab')}.",
        "## How it was made",
        "\n".join(f"- {line}" for line in _made(subject, run, base)),
        "## What was measured",
        _measured(run),
        f"{_first_up(form.compared)}, {agreement}." if agreement is not None else "",
        "\n".join(f"- {_first_up(line)}" for line in (*written.done, *written.notes)),
        "## How it is used",
        written.use.strip(),
    ]
    return f"---\n{data.to_yaml().strip()}\n---\n\n" + "\n\n".join(part for part in sections if part) + "\n"


def base_of(source: Source) -> str:
    """What a card calls the base: its hub id, or the name of its folder or file."""
    return hub_id(source) or (Path(source.location).name if source.kind != "hub" else source.location)


def loaded_as(source: Source) -> str:
    """By what an example loads the base; a GGUF file is none that PEFT or mlx-lm load, so ``BASE`` stands there."""
    return "BASE" if source.kind == "gguf" else base_of(source)


def _made(subject: Subject, run: Run, base: str) -> Iterator[str]:
    train, summary = subject.config.train, subject.summary
    yield f"base: {base}" + (
        f", quantised ({subject.config.quantisation})" if subject.config.quantisation != "none" else ""
    )
    if run.plan is not None:
        for rule in run.plan.rules:
            options = ", ".join(f"{key} {value}" for key, value in rule.options.items() if value is not None)
            match = (
                rule.match
                if isinstance(rule.match, str)
                else ", ".join(rule.match[:4]) + (", ..." * (len(rule.match) > 4))
            )
            yield f"method: {rule.method} on `{match}` ({rule.modules} modules): {options}"
        yield run.plan.headline
    if summary is None:
        return
    if summary.train_rows is not None:
        tokens = f", {summary.train_tokens:,} tokens" if summary.train_tokens is not None else ""
        form = f" ({summary.form})" if summary.form else ""
        yield f"data: {summary.train_rows:,} training rows{form}{tokens}"
    rate = summary.learning_rate if summary.learning_rate is not None else train.learning_rate
    steps = f"{summary.steps:,} steps" if summary.steps is not None else "steps"
    batch = train.batch_size * train.gradient_accumulation
    yield f"training: {steps} of {batch} rows, learning rate {rate}, {train.schedule} schedule, seed {train.seed}"
    if summary.precision:
        yield f"precision: {summary.precision}"
    if summary.versions:
        yield "versions: " + ", ".join(f"{name} {version}" for name, version in summary.versions.items())


def _measured(run: Run) -> str:
    """A table of the run's test sets before and after training."""
    lines = []
    for test in run.sets:
        for metric in METRICS.values():
            before, after = (
                one.figures.get(metric.name) if one is not None else None for one in (test.before, test.after)
            )
            if after is None and before is None:
                continue
            rows = test.result.rows if test.result is not None else 0
            figures = f"{_number(metric.scale, before)} | {_number(metric.scale, after)}"
            lines.append(f"| {test.name} ({rows:,} rows) | {metric.axis} | {figures} |")
    if lines:
        return "\n".join(["| test set | metric | before | after |", "| --- | --- | --- | --- |", *lines])
    validations = [line for line in run.measures("validation") if line.loss is not None]
    if validations:
        best = min(line.loss for line in validations if line.loss is not None)
        return f"No test set was measured. The lowest loss on the validation rows was {best:.4f}."
    return "No test set was measured."


def _number(scale: int, value: float | None) -> str:
    return "" if value is None else f"{scale * value:.2f}"


def _metadata_of(test: TestSet, asked: str) -> Iterator[EvalResult]:
    """What the hub is told of one test set: its main metric after training."""
    if test.after is None or test.after.main is None:
        return
    metric = main_metric(test.after.kind)
    yield EvalResult(
        task_type=asked,
        dataset_type=test.name,
        dataset_name=test.name,
        metric_type=metric.name,
        metric_name=metric.label,
        metric_value=round(test.after.main, 6),
    )


def _datasets(subject: Subject) -> list[str]:
    """The hub's data sets among the training rows; a local file's name tells others nothing."""
    paths = [source.path for source in subject.config.data.train]
    return [re.split(r"[:\[]", path)[0] for path in paths if not is_local(path, Path.cwd())]


def _license(source: Source) -> str | None:
    """The license that the base's own card states; None where there is none at hand."""
    folder = side_files(source) if source.kind == "folder" else None
    file = folder / "README.md" if folder is not None else None
    if file is None or not file.is_file() or file.stat().st_size > _LONGEST:
        return None
    head = re.match(r"---\n(.*?)\n---", file.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        said: Any = yaml.safe_load(head[1]) if head is not None else None
    except yaml.YAMLError:
        return None
    name = said.get("license") if isinstance(said, dict) else None
    return name if isinstance(name, str) and re.fullmatch(r"[\w.-]{1,40}", name) else None


def _first_up(text: str) -> str:
    return text[:1].upper() + text[1:]
