"""The settings of a run in the words of transformers' Trainer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments

from trimtab.config.run import TrainConfig
from trimtab.machine import device
from trimtab.metrics import Metric


def pins() -> bool:
    """Whether batches wait in memory that a device copies from by itself."""
    return device().type in ("cuda", "xpu")


def training_arguments(train: TrainConfig, rows: int, folder: Path, best: Metric | None) -> TrainingArguments:
    """``train`` in the words of transformers' Trainer, for ``rows`` rows.

    Args:
        folder: where checkpoints go.
        best: the validation metric that decides which step was best; None: there is no validation.
    """
    steps = train.total_steps(rows)
    # In steps even where it is at the end of an epoch: then transformers validates first and saves after that, so that
    # a checkpoint knows of the validation at its step.
    every, save = (train.steps_between(every, rows) for every in (train.validate_every, train.save_every))
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.gradient_accumulation,
        num_train_epochs=train.epochs,
        max_steps=steps,
        learning_rate=train.rate,
        lr_scheduler_type=train.schedule if train.schedule != "constant" else "constant_with_warmup",
        warmup_steps=train.warmup_steps(steps),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        activation_checkpointing=train.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if train.gradient_checkpointing else None,
        # The weights have their dtype already; autocast on top would only cast to and fro.
        bf16=False,
        fp16=False,
        logging_steps=train.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if best is not None else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=save,
        metric_for_best_model=best.name if best is not None else None,
        greater_is_better=best.higher_is_better if best is not None else None,
        seed=train.seed,
        data_seed=train.seed,
        restore_callback_states_from_checkpoint=True,  # the patience of early stopping
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        # Batches are copied to a device while it computes.
        dataloader_pin_memory=pins(),
        accelerator_config={"non_blocking": pins()},
        label_names=["labels"],
    )


def use_one(arguments: TrainingArguments, device: torch.device) -> None:
    """Let transformers train where the model is. By itself it takes the first accelerator that it finds, and in a
    process that sees several a copy of the model on each."""
    if arguments.world_size == 1:
        arguments.__dict__["_setup_devices"] = arguments.distributed_state.device = device
        arguments._n_gpu = int(device.type != "cpu")
