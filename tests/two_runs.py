"""The runs that two processes do in the tests, and one beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sampling import sample
from tiny_runs import labelled, rows, write_config, write_rows

MODELS = {"chosen": "model", "written": "model", "heads": "encoder"}
SAID: dict[str, dict[str, Any]] = {
    # 21 rows in batches of 4: the last one has one row, and the second process none.
    "chosen": {
        "data": {"validation": 0.2},
        "train": {"epochs": 2, "early_stopping": 3, "average": 0.4, "save_every": 3, "gradient_accumulation": 2},
    },
    "written": {
        "train": {"epochs": 1, "prompt_loss_weight": 0.1, "group_by_length": False},
        "evaluation": {"max_new_tokens": 4},
        "plan": [
            {"match": "all-linear", "method": "mora", "rank": 4},
            {"match": "lm_head", "method": "full"},
        ],
    },
    "heads": {"data": {"validation": 0.2}, "train": {"epochs": 1, "class_weights": "balanced"}},
}
RUNS = sample(
    [(name, sharding) for name in SAID for sharding in ("full", "none")], 5, [("chosen", "none"), ("written", "full")]
)


def yaml_of(root: Path, name: str, place: str, **train: Any) -> Path:
    """The run called ``name``, into the folder ``place``."""
    said = {"chosen": rows, "written": lambda count: rows(count, "open"), "heads": labelled}[name]
    data = write_rows(root / f"{name}.jsonl", said(26))
    tests = {"asked": str(write_rows(root / f"{name}-asked.jsonl", said(35)[26:]))}
    sections = SAID[name]
    return write_config(
        root / f"{place}.yaml",
        root / MODELS[name],
        data,
        **{**sections, "data": {"test": tests, **sections.get("data", {})}, "train": {**sections["train"], **train}},
        output=str(root / place),
    )
