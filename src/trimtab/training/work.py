"""What a run does with its model. Where several processes train it, each of them does all of this at the same time.

The rest of a run, its folder and what is told of it, is the leading process's alone (`trimtab.training.run`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed

from trimtab import tasks
from trimtab.adapters.placing import format_of
from trimtab.adapters.store import load_adapter
from trimtab.config.resolve import Job
from trimtab.config.run import RunConfig, TrainConfig
from trimtab.errors import AdapterError, ModelError, RunError
from trimtab.evaluation.agreement import Comparison, Passages
from trimtab.evaluation.evaluate import Evaluation
from trimtab.evaluation.in_peft import in_peft
from trimtab.models.load import load_model
from trimtab.models.locate import ModelHead
from trimtab.models.model_files import quiet_libraries
from trimtab.processes import here, together
from trimtab.runs.checkpoints import step_of
from trimtab.runs.events import Listener
from trimtab.runs.folder import RunFolder
from trimtab.runs.records import MetricsLine, RowsDigest
from trimtab.signals import heard, listening
from trimtab.surgery.attach_report import AttachReport, describe
from trimtab.surgery.contexts import disable_adapter
from trimtab.tasks import Inputs, Measurement
from trimtab.training.callbacks import Idle, Interrupting, LastLoss, Telling
from trimtab.training.compiling import Compiling, choose
from trimtab.training.metrics_log import Recorder
from trimtab.training.on_device import fitted
from trimtab.training.rate_trials import with_rate
from trimtab.training.resume_state import newest_whole
from trimtab.training.several import Inside, shard
from trimtab.training.trainer import AdapterTrainer, save_from_one

ROWS = 4
"""Rows of the run's own on which PEFT's outputs are compared with ours, of a model with a head."""


class Work:
    """The model of a run, loaded; the rows, and what is done with both.

    Attributes:
        steps, epochs: how far training has come.
        job: the run's, with nothing left open that its device decides; ``told``: what that was, a sentence each.
        idle: the adapted modules that no step has reached; ``averaged``: of how many steps the adapter is a mean.
        at_once: whether the user would not wait for a good end.
    """

    def __init__(self, job: Job, inputs: Inputs, listener: Listener, trackers: Sequence[TrainerCallback] = ()) -> None:
        quiet_libraries()
        require_same_rows(inputs.digests)  # waits until the leading process has found that the run may begin
        self.task, self.inputs, self.reader, self.listener = tasks.of(job), inputs, job.reader, listener
        self._trackers = trackers
        config = job.config
        self.model: nn.Module = load_model(
            job.files, job.dtype, config.model.attention, config.quantisation, job.device
        )
        self.told: list[str] = []
        self.job = fitted(job, self.model, self.told.append)
        for sentence in self.told:
            listener.remark(sentence)
        self.head = self.task.head(self.model)
        self._inside: Callable[[Callable[[], Any]], Any] = lambda work: work()
        self.steps, self.epochs, self.at_once = 0, 0.0, False
        self.idle: list[str] = []
        self.averaged = 0
        if here().size > 1:
            _require_divisible(self.model)

    @together
    def attach(self, *, attaches: bool) -> AttachReport:
        """Attach what the run trains, if it ``attaches`` anything; then the frozen weights are spread over the
        processes, where that is asked for."""
        set_seed(self.job.config.train.seed)
        report = self.job.attach_to(self.model) if attaches else describe(self.model, ())
        self._attached = report
        if here().sharded:
            root = Inside(self.model)
            shard(root, self.model)
            self._inside = root
        return report

    @together
    def find_rate(self, file: Path) -> RunConfig:
        """The configuration with a number as its rate, which trials find if it is ``auto``; ``file`` keeps them."""
        return with_rate(self.job, self.inputs, self.model, listener=self.listener, file=file)

    @together
    def load(self, folder: Path) -> str | None:
        """Take the adapter in ``folder``; gives what is wrong with it, if the model stays as it was."""
        try:
            load_adapter(self.model, folder)
        except AdapterError as error:
            return str(error)
        return None

    @together
    def save(self, folder: Path) -> None:
        """Write the adapter into ``folder``."""
        save_from_one(self.model, folder)

    @together
    def test_set(self, name: str, *, bare: bool = False) -> Evaluation:
        """Evaluate the test set of that name; ``bare``: as if nothing was attached."""
        with disable_adapter(self.model) if bare and self._attached.modules else nullcontext():
            evaluation: Evaluation = self._inside(lambda: self._tested(name))
        return evaluation

    def _tested(self, name: str) -> Evaluation:
        progress = partial(self.listener.evaluating, name)
        how = Measurement(name, self.inputs.choices, self.job.config.evaluation, self.job.reading_length, progress)
        return self.task.evaluate(self.head, self.reader, self.inputs.tests[name], how)

    def problem_in_peft(self, folder: Path) -> str:
        """What PEFT does with the adapter in ``folder``, which the model carries, but compute what was trained; empty
        for nothing, and where PEFT cannot be asked. The model is not to be used after it."""
        few = next((rows for rows in (*self.inputs.tests.values(), self.inputs.validation) if rows), [])[:ROWS]
        head, length = self.job.source.head, self.job.reading_length
        known = head != ModelHead()
        if here().size > 1 or self.job.config.quantisation != "none" or (known and not few):
            return ""
        if format_of(folder).label != "PEFT":
            return ""

        def of(model: Any) -> Tensor:
            return self.task.compared(model, self.reader, few, head=head, length=length)

        told = Comparison(of, "rows") if known else Passages.random(self.model).comparison
        return in_peft(self.model, folder, told).problem

    def validation(self) -> Mapping[str, float]:
        """The metrics of the validation rows that can choose the best step: the loss, and where answers are scored,
        those of scored answers."""
        return self.task.validation(
            self.head,
            self.reader,
            self.inputs.validation,
            inputs=self.inputs,
            job=self.job,
            progress=partial(self.listener.evaluating, "validation"),
        )

    def newest_checkpoint(self, train: TrainConfig, folder: Path, tell: Callable[[str], None]) -> Path | None:
        """The newest checkpoint in ``folder`` that training can go on from; of those that are damaged it is told."""
        rows, validates = len(self.inputs.rows), bool(self.inputs.validation)
        return newest_whole(folder, self.model, train, rows=rows, validates=validates, tell=tell)

    @together
    def train(
        self, train: TrainConfig, checkpoint: Path | None, earlier: Sequence[MetricsLine], seconds: float
    ) -> int | None:
        """Train, and leave the model with the adapter that the run ends with; gives the step of the best validation,
        if that is kept.

        Args:
            checkpoint: to go on from.
            earlier: the lines of ``metrics.jsonl`` before it.
            seconds: that the run was trained for before.
        """
        group, folder = here(), RunFolder(self.job.config.output)
        interrupting, idle = Interrupting(self.listener), Idle(self.model)
        callbacks: list[TrainerCallback] = [
            Telling(self.listener),
            idle,
            LastLoss(stops_early=train.early_stopping is not None),
            interrupting,
        ]
        if train.early_stopping is not None:
            callbacks.append(EarlyStoppingCallback(train.early_stopping))
        events = folder.tensorboard if train.tensorboard else None
        done, device = step_of(checkpoint) if checkpoint is not None else 0, self.job.device
        recording: Any = nullcontext()
        if group.leads:
            recording = Recorder(folder.metrics, self.listener, events, earlier=seconds, done=done, device=device)
        with recording as recorder:
            trainer = AdapterTrainer(
                self.model,
                train,
                self.inputs.rows,
                task=self.task,
                head=self.head,
                reader=self.reader,
                folder=folder.checkpoints,
                record=recorder.record if recorder is not None else _unrecorded,
                validate=(lambda: self._inside(self.validation)) if self.inputs.validation else None,
                best=self.task.best(train.metric, self.inputs),
                earlier=earlier,
                callbacks=[*callbacks, *self._trackers],
                inside=self._inside,
            )
            choice = choose(self.job, self.inputs, self._attached)
            if choice.compiles and not group.sharded:
                trainer.add_callback(Compiling(self.model, choice.tokens, self.listener))
            try:
                with listening(interrupting.ask):
                    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
            finally:
                self.at_once = heard()
                self.listener.training_ended()
                self.idle, self.averaged = idle.names, trainer.averaged
                self.steps, self.epochs = trainer.state.global_step, round(trainer.state.epoch or 0.0, 4)
        if interrupting.stop is not None:
            raise interrupting.stop
        return trainer.settle(keep_best=bool(self.inputs.validation) and train.keep_best)


def follow(job: Job, inputs: Inputs) -> None:
    """Do one's part of a run that another process leads; ``job`` is its own, as it was read there."""
    if not job.config.output.is_dir():
        raise RunError(
            f"{job.config.output}: process {here().rank} does not see the run folder of the first one; all processes "
            "need a file system in common"
        )
    work = Work(job, inputs, Listener())
    here().follow(work)


def require_same_rows(mine: RowsDigest) -> None:
    """Wait for all processes. Raises RunError where one of them reads other rows than the first does, as from a disk of
    its own."""
    first, *others = here().gathered(mine)
    for rank, found in enumerate(others, 1):
        if found != first:
            which = next(
                name for name in ("train", "validation", "test") if getattr(found, name) != getattr(first, name)
            )
            raise RunError(
                f"data.{which}: process {rank} reads other rows there than the first one; put the same files on all "
                "machines, or name a place that they have in common"
            )


def _require_divisible(model: nn.Module) -> None:
    """Raise ModelError for a model that computes something else of a part of a batch than of all of it."""
    norm = next((name for name, module in model.named_modules() if isinstance(module, _NormBase)), None)
    if norm is not None:
        raise ModelError(
            f"the model has batch norms, such as {norm}, whose statistics are of a whole batch, and {here().size} "
            "processes each see a part of it; train it in one process"
        )


def _unrecorded(line: MetricsLine) -> None:
    pass
