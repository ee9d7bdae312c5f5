"""A small run folder whose every figure is known by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimtab.files import write_json, write_jsonl, write_text

PROMPT = "Instruction: Is the review kind?\nInput: {}\nAnswer: "
REVIEWS = [
    "A warm little film",
    "Two hours of rain",
    "I laughed twice",
    "It has an ending",
    "A cold soup of a plot",
    "Kind to all",
]
# true answer, answer before, answer after
ANSWERS = [
    ("yes", "no", "yes"),
    ("no", "no", "no"),
    ("yes", "no", "yes"),
    ("no", "no", "yes"),
    ("no", "yes", "yes"),
    ("yes", "no", "yes"),
]

PLAN: dict[str, Any] = {
    "total_parameters": 20_000,
    "trainable_parameters": 700,
    "rules": [
        {
            "rule": 1,
            "method": "dora",
            "match": "all-linear",
            "layers": "all",
            "options": {"rank": 4, "alpha": 8.0, "detach_norm": True},
            "modules": 2,
            "parameters": 600,
        },
        {
            "rule": 2,
            "method": "mora",
            "match": ["*.v_proj", "*.o_proj"],
            "layers": "outer:1",
            "modules": 1,
            "parameters": 100,
        },
    ],
    "modules": [
        {"module": "layers.0.q_proj", "method": "dora", "rule": 1, "out": 12, "in": 16, "parameters": 300},
        {"module": "layers.1.q_proj", "method": "dora", "rule": 1, "out": 12, "in": 16, "parameters": 300},
        {"module": "layers.0.v_proj", "method": "mora", "rule": 2, "out": 8, "in": 16, "parameters": 100},
    ],
}

SUMMARY: dict[str, Any] = {
    "status": "finished",
    "model": "tiny-model",
    "created": "2025-03-04T05:06:07+00:00",
    "steps": 40,
    "epochs": 2.0,
    "training_seconds": 75.0,
    "total_seconds": 90.0,
    "peak_memory_gib": 1.25,
    "total_parameters": 20_000,
    "trainable_parameters": 700,
    "adapter_bytes": 123_456,
    "precision": "float32",
    "best_step": 20,
    "train_rows": 320,
    "validation_rows": 32,
    "train_tokens": 9_876,
    "versions": {"trimtab": "0.1.0", "torch": "2.9.0"},
    "machine": {"processor": "An Honest Processor", "cores": 2, "memory_gib": 7.5},
}

# Right before: rows 2 and 4. Right after: rows 1, 2, 3 and 6.
BEFORE: dict[str, Any] = {
    "kind": "choice",
    "dataset": "kind",
    "rows": 6,
    "choices": ["no", "yes"],
    "accuracy": 2 / 6,
    "macro_f1": 0.25,
    "weighted_f1": 0.25,
    "per_class": {
        "no": {"precision": 0.4, "recall": 2 / 3, "f1": 0.5, "rows": 3},
        "yes": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "rows": 3},
    },
    "confusion": [[2, 1], [3, 0]],
    "majority": {"answer": "no", "accuracy": 0.5},
    "perplexity": 4.0,
    "seconds": 1.0,
}
AFTER: dict[str, Any] = {
    **BEFORE,
    "accuracy": 4 / 6,
    "macro_f1": 0.625,
    "weighted_f1": 0.625,
    "per_class": {
        "no": {"precision": 1.0, "recall": 1 / 3, "f1": 0.5, "rows": 3},
        "yes": {"precision": 0.6, "recall": 1.0, "f1": 0.75, "rows": 3},
    },
    "confusion": [[1, 2], [0, 3]],
    "perplexity": 2.0,
}


def predictions(side: int) -> list[dict[str, Any]]:
    """The rows with the answers of one side: 1 is before, 2 is after."""
    return [
        {
            "row": number,
            "prompt": PROMPT.format(review),
            "answer": given[0],
            "predicted": given[side],
            "correct": given[side] == given[0],
            "scores": {"no": -1.0, "yes": -1.0},
        }
        for number, (review, given) in enumerate(zip(REVIEWS, ANSWERS, strict=True), start=1)
    ]


def metrics() -> list[dict[str, Any]]:
    """Forty steps over two epochs: the loss falls from 2.00 in equal steps; validation at 20 and 40."""
    lines: list[dict[str, Any]] = []
    for step in range(1, 41):
        rate = 1e-3 * (1 - step / 40)
        lines.append(
            {"kind": "train", "step": step, "epoch": step / 20, "loss": 2.04 - step / 25, "learning_rate": rate}
            | {"grad_norm": 1.0, "tokens_per_second": 1000.0 + step, "seconds": 2.0 * step, "memory_gib": 1.0}
        )
        if step == 20:
            lines.append(
                {"kind": "validation", "step": 20, "epoch": 1.0, "loss": 0.5, "accuracy": 0.75, "macro_f1": 0.7}
            )
        if step == 40:
            lines.append(
                {"kind": "validation", "step": 40, "epoch": 2.0, "loss": 0.6, "accuracy": 0.8125, "macro_f1": 0.8}
            )
    return lines


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with one closed test set, "kind"."""
    folder = tmp_path / "run"
    write_text(folder / "config.yaml", "model: tiny-model\nseed: 7\n")
    write_json(folder / "plan.json", PLAN)
    write_jsonl(folder / "metrics.jsonl", metrics())
    write_json(folder / "summary.json", SUMMARY)
    write_json(folder / "adapter" / "adapter_config.json", {})
    write_json(folder / "evaluation" / "kind.before.json", BEFORE)
    write_json(folder / "evaluation" / "kind.after.json", AFTER)
    write_jsonl(folder / "predictions" / "kind.before.jsonl", predictions(1))
    write_jsonl(folder / "predictions" / "kind.after.jsonl", predictions(2))
    return folder


@pytest.fixture
def change(run: Path) -> Callable[..., None]:
    """Write some keys of a JSON file of the run anew."""

    def rewrite(name: str, **keys: Any) -> None:
        known = {"summary.json": SUMMARY, "plan.json": PLAN, "evaluation/kind.after.json": AFTER}
        write_json(run / name, known[name] | keys)

    return rewrite


@pytest.fixture
def open_run(tmp_path: Path) -> Path:
    """A finished run with open answers and one with plain text, and no validation."""
    folder = tmp_path / "open"
    write_json(folder / "summary.json", SUMMARY | {"best_step": None})
    result = {"kind": "generation", "dataset": "test", "rows": 4, "perplexity": 8.0, "seconds": 1.0}
    write_json(folder / "evaluation" / "test.before.json", result | {"exact_match": 0.0, "unusable": 0.5})
    write_json(
        folder / "evaluation" / "test.after.json", result | {"exact_match": 0.5, "unusable": 0.25, "perplexity": 6.0}
    )
    row = {"prompt": "Name a colour", "answer": "red"}
    before = [row | {"row": n, "predicted": "", "correct": False, "usable": False} for n in range(1, 5)]
    after = [row | {"row": n, "predicted": "red" if n > 2 else "blue blue blue", "correct": n > 2} for n in range(1, 5)]
    after[0]["usable"] = False
    write_jsonl(folder / "predictions" / "test.before.jsonl", before)
    write_jsonl(folder / "predictions" / "test.after.jsonl", after)
    text = {"kind": "perplexity", "dataset": "tales", "rows": 3, "tokens": 1234, "seconds": 1.0}
    write_json(folder / "evaluation" / "tales.before.json", text | {"perplexity": 20.0})
    write_json(folder / "evaluation" / "tales.after.json", text | {"perplexity": 15.0})
    return folder


@pytest.fixture
def exam_run(tmp_path: Path) -> Path:
    """A finished run whose test rows bring their own choices."""
    folder = tmp_path / "exam"
    write_json(folder / "summary.json", SUMMARY)
    result = {"kind": "multiple_choice", "dataset": "exam", "rows": 4, "chance": 0.25, "seconds": 1.0}
    before = {"accuracy": 0.25, "accuracy_norm": 0.5, "perplexity": 20.0}
    after = {"accuracy": 0.75, "accuracy_norm": 1.0, "perplexity": 15.0}
    write_json(folder / "evaluation" / "exam.before.json", result | before)
    write_json(folder / "evaluation" / "exam.after.json", result | after)
    row = {"prompt": "Question: Which lamp?\nAnswer: ", "answer": "the red one"}
    for stage, right in (("before", 1), ("after", 3)):
        said = [row | {"row": n, "predicted": "the red one" if n <= right else "none"} for n in range(1, 5)]
        write_jsonl(
            folder / "predictions" / f"exam.{stage}.jsonl", [one | {"correct": one["row"] <= right} for one in said]
        )
    return folder
