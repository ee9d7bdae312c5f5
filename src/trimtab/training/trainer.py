"""transformers' Trainer, told how adapters are trained, saved and validated. The loop, accumulation, clipping,
schedules and resume are its own."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
)

from trimtab.adapters.store import load_adapter, save_adapter
from trimtab.config.run import TrainConfig
from trimtab.data.batches import LengthGroupedBatches
from trimtab.errors import RunError
from trimtab.files import read_json, write_json
from trimtab.metrics import METRICS, Metric
from trimtab.processes import here
from trimtab.runs import checkpoints
from trimtab.runs.records import MetricsLine
from trimtab.surgery.attach import trainable_parameters
from trimtab.tasks import Task
from trimtab.training.callbacks import Averaging
from trimtab.training.compiling import plainly
from trimtab.training.metrics_log import Lap, LogsAtOnce, Throughput
from trimtab.training.on_device import is_flash
from trimtab.training.optimizer import make_optimizer
from trimtab.training.steady import Steady
from trimtab.training.trainer_arguments import training_arguments, use_one

IDLE = "idle"
"""Marks a batch of a process that has no rows of its own to train on."""


class Diverged(RunError):  # noqa: N818 -- what happened, as people say it
    """The loss or the adapter is not a number any more."""


def save_from_one(model: nn.Module, folder: Path) -> None:
    """Save the adapter of ``model``, for which all processes come together where it is sharded; one of them writes."""
    if here().leads or here().sharded:
        save_adapter(model, folder)


def _best_loss(lines: Sequence[MetricsLine], best: Metric) -> float:
    """The loss of the best validation among lines of metrics; infinity if there was none."""
    validations = [(line.figure(best.name), line.loss) for line in lines if line.kind == "validation"]
    costs = [(best.cost(value), loss) for value, loss in validations if value is not None and loss is not None]
    return min(costs)[1] if costs else math.inf


class AdapterTrainer(LogsAtOnce, Trainer):
    """A Trainer whose checkpoints hold the adapter alone, and whose validation is ours.

    Args:
        model: carries adapters.
        train: how to train.
        rows: the training rows.
        task: makes batches of them, and gives their loss.
        head: of ``model``, as ``task`` made it.
        reader: what encoded the rows.
        folder: where checkpoints go.
        record: is given each line for ``metrics.jsonl``, which it completes with the time.
        validate: gives the validation metrics by name, or None for no validation.
        best: the one of them that decides which step was best.
        earlier: the lines of ``metrics.jsonl`` of a run that is resumed, among them its validations.
        callbacks: see and steer the loop.
        inside: does work with the model where its weights can be read, if they are sharded.

    Where several processes train (`trimtab.processes`), each has the whole of every batch in turn, takes its share of
    the rows, and the gradients are summed once a step. The loss of a step is divided by what carries loss in all shares
    together, so a step is that of one process.

    Attributes:
        throughput: counts the tokens that were trained on.
    """

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        rows: Any,
        *,
        task: Task,
        head: Any,
        reader: Any,
        folder: Path,
        record: Callable[[MetricsLine], None],
        validate: Callable[[], Mapping[str, float]] | None = None,
        best: Metric = METRICS["loss"],
        earlier: Sequence[MetricsLine] = (),
        callbacks: Sequence[TrainerCallback] = (),
        inside: Callable[[Callable[[], Tensor]], Tensor] = lambda work: work(),
    ) -> None:
        arguments = training_arguments(train, len(rows), folder, best if validate is not None else None)
        use_one(arguments, next(model.parameters()).device)
        self._best_loss = _best_loss(earlier, best)
        self._validated = max((line.step for line in earlier if line.kind == "validation"), default=0)
        self._is_over = False
        self.throughput = Throughput()
        self._collated: deque[int] = deque()  # tokens of batches that are made and not trained on: one is made ahead
        self._adapted = model
        self._train_config = train
        self._task, self._head = task, head
        prompts = train.prompt_loss_weight > 0
        packer = task.packer(reader, prompts=prompts, flash=is_flash(model)) if train.padding_free is True else None
        self._collator = packer or task.collator(reader, prompts=prompts)
        self._averaging = Averaging(model, train.average or 0.0)
        self._inside = inside
        self._steady = Steady(model, repeats=train.gradient_accumulation > 1 or train.gradient_checkpointing)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=rows,
            # Only its presence is asked for: evaluate() is ours.
            eval_dataset=rows if validate is not None else None,
            data_collator=self._collate,
            callbacks=[self._averaging, *callbacks],
        )
        self.remove_callback(PrinterCallback)
        if here().rank:  # transformers has just set one seed in all processes, and what is dropped out differs in them
            torch.manual_seed(train.seed + here().rank)
        self._folder = folder
        self._validate_rows = validate
        self._record = record
        self._since_last_log = Lap(self.throughput)
        # The loss below is a sum over labels divided by the labels of the whole accumulated batch.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def _collate(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        self._collated.append(sum(map(self._task.tokens, rows)))
        mine = here().share(rows)
        # Where an epoch ends with fewer rows than there are processes, some have none. They still run the model, since
        # the others may need them to, and count nothing of it.
        return self._collator(mine) if mine else {**self._collator(rows[:1]), IDLE: torch.ones(())}

    def get_train_dataloader(self) -> DataLoader[Any]:
        rows: Any = self.train_dataset
        size, seed = self.args.train_batch_size, self.args.seed
        order: dict[str, Any]
        if self._train_config.group_by_length:
            order = {"batch_sampler": LengthGroupedBatches(rows.lengths, size, seed)}
        else:
            sampler = RandomSampler(rows, generator=torch.Generator().manual_seed(seed))
            order = {"batch_size": size, "sampler": sampler}
        loader = DataLoader(rows, collate_fn=self._collate, pin_memory=self.args.dataloader_pin_memory, **order)
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # The weights are float16 themselves, so of mixed precision only the scaling of the loss is wanted.
        if self._train_config.precision == "float16":
            self.accelerator.scaler = torch.amp.GradScaler(self.args.device.type)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = make_optimizer(self._adapted, self._train_config)
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        weight = self._train_config.prompt_loss_weight
        idle = inputs.pop(IDLE, None)
        loss = self._inside(lambda: self._task.loss(self._head, inputs, count=num_items_in_batch, prompt_weight=weight))
        loss = loss if idle is None else loss * 0.0
        return (loss, None) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.throughput.add(self._collated.popleft())
        with self._steady.small_batch(is_last=self.accelerator.sync_gradients):
            return super().training_step(*args, **kwargs)

    def _init_training_state(
        self, max_steps: int, steps_an_epoch: int, epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        done = super()._init_training_state(max_steps, steps_an_epoch, epochs, checkpoint, trial)
        # A checkpoint has those of the settings that it was written under.
        self.state.compute_steps(self.args, max_steps)
        self._is_over = checkpoint is not None and self._ended_at(Path(checkpoint))
        return done

    def _ended_at(self, checkpoint: Path) -> bool:
        """Whether nothing is left to train after ``checkpoint``: it was written at the last step, or at a validation
        that ended a run of as many steps early."""
        step, steps = self.state.global_step, self.args.max_steps
        stopping = [one for one in self.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]
        exhausted = any(one.early_stopping_patience_counter >= one.early_stopping_patience for one in stopping)
        before = TrainerState.load_from_json(str(checkpoint / checkpoints.STATE)).max_steps
        return step >= steps or (exhausted and step == self._validated and before == steps)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._is_over:
            self.control.should_training_stop = True
            return
        if kwargs["resume_from_checkpoint"] is not None and kwargs["epoch"] == kwargs["epochs_trained"]:
            self._take_up_loss(Path(kwargs["resume_from_checkpoint"]))
        super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _take_up_loss(self, checkpoint: Path) -> None:
        """Go on with the losses since the last line of metrics, of which the next one has the mean."""
        if (checkpoint / checkpoints.UNLOGGED).is_file():  # else an earlier version wrote it
            unlogged = read_json(checkpoint / checkpoints.UNLOGGED)
            self._tr_loss += unlogged["loss"] if here().leads else 0.0
            self._globalstep_last_logged -= unlogged["steps"]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            self._steady.end()

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """What carries loss in the shares of all processes."""
        count = super()._get_num_items_in_batch([batch for batch in batch_samples if IDLE not in batch], device)
        if here().size == 1:
            return count
        return here().total(torch.as_tensor(0 if count is None else count, dtype=torch.int64, device=device))

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        here().sum_gradients(trainable_parameters(self._adapted).values())
        if (scaler := self.accelerator.scaler) is not None:
            scaler.unscale_(getattr(self.optimizer, "optimizer", self.optimizer))
        return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Validate, write the line, and hand the metrics on under the prefix that the Trainer expects."""
        assert self._validate_rows is not None
        with self.throughput.paused(), self._averaging.in_place(), plainly():
            figures = dict(self._validate_rows())
        beside = {name: value for name, value in figures.items() if name != "loss"}
        self._write_line("validation", loss=figures["loss"], figures=beside)
        metrics = {f"eval_{name}": value for name, value in figures.items()}
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, metrics)  # for trackers
        # A correlation of answers that are all alike is not there, and no better than any.
        metrics.setdefault(
            f"eval_{self.args.metric_for_best_model}", -math.inf if self.args.greater_is_better else math.inf
        )
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As transformers has it, but of two steps that are equally good by the metric the one with the lower loss is
        best."""
        key, loss = f"eval_{self.args.metric_for_best_model}", metrics["eval_loss"]
        if not math.isfinite(metrics[key]):
            return False
        ties = metrics[key] == self.state.best_metric and loss < self._best_loss
        is_best = super()._determine_best_metric(metrics, trial) or ties
        if is_best:
            self._best_loss = loss
            self.state.best_global_step = self.state.global_step
            with self._averaging.in_place():
                save_from_one(self._adapted, self._folder / f"best-{self.state.global_step}")
            if here().leads:
                checkpoints.prune_best(self._folder, self.state.global_step)
        return is_best

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write a line of metrics; transformers' own summary at the end has no place in the file."""
        if "loss" not in logs:
            return
        logs["loss"] = here().summed(logs["loss"])
        norm = logs.get("grad_norm", 0.0)
        if not math.isfinite(logs["loss"]) or not (math.isfinite(norm) or self._left_out):
            raise self._diverged()
        tokens, seconds = self._since_last_log.read()
        self._write_line(
            "train",
            loss=logs["loss"],
            learning_rate=logs.get("learning_rate"),
            grad_norm=logs.get("grad_norm") if math.isfinite(norm) else None,
            tokens_per_second=round(tokens / max(seconds, 1e-9), 1),
        )
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def _write_line(self, kind: str, **values: Any) -> None:
        """Record what is known at this step."""
        epoch = round(self.state.epoch or 0.0, 4)
        self._record(MetricsLine(kind=kind, step=self.state.global_step, epoch=epoch, **values))

    @property
    def _left_out(self) -> bool:
        """Whether a step whose gradients overflow is left out: float16's scale then falls, until it is below 1."""
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() >= 1

    def _diverged(self) -> RunError:
        return Diverged(
            f"training has diverged: by step {self.state.global_step} the loss or the adapter is not a number any "
            f"more. Lower train.learning_rate, which was {self._train_config.rate:g}, or lengthen train.warmup, and "
            "start again with --overwrite"
        )

    def _get_output_dir(self, trial: Any) -> str:
        # A checkpoint is written here, whole, before it gets its place; what is in that place is never half of one.
        return str(self._folder / checkpoints.SAVING)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Checkpoints are few, and one that is spoiled would push out one that is not.
        finite = [parameter.isfinite().all() for parameter in trainable_parameters(self._adapted).values()]
        if finite and not torch.stack(finite).all():  # asked once, since an accelerator waits for each answer
            raise self._diverged()
        generators = here().gathered(torch.get_rng_state())
        unlogged = {
            "loss": here().summed(self._tr_loss.item()),
            "steps": self.state.global_step - self._globalstep_last_logged,
        }
        try:
            if here().leads:
                super()._save_checkpoint(model, trial)
                written = self._folder / checkpoints.SAVING / f"checkpoint-{self.state.global_step}"
                write_json(written / checkpoints.UNLOGGED, unlogged)
                for rank, state in enumerate(generators[1:], 1):
                    torch.save(state, written / checkpoints.generator_of(rank))
                checkpoints.put(self._folder, self.state.global_step, self._train_config.keep_checkpoints)
            else:
                save_from_one(self._adapted, self._folder)
        except BaseException:
            if here().leads:
                checkpoints.drop_half(self._folder)  # of no use, and it may have filled the disk
            raise
        here().wait()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or here().leads:
            return super()._load_rng_state(checkpoint)
        file = Path(checkpoint) / checkpoints.generator_of(here().rank)
        if file.is_file():  # else it was written by fewer processes, and this one goes on with a seed of its own
            torch.set_rng_state(torch.load(file, weights_only=True))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # transformers has just noted here where the best checkpoint lies, which is moved to its place afterwards.
        self.state.best_model_checkpoint = None
        super()._save_optimizer_and_scheduler(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir) if output_dir is not None else self._folder
        save_from_one(self._adapted, folder)
        self._averaging.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_adapter(self._adapted, Path(resume_from_checkpoint))
        self._averaging.load(Path(resume_from_checkpoint), self.args.max_steps)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            # A checkpoint has the rates of the schedule that it was written under, and the run may be longer now.
            optimizer, scheduler = cast(Any, self.optimizer), cast(Any, self.lr_scheduler)
            shares = [share(scheduler.last_epoch) for share in scheduler.lr_lambdas]
            rates = [base * share for base, share in zip(scheduler.base_lrs, shares, strict=True)]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler.load_state_dict({**scheduler.state_dict(), "_last_lr": rates})

    @property
    def averaged(self) -> int:
        """Of how many steps there is a mean."""
        return self._averaging.count

    def settle(self, *, keep_best: bool) -> int | None:
        """Leave the model with the adapter that training ends with: the average, where there is one, or with
        ``keep_best`` that of the best validation. Returns the step of the latter; None without one."""
        self._averaging.keep()
        here().wait()  # for the files of the leading process
        if not keep_best or self.state.best_global_step is None:
            return None
        load_adapter(self._adapted, checkpoints.best_folder(self._folder, self.state.best_global_step))
        return self.state.best_global_step
