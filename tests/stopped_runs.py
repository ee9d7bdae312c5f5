"""Runs that are stopped on the way, and what they left."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trimtab.config.run import RunConfig
from trimtab.errors import Interrupted
from trimtab.files import read_json, read_jsonl
from trimtab.runs.events import Listener
from trimtab.training.run import finetune

TIMED = {"seconds", "tokens_per_second", "memory_gib"}


class StopAt(Listener):
    """Sends SIGINT, as Ctrl-C does, after the training step ``step``, or when a stage of the run begins."""

    def __init__(self, step: int | None = None, stage: str | None = None, times: int = 1) -> None:
        self.at, self.name, self.times = step, stage, times

    def step(self, step: int, steps: int) -> None:
        if step == self.at:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)

    def stage(self, text: str) -> None:
        if self.name is not None and text.startswith(self.name):
            signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def signals_are_heard() -> Iterator[None]:
    """A process that a script starts in the background has SIGINT ignored; here it interrupts, as at a terminal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def adapter_of(config: RunConfig) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted((config.output / "adapter").glob("*.safetensors")):
        found |= load_file(file)
    assert found
    return found


def metrics_of(config: RunConfig) -> list[dict[str, Any]]:
    return [{key: row[key] for key in row if key not in TIMED} for row in read_jsonl(config.output / "metrics.jsonl")]


def interrupt(config: RunConfig, resume: bool = False, **where: Any) -> None:
    with pytest.raises(Interrupted, match=r"everything so far is in (.|\n)*trimtab finetune .*config\.yaml --resume"):
        finetune(config, resume=resume, listener=StopAt(**where))
    assert read_json(config.output / "summary.json")["status"] == "interrupted"
    assert (config.output / "report.html").is_file() == (where.get("times", 1) == 1)  # written unless hurried
