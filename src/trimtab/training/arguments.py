"""A run's configuration in the words of transformers' Trainer."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers import TrainingArguments

from trimtab.config.run import RunConfig


def epoch_steps(config: RunConfig, rows: int) -> int:
    """Optimiser steps of one epoch."""
    batches = math.ceil(rows / config.train.batch_size)
    return math.ceil(batches / config.train.gradient_accumulation)


def total_steps(config: RunConfig, rows: int) -> int:
    """Optimiser steps of the whole run."""
    train = config.train
    whole = math.ceil(train.epochs * epoch_steps(config, rows))
    return max(1, whole if train.max_steps is None else min(whole, train.max_steps))


def metric(config: RunConfig, scored: bool) -> str:
    """The validation metric that decides which step was best."""
    return ("accuracy" if scored else "loss") if config.train.metric == "auto" else config.train.metric


def training_arguments(
    config: RunConfig, rows: int, folder: Path, *, validates: bool, scored: bool
) -> TrainingArguments:
    """The arguments for a run over ``rows`` rows whose checkpoints go into ``folder``."""
    train = config.train
    steps = total_steps(config, rows)
    # In steps even where it is at the end of an epoch: then transformers validates first and saves after that, so that
    # a checkpoint knows of the validation at its step.
    every = epoch_steps(config, rows) if train.validate_every == "epoch" else train.validate_every
    save = epoch_steps(config, rows) if train.save_every == "epoch" else train.save_every
    best = metric(config, scored)
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.gradient_accumulation,
        num_train_epochs=train.epochs,
        max_steps=steps,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.schedule if train.schedule != "constant" else "constant_with_warmup",
        warmup_steps=train.warmup if isinstance(train.warmup, int) else math.ceil(train.warmup * steps),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        activation_checkpointing=train.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if train.gradient_checkpointing else None,
        # The weights have their dtype already; autocast on top would only cast to and fro.
        bf16=False,
        fp16=False,
        logging_steps=train.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if validates else "no",
        eval_steps=every if isinstance(every, int) else max(1, round(every * steps)),
        save_strategy="steps",
        save_steps=save,
        save_total_limit=train.keep_checkpoints,
        metric_for_best_model=best if validates else None,
        greater_is_better=best != "loss" if validates else None,
        seed=train.seed,
        data_seed=train.seed,
        restore_callback_states_from_checkpoint=True,  # the patience of early stopping
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
    )
