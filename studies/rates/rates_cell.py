"""Trains the cells of the study, one after the other on one loaded model, as a run of ``trimtab finetune`` would."""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import set_seed

from rates_study import RateCell, RatesStudy
from trimtab import tasks
from trimtab.config.read import build_config
from trimtab.config.resolve import Job
from trimtab.config.run import RunConfig
from trimtab.data.batches import Collator
from trimtab.data.tokens import encode_all
from trimtab.errors import RunError
from trimtab.machine import versions
from trimtab.models.causal_head import IGNORED
from trimtab.models.load import load_model
from trimtab.models.model_files import load_tokenizer
from trimtab.runs.events import Listener
from trimtab.runs.rate_record import ChosenRate
from trimtab.runs.records import MetricsLine
from trimtab.surgery.attach import detach
from trimtab.surgery.contexts import evaluating
from trimtab.tasks import Head, Inputs
from trimtab.training.rate_trials import find_rate
from trimtab.training.trainer import AdapterTrainer

ROWS_AT_ONCE = 32


class Trainings:
    """Trains cell after cell; the model is loaded once, and is as it was after each of them."""

    def __init__(self, study: RatesStudy) -> None:
        self._study = study
        self._task = tasks.find("causal_lm")
        job = Job.of(self._config(RateCell(*study.pairs[0], 0, 0)))
        self._tokenizer = load_tokenizer(job.source)
        self._model: Any = load_model(job.source, job.dtype, job.config.model.attention)
        self._head = self._task.head(self._model)
        self._inputs: dict[str, Inputs] = {}

    def _config(self, cell: RateCell, **train: Any) -> RunConfig:
        study = self._study
        settings = study.settings(cell.task, cell.arm)
        settings["data"] = {
            "train": str(study.rows(cell.task, "train")),
            "validation": [str(study.rows(cell.task, "validation"))],
            "choices": None,
        }
        settings["train"] = {
            **settings["train"],
            "learning_rate": cell.rate,
            "seed": cell.seed,
            "log_every": 4,
            **train,
        }
        settings["output"] = str(study.state / "none")
        return build_config(settings, study.state, str(cell))

    def _read(self, cell: RateCell, job: Job) -> Inputs:
        if cell.task not in self._inputs:
            self._inputs[cell.task] = self._task.read(job, self._tokenizer, Listener())
        return self._inputs[cell.task]

    def find_rate(self, cell: RateCell, budget: float) -> ChosenRate:
        """What ``train.learning_rate: auto`` finds for the run of a cell (whose own rate plays no part)."""
        job = Job.of(self._config(cell, learning_rate="auto", tune={"budget": budget}))
        inputs = self._read(cell, job)
        return find_rate(job, inputs, self._model, listener=Listener())

    def run(self, cell: RateCell, rate: float | None = None) -> dict[str, Any]:
        """Train one cell, or the same at another ``rate``; gives what its file holds. ``loss`` is None where training
        diverged."""
        config = self._config(cell) if rate is None else self._config(cell, learning_rate=rate)
        job = Job.of(config)
        inputs = self._read(cell, job)
        began, worked = time.perf_counter(), time.process_time()
        lines: list[MetricsLine] = []
        set_seed(cell.seed)
        report = job.attach_to(self._model)
        try:
            with tempfile.TemporaryDirectory() as folder:
                trainer = AdapterTrainer(
                    self._model,
                    config.train,
                    inputs.rows,
                    task=self._task,
                    head=self._head,
                    reader=self._tokenizer,
                    folder=Path(folder),
                    record=lines.append,
                )
                trainer.args.save_strategy = "no"  # a cell is a minute: it is begun again and not resumed
                try:
                    trainer.train()
                except RunError:  # diverged
                    loss, exact = math.inf, 0.0
                else:
                    loss, exact = measure(self._head, self._tokenizer, inputs)
        finally:
            detach(self._model)
        return {
            "task": cell.task,
            "arm": cell.arm,
            "rate": config.train.rate,
            "seed": cell.seed,
            **self._study.identity(cell),
            "loss": round(loss, 6) if math.isfinite(loss) else None,
            "exact": round(exact, 6),
            "train": [[line.step, round(line.loss, 5)] for line in lines if line.loss is not None],
            "trained": report.trainable_parameters,
            "seconds": round(time.perf_counter() - began, 1),
            "processor_seconds": round(time.process_time() - worked, 1),
            "versions": versions(),
        }


def measure(head: Head, tokenizer: Any, inputs: Inputs) -> tuple[float, float]:
    """The loss of the validation rows' answers, in nats a token, and the share of answers that the model writes word
    for word: greedy writing gives an answer exactly where each of its tokens is the likeliest after those before."""
    rows = encode_all(inputs.validation, tokenizer, None)
    collate = Collator(pad_id=0)
    total, tokens, exact = 0.0, 0, 0
    with evaluating(head.model):
        for start in range(0, len(rows), ROWS_AT_ONCE):
            batch = collate([rows[at] for at in range(start, min(start + ROWS_AT_ONCE, len(rows)))])
            targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
            here, at = (targets != IGNORED).nonzero(as_tuple=True)
            logits = head.logits_at(batch["input_ids"], here * targets.shape[1] + at).float()
            wanted = targets[here, at]
            total += float(F.cross_entropy(logits, wanted, reduction="sum"))
            tokens += len(wanted)
            wrong = torch.zeros(len(targets)).index_add_(0, here, (logits.argmax(1) != wanted).float())
            exact += int((wrong == 0).sum())
    return total / tokens, exact / len(rows)
