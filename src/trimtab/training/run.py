"""One run, from its configuration to its report.

folder = finetune(load_config(Path("run.yaml")))
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed

from trimtab import tasks
from trimtab.adapters.store import load_adapter, save_adapter
from trimtab.config.resolve import Job
from trimtab.config.run import RunConfig
from trimtab.errors import STOPS, AdapterError, Interrupted, TrimtabError, machine_errors
from trimtab.evaluation.evaluate import write
from trimtab.machine import describe_machine, device, peak_memory_gib, versions
from trimtab.memory.suggest import check_run
from trimtab.models.load import load_model, quiet_libraries
from trimtab.runs.beginning import Opening, opened
from trimtab.runs.checkpoints import step_of
from trimtab.runs.events import Listener
from trimtab.runs.folder import RunFolder
from trimtab.runs.records import HeadRecord, Machine, PlanRecord, Summary
from trimtab.runs.results import OWN_ADAPTER, Measured
from trimtab.runs.same_rows import require_same_rows
from trimtab.surgery.attach import trainable_parameters
from trimtab.surgery.attach_report import AttachReport, describe
from trimtab.tasks import Inputs, Task
from trimtab.training.callbacks import Interrupting, LastLoss, Telling
from trimtab.training.checks import checked_inputs
from trimtab.training.compiling import Compiling
from trimtab.training.measuring import Measuring
from trimtab.training.metrics_log import Recorder, require_tensorboard
from trimtab.training.origin import Origin
from trimtab.training.rate_trials import with_rate
from trimtab.training.resume_state import newest_whole
from trimtab.training.schedule import total_steps
from trimtab.training.tracking import trackers
from trimtab.training.trainer import AdapterTrainer, make_optimizer


def finetune(
    config: RunConfig, *, resume: bool = False, overwrite: bool = False, listener: Listener | None = None
) -> RunFolder:
    """Do the whole run: read, attach, evaluate, train, evaluate again, write the report.

    Args:
        config: what to do; its ``output`` is the run folder.
        resume: go on with the run in that folder from its newest checkpoint.
        overwrite: replace a run that is there.
        listener: is told what happens.

    Raises:
        TrimtabError: any mistake in the configuration, the data or the model, before training starts wherever it can
            be known then.
        Interrupted: the user stopped the run; what was done is kept, and the message says how to go on.
    """
    listener = listener or Listener()
    began = time.perf_counter()
    job = tasks.job_of(config)
    if config.train.tensorboard:
        require_tensorboard()
    reports = trackers(config, listener.remark)
    with opened(config, resume=resume, overwrite=overwrite) as opening:
        folder = opening.folder
        if opening.summary is not None and opening.is_measured(config):  # killed right before its end
            opening.begin(config)
            _conclude(folder, opening.summary.updated(status="finished"))
            return folder
        try:
            run = _set_up(job, opening, listener, began)
            run.trackers = reports
        except STOPS as stop:
            kept = (
                f"the run is as it was\nGo on with: {folder.resume_command}" if opening.resumes else "nothing was begun"
            )
            raise Interrupted.by(stop, f"interrupted; {kept}") from None
        refused = partial(machine_errors, folder.path, needed=run.checkpoint_bytes, then=run.how_to_go_on)
        try:
            with refused():
                opening.begin(config)
                run.through()
                run.conclude()
        except (*STOPS, TrimtabError) as stopped:
            with suppress(*STOPS, TrimtabError), refused():  # the first error is the one to tell
                run.put_down()
            if isinstance(stopped, STOPS):
                said = f"interrupted; everything so far is in {folder.path}\nGo on with: {folder.resume_command}"
                raise Interrupted.by(stopped, said) from None
            raise
    return folder


def _set_up(job: Job, opening: Opening, listener: Listener, began: float) -> _Run:
    """Read the rows and load the model; nothing is written yet."""
    origin = Origin.of(job, opening)
    job, config = origin.job, job.config
    task = tasks.of(job)
    reader = task.reader(job.source)
    listener.stage("Reading the rows")
    inputs = task.read(job, reader, listener)
    job = job.read_for(task.head_for(job, inputs))
    origin = replace(origin, job=job)
    trains = not opening.trained and config.train.epochs > 0
    others = require_same_rows(opening, inputs.digests, inputs.sources, trains=trains)
    inputs = checked_inputs(job, inputs, check_run(job, task.sizes(job, inputs)), listener)

    quiet_libraries()
    listener.show(task.preview(inputs, reader))
    if config.train.prompt_loss_weight:
        listener.note(f"in training, a token of the prompt counts {config.train.prompt_loss_weight:g} of a marked one")
    listener.counting(task.counted)
    listener.stage(f"Loading {config.model.name}")
    model: Any = load_model(job.source, job.dtype, config.model.attention, config.quantisation)
    model = model.to(device())
    run = _Run(origin, opening, task=task, inputs=inputs, model=model, reader=reader, listener=listener, began=began)
    run.measured_anew = others
    return run


def _conclude(folder: RunFolder, summary: Summary) -> None:
    """Make what a trained and measured run has besides; that it is finished is said last."""
    from trimtab.reports.run.run_page import write_run_page  # matplotlib: not before the run is over

    folder.link_adapter()
    write_run_page(folder.path, Summary.read(summary.plain()))  # as it will be read from its file
    summary.write_to(folder.summary)


class _Run:
    """One run in progress, and what is known of it for its summary."""

    def __init__(
        self,
        origin: Origin,
        opening: Opening,
        *,
        task: Task,
        inputs: Inputs,
        model: nn.Module,
        reader: Any,
        listener: Listener,
        began: float,
    ) -> None:
        job = self.job = origin.job
        self.origin = origin
        self.config = job.config
        self.folder = opening.folder
        self.opening = opening
        self.task = task
        self.inputs = inputs
        self.model = model
        self.reader = reader
        self.listener = listener
        self._head = task.head(model)
        self._measuring = Measuring(job, task, inputs, head=self._head, reader=reader, listener=listener)
        self._began = began
        self._at_once = False
        self.measured_anew: list[str] = []
        self.trackers: list[TrainerCallback] = []
        before = opening.summary or Summary()
        self._earlier_seconds = before.training_seconds or 0.0, before.total_seconds or 0.0
        self._summary = Summary(
            model=job.config.model.name,
            created=before.created or datetime.now(UTC),
            steps=before.steps or 0,
            epochs=before.epochs or 0.0,
            training_seconds=self._earlier_seconds[0],
            precision=job.precision,
            quantisation=job.config.quantisation,
            best_step=before.best_step,
            task=task.name,
            head=HeadRecord.of(job.source.head),
            form=inputs.form,
            choices=inputs.choices,
            train_rows=len(inputs.rows),
            validation_rows=len(inputs.validation),
            train_tokens=sum(inputs.rows.lengths),
            counted=task.counted,
            loss_unit=task.loss_unit,
            versions=versions(),
            machine=Machine(**describe_machine()),
            notes=list(dict.fromkeys([*inputs.notes, *before.notes])),
            trained=opening.trained,
            sources=list(inputs.sources),
            # What was trained on is kept as it was, whatever the files hold now.
            digests=before.digests.updated(test=inputs.digests.test)
            if before.digests is not None and opening.trained
            else inputs.digests,
            began_from=origin.record,
        )

    @property
    def how_to_go_on(self) -> str:
        """The end of a message about a full disk and the like."""
        return f". Everything so far is kept; then go on with: {self.folder.resume_command}"

    def checkpoint_bytes(self) -> int:
        """About what a checkpoint takes: each trained number and its two moments in float32."""
        return 12 * (self._summary.trainable_parameters or 0)

    def through(self) -> None:
        """Evaluate, attach, train and evaluate again; of a run that is resumed, what is not done yet."""
        for name in self.measured_anew:
            self.folder.forget_evaluation(name, "before", "after")
            self.remark(f"the test rows of '{name}' are others than when the run began, so they are evaluated anew")
        self._summarised("interrupted").write_to(self.folder.summary)
        trains, begins_from_adapter = bool(self.config.train.epochs), self.config.adapter is not None
        if not begins_from_adapter:
            self.evaluate("before")
        if trains:
            self.find_rate()
        set_seed(self.config.train.seed)
        attaches = trains or begins_from_adapter
        self.attached(self.job.attach_to(self.model) if attaches else describe(self.model, ()))
        if begins_from_adapter:
            self.evaluate("before")
        if trains:
            if not self._has_taken_up():
                self.train(self._checkpoint())
                self._keep()
            self.folder.link_adapter()
            self.evaluate("after")

    def _has_taken_up(self) -> bool:
        """Whether training is over: the model then carries the adapter that it ended with."""
        if not self.opening.trained:
            return False
        try:
            load_adapter(self.model, self.folder.adapter)
        except AdapterError as error:
            self.remark(f"the adapter is made again from the last checkpoint: {error}")
            self._summary = self._summary.updated(trained=False)
            return False
        return True

    def _keep(self) -> None:
        """Write the adapter that training ended with; what was measured of one before it does not hold any more."""
        for name in self.config.data.test:
            self.folder.forget_evaluation(name, "after")
        save_adapter(self.model, self.folder.adapter)
        # So that the adapter can be used without this run's configuration.
        if self.job.source.add_tokens or self.job.source.chat_template:
            self.reader.save_pretrained(self.folder.adapter)
        self._summary = self._summary.updated(trained=True)
        self._summarised("interrupted").write_to(self.folder.summary)

    def conclude(self) -> None:
        """Finish the run."""
        _conclude(self.folder, self._summarised("finished"))

    def put_down(self) -> None:
        """Leave an interrupted run; without its page where the user will not wait."""
        if self.folder.is_run:
            self._summarised("interrupted").write_to(self.folder.summary)
            if not self._at_once:
                from trimtab.reports.run.run_page import write_run_page

                write_run_page(self.folder.path)

    def _summarised(self, status: str) -> Summary:
        adapter = (
            sum(file.stat().st_size for file in self.folder.adapter.glob("*")) if self.folder.adapter.is_dir() else 0
        )
        total = self._earlier_seconds[1] + time.perf_counter() - self._began
        return self._summary.updated(
            status=status,
            total_seconds=round(total, 2),
            peak_memory_gib=round(peak_memory_gib(), 3),
            adapter_bytes=adapter,
        )

    def attached(self, report: AttachReport) -> None:
        """Note what the plan did to the model."""
        plan = PlanRecord.of(report)
        plan.write_to(self.folder.plan)
        self._summary = self._summary.updated(
            total_parameters=report.total_parameters, trainable_parameters=report.trainable_parameters
        )
        told = [*plan.remarks(usual=False), *self.origin.remarks()]
        for line in (plan.headline, *plan.remarks()):
            if line not in told:
                self.listener.note(line)
        for line in told:
            self.remark(line)

    def remark(self, text: str) -> None:
        """Tell the user, and keep it for the summary."""
        self.listener.remark(text)
        self._summary = self._summary.updated(notes=list(dict.fromkeys([*self._summary.notes, text])))

    def evaluate(self, stage: str) -> None:
        """Evaluate every test set, unless a resumed run has done so already."""
        if stage == "before" and not self.config.evaluation.before and self.config.train.epochs:
            return
        for name in self.inputs.tests:
            if self.folder.is_evaluated(name, stage):
                continue
            if stage == "before" and self.origin.lost:
                self.remark(f"{name} is not measured before training: the adapter that the run began from is gone")
                continue
            self.listener.stage(f"Evaluating {name} {stage} training")
            evaluation = self._measuring.test_set(name)
            adapter = OWN_ADAPTER if stage == "after" else self.config.adapter
            files = [source.path for source in self.config.data.test[name]]
            write(evaluation, self.folder.path, stage, Measured.of(self.config.model.name, adapter, files))
            self.listener.evaluated(evaluation.result)

    def find_rate(self) -> None:
        """Let the trials of ``train.learning_rate: auto`` find the rate; the run then goes on with it."""
        before = self.opening.summary
        if before is not None and before.learning_rate and self.opening.trained and not self.folder.rate.is_file():
            self._summary = self._summary.updated(learning_rate=before.learning_rate)
            return
        found = {"reader": self.reader, "listener": self.listener, "file": self.folder.rate}
        self.config = with_rate(self.job, self.inputs, self.model, task=self.task, **found)
        self._summary = self._summary.updated(learning_rate=self.config.train.rate)

    def _checkpoint(self) -> Path | None:
        """The newest checkpoint that training can go on from."""
        train = self.config.train
        return newest_whole(
            self.folder.checkpoints,
            make_optimizer(self.model, train),
            train,
            trained=trainable_parameters(self.model),
            steps=total_steps(train, len(self.inputs.rows)),
            validates=bool(self.inputs.validation),
            tell=self.remark,
        )

    def train(self, checkpoint: Path | None) -> None:
        """Train, and leave the model with the adapter that the run ends with."""
        train = self.config.train
        interrupting = Interrupting()
        callbacks: list[TrainerCallback] = [
            Telling(self.listener),
            LastLoss(stops_early=train.early_stopping is not None),
            interrupting,
        ]
        if train.early_stopping is not None:
            callbacks.append(EarlyStoppingCallback(train.early_stopping))
        at = step_of(checkpoint) if checkpoint is not None else 0
        earlier = self.folder.cut_metrics(at)
        if checkpoint is not None:
            self.listener.note(f"resuming at step {at}")
        if checkpoint is not None and self.opening.changes.longer:
            steps = total_steps(train, len(self.inputs.rows))
            self.remark(
                f"trained further, from step {at} to step {steps}: the learning rate goes on as in a run of {steps} "
                "steps"
            )
        best = self.task.best(train.metric, self.inputs)
        events = self.folder.tensorboard if train.tensorboard else None
        began = time.perf_counter()
        self.listener.stage("Training")
        with Recorder(self.folder.metrics, self.listener, events, self._earlier_seconds[0]) as recorder:
            trainer = AdapterTrainer(
                self.model,
                train,
                self.inputs.rows,
                task=self.task,
                head=self._head,
                reader=self.reader,
                folder=self.folder.checkpoints,
                record=recorder.record,
                validate=self._measuring.validation if self.inputs.validation else None,
                best=best,
                earlier=earlier,
                callbacks=[*callbacks, *self.trackers],
            )
            trainer.add_callback(Compiling(self.model, train.compile, self.listener, trainer.throughput))
            try:
                with interrupting.on_signal(self.listener):
                    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
            finally:
                self._at_once = interrupting.at_once
                self.listener.training_ended()
                self._summary = self._summary.updated(
                    steps=trainer.state.global_step,
                    epochs=round(trainer.state.epoch or 0.0, 4),
                    training_seconds=round(self._earlier_seconds[0] + time.perf_counter() - began, 2),
                )
        if interrupting.stop is not None:
            raise interrupting.stop
        keeps_best = bool(self.inputs.validation) and train.keep_best
        step = trainer.settle(keep_best=keeps_best)
        if keeps_best:
            self._summary = self._summary.updated(best_step=step)
            self.listener.note(f"kept the adapter of step {step}, the best in validation")
