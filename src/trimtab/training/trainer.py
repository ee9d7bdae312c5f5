"""transformers' Trainer, told how adapters are trained, saved and validated. The loop, accumulation, clipping,
schedules and resume are its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from trimtab.adapters.store import load_adapter, save_adapter
from trimtab.data.batches import Collator, LengthGroupedBatches
from trimtab.data.rows import EncodedRow
from trimtab.data.tokens import EncodedRows
from trimtab.errors import RunError
from trimtab.methods import RateGroup
from trimtab.surgery.attach import rate_groups, trainable_parameters
from trimtab.tasks import Head
from trimtab.training.averaging import Averaging
from trimtab.training.compiling import plainly
from trimtab.training.throughput import Lap, Pace

BEST = "best"
"""Folder, beside the checkpoints, of the adapter of the best validation."""


def parameter_groups(
    model: nn.Module, learning_rate: float, magnitude_learning_rate: float | None, b_ratio: float, weight_decay: float
) -> list[dict[str, Any]]:
    """The trained tensors in groups of one learning rate each; each method says which of its tensors is in which.

    Magnitudes have their own rate and, like biases, never decay. The second factor of a low-rank update has ``b_ratio``
    times the rate (LoRA+, arXiv 2402.12354). Empty groups are left out.
    """
    # In this order: the first group's rate is logged, and an optimiser's state on disk counts through the groups.
    rates: dict[RateGroup, tuple[float, float]] = {
        "weight": (learning_rate, weight_decay),
        "bias": (learning_rate, 0.0),
        "second factor": (learning_rate * b_ratio, weight_decay),
        "magnitude": (learning_rate if magnitude_learning_rate is None else magnitude_learning_rate, 0.0),
    }
    known = rate_groups(model)
    groups: dict[RateGroup, list[nn.Parameter]] = {group: [] for group in rates}
    for name, parameter in trainable_parameters(model).items():
        groups[known[name]].append(parameter)
    return [
        {"params": groups[group], "lr": rate, "weight_decay": decay}
        for group, (rate, decay) in rates.items()
        if groups[group]
    ]


class AdapterTrainer(Trainer):
    """A Trainer whose checkpoints hold the adapter alone, and whose validation is ours.

    Args:
        model: a causal language model that carries adapters.
        args: transformers' arguments; ``metric_for_best_model`` names a key of what ``validate`` returns.
        rows: the training rows.
        collator: makes batches.
        groups: the optimiser's parameter groups.
        head: computes the loss at the labels.
        validate: gives the validation metrics (without prefix), or None for no validation.
        record: is given each line for ``metrics.jsonl``, which it completes with the time.
        group_by_length: batches of like lengths.
        averaging: what is validated and kept, where the adapter is averaged over the last part of training.
        best_loss: validation loss of the best step of a run that is resumed.
        prompt_loss_weight: what a token of ``prompt_labels`` counts beside one of ``labels``; the loss is the sum over
            the number of ``labels`` (arXiv 2405.14394 trains on both alike).
        pace: counts tokens and seconds here; None: one of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        rows: EncodedRows,
        collator: Collator,
        groups: list[dict[str, Any]],
        head: Head,
        validate: Callable[[], Mapping[str, float]] | None,
        record: Callable[[dict[str, Any]], None],
        group_by_length: bool,
        averaging: Averaging,
        callbacks: Sequence[TrainerCallback] = (),
        best_loss: float = math.inf,
        prompt_loss_weight: float = 0.0,
        pace: Pace | None = None,
    ) -> None:
        self._pace = pace or Pace()
        self._adapted = model
        self._collator = collator
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows,
            # Only its presence is asked for: evaluate() is ours.
            eval_dataset=rows if validate is not None else None,
            data_collator=self._collate,
            callbacks=[averaging, *callbacks],
        )
        self.remove_callback(PrinterCallback)
        self._averaging = averaging
        self._best_loss = best_loss
        self._prompt_loss_weight = prompt_loss_weight
        self._groups = groups
        self._head = head
        self._validate_rows = validate
        self._record = record
        self._group_by_length = group_by_length
        self._since_last_log = Lap(self._pace)
        # The loss below is a sum over labels divided by the labels of the whole accumulated batch.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def _collate(self, rows: Sequence[EncodedRow]) -> dict[str, Tensor]:
        self._pace.add(sum(len(row["input_ids"]) for row in rows))
        return self._collator(rows)

    def get_train_dataloader(self) -> DataLoader:
        rows: Any = self.train_dataset
        if not self._group_by_length:
            generator = torch.Generator().manual_seed(self.args.seed)
            loader = DataLoader(
                rows,
                self.args.train_batch_size,
                sampler=RandomSampler(rows, generator=generator),
                collate_fn=self._collate,
            )
        else:
            batches = LengthGroupedBatches(rows.lengths, self.args.train_batch_size, self.args.seed)
            loader = DataLoader(rows, batch_sampler=batches, collate_fn=self._collate)
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self._groups, fused=True)
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        prompts = inputs.pop("prompt_labels", None)
        if model is not self.model:
            if prompts is not None:
                raise RunError("train.prompt_loss_weight is for one process; set it to 0 where several train one model")
            # Wrapped for several processes: its hooks run in the model's own forward only.
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = self._head.loss_at_labels(
            inputs["input_ids"],
            inputs["labels"],
            num_items=num_items_in_batch,
            lesser=prompts,
            weight=self._prompt_loss_weight,
        )
        return (loss, None) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Validate, write the line, and hand the metrics on under the prefix that the Trainer expects."""
        assert self._validate_rows is not None
        with self._pace.paused(), self._averaging.in_place(), plainly():
            found = dict(self._validate_rows())
        self._record(
            {
                "kind": "validation",
                "step": self.state.global_step,
                "epoch": round(self.state.epoch or 0.0, 4),
                **found,
            }
        )
        metrics = {f"eval_{name}": value for name, value in found.items()}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As transformers has it, but of two steps that are equally good by the metric the one with the lower loss is
        best."""
        key, loss = f"eval_{self.args.metric_for_best_model}", metrics["eval_loss"]
        ties = metrics[key] == self.state.best_metric and loss < self._best_loss
        is_best = super()._determine_best_metric(metrics, trial) or ties
        if is_best:
            self._best_loss = loss
            self.state.best_global_step = self.state.global_step
            with self._averaging.in_place():
                save_adapter(self._adapted, Path(str(self.args.output_dir)) / BEST)
        return is_best

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write a line of metrics; transformers' own summary at the end has no place in the file."""
        if "loss" not in logs:
            return
        if not (math.isfinite(logs["loss"]) and math.isfinite(logs.get("grad_norm", 0.0))):
            raise self._diverged()
        tokens, seconds = self._since_last_log.read()
        row = {
            "kind": "train",
            "step": self.state.global_step,
            "epoch": round(self.state.epoch or 0.0, 4),
            "loss": logs["loss"],
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        }
        self._record(row)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def _diverged(self) -> RunError:
        return RunError(
            f"training has diverged: by step {self.state.global_step} the loss or the adapter is not a number any "
            "more. Lower train.learning_rate or lengthen train.warmup, and start again with --overwrite"
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Checkpoints are few, and one that is spoiled would push out one that is not.
        if not all(parameter.isfinite().all() for parameter in trainable_parameters(self._adapted).values()):
            raise self._diverged()
        folder = Path(output_dir or str(self.args.output_dir))
        save_adapter(self._adapted, folder)
        self._averaging.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_adapter(self._adapted, Path(resume_from_checkpoint))
        self._averaging.load(Path(resume_from_checkpoint))

    def load_best(self) -> int | None:
        """Put the adapter of the best validation onto the model and return its step; None if there was none."""
        best = Path(str(self.args.output_dir)) / BEST
        if self.state.best_global_step is None or not best.is_dir():
            return None
        load_adapter(self._adapted, best)
        return self.state.best_global_step
