"""One run, from its configuration to its report.

folder = finetune(load_config(Path("run.yaml")))
"""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from trimtab import tasks
from trimtab.config.resolve import Job
from trimtab.config.run import RunConfig
from trimtab.errors import STOPS, Interrupted, TrimtabError, machine_errors
from trimtab.evaluation.evaluate import write
from trimtab.launching import joined
from trimtab.machine import describe_machine, peak_device_memory_gib, peak_memory_gib, versions
from trimtab.models.chat_template import as_of
from trimtab.models.known_again import model_digest
from trimtab.processes import here
from trimtab.runs.beginning import Opening, Origin, Rows, begun, deciding, opened
from trimtab.runs.checkpoints import step_of
from trimtab.runs.events import Listener
from trimtab.runs.folder import RunFolder
from trimtab.runs.load import adapter_mark
from trimtab.runs.records import HeadRecord, Machine, PlanRecord, Summary
from trimtab.runs.results import OWN_ADAPTER, Measured
from trimtab.surgery.attach_report import AttachReport
from trimtab.training.checks import checked_inputs
from trimtab.training.rate_trials import at_rate
from trimtab.training.several import require_fit, told_of
from trimtab.training.tracking import trackers
from trimtab.training.trainer import Diverged
from trimtab.training.work import Work, follow


def finetune(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    asks_peft: bool = True,
    listener: Listener | None = None,
) -> RunFolder:
    """Do the whole run: read, attach, evaluate, train, evaluate again, write the report.

    Args:
        config: what to do; its ``output`` is the run folder.
        resume: go on with the run in that folder from its newest checkpoint.
        overwrite: replace a run that is there.
        asks_peft: where PEFT is installed, see once the run is finished whether it computes the same from the adapter,
            which takes some seconds.
        listener: is told what happens.

    Raises:
        TrimtabError: any mistake in the configuration, the data or the model, before training starts wherever it can
            be known then.
        Interrupted: the user stopped the run; what was done is kept, and the message says how to go on.
    """
    with joined() as group:
        began = time.perf_counter()
        created = datetime.now(UTC)
        if not group.leads:
            config, created = group.gathered((config, created))[0]  # the leading one knows its folder, too
        job = tasks.job_of(config)
        require_fit(config)
        if not group.leads:
            with as_of(created):
                job, inputs = tasks.inputs_of(job, Listener())
            follow(job, inputs)
            return RunFolder(config.output)
        return _lead(job, listener or Listener(), began, resume=resume, overwrite=overwrite, asks_peft=asks_peft)


def _lead(job: Job, listener: Listener, began: float, *, resume: bool, overwrite: bool, asks_peft: bool) -> RunFolder:
    config = job.config
    with opened(config, resume=resume, overwrite=overwrite) as opening:
        folder = opening.folder
        if opening.summary is not None and opening.is_measured(config):  # killed right before its end
            opening.begin(config)
            _conclude(folder, opening.summary.updated(status="finished"))
            return folder
        try:
            run = _set_up(job, opening, listener, began)
        except STOPS as stop:
            stopped = here().reason(stop)
            if isinstance(stopped, TrimtabError):
                raise stopped from None
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
        except (*STOPS, TrimtabError) as error:
            stopped = here().reason(error)
            with suppress(*STOPS, TrimtabError), refused():  # the first error is the one to tell
                run.put_down("diverged" if isinstance(stopped, Diverged) else "interrupted")
            if isinstance(stopped, STOPS):
                said = f"interrupted; everything so far is in {folder.path}\nGo on with: {folder.resume_command}"
                raise Interrupted.by(stopped, said) from None
            if stopped is error:
                raise
            raise stopped from None
        if asks_peft:
            with suppress(*STOPS), refused():  # the run is finished all the same
                run.ask_peft()
    return folder


def _set_up(job: Job, opening: Opening, listener: Listener, began: float) -> _Run:
    """Read the rows and load the model; nothing is written yet."""
    reports = trackers(job.config, listener.remark)
    settings = deciding(job.config)
    job, origin = begun(job, opening)
    config, group, task = job.config, here(), tasks.of(job)
    created = (opening.summary or Summary()).created or datetime.now(UTC)
    opening.require_same_model(job.source)
    group.gathered((config, created))
    listener.stage("Reading the rows")
    with as_of(created):
        job, inputs = tasks.inputs_of(job, listener)
    trains = not opening.trained and config.train.epochs > 0
    rows = opening.require_same_rows(inputs.digests, inputs.sources, trains=trains)
    inputs = checked_inputs(job, inputs, listener)

    listener.show(task.preview(inputs, job.reader))
    if config.train.prompt_loss_weight:
        listener.note(f"in training, a token of the prompt counts {config.train.prompt_loss_weight:g} of a marked one")
    if group.size > 1:
        listener.note(told_of(config))
    listener.counting(task.counted)
    listener.stage(f"Loading {config.model.name}")
    work = Work(job, inputs, listener, reports)
    return _Run(origin, opening, work, rows, settings, began=began, created=created)


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
        work: Work,
        rows: Rows,
        settings: dict[str, Any],
        *,
        began: float,
        created: datetime,
    ) -> None:
        job = self.job = work.job
        task = work.task
        inputs = self.inputs = work.inputs
        self.config = job.config
        self.origin = origin
        self.opening = opening
        self.folder = opening.folder
        self.work = work
        self.listener = work.listener
        self.changed_tests = rows.changed
        self._began = began
        before = opening.summary or Summary()
        self._earlier_seconds = before.training_seconds or 0.0, before.total_seconds or 0.0
        self._summary = Summary(
            model=job.config.model.name,
            created=created,
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
            train_tokens=task.tokens_of_all(inputs.rows),
            counted=task.counted,
            loss_unit=task.loss_unit,
            versions=versions(),
            machine=Machine(**describe_machine(job.device)),
            processes=here().size,
            notes=list(dict.fromkeys([*inputs.notes, *work.told, *before.notes])),
            trained=opening.trained,
            sources=list(inputs.sources),
            digests=rows.digests,
            began_from=origin.record,
            model_digest=before.model_digest or model_digest(job.source),
            adapter_mark=before.adapter_mark,
            settings=settings,
        )

    def through(self) -> None:
        """Evaluate, attach, train and evaluate again; of a run that is resumed, what is not done yet."""
        for name in self.changed_tests:
            self.folder.forget_evaluation(name, "before", "after")
            self.remark(f"the test rows of '{name}' are others than when the run began, so they are evaluated anew")
        self._write_summary()
        trains, begins_from_adapter = bool(self.config.train.epochs), self.config.adapter is not None
        # A sharded model cannot be changed any more, so it is measured bare when its adapters are there.
        early = not begins_from_adapter and not here().sharded
        if early:
            self.evaluate("before")
        if trains:
            self.find_rate()
        self.attached(self.work.attach(attaches=trains or begins_from_adapter))
        if not early:
            self.evaluate("before", bare=not begins_from_adapter)
        if trains:
            if not self._has_taken_up():
                self.train(self.work.newest_checkpoint(self.config.train, self.folder.checkpoints, self.remark))
                self._keep()
            self.folder.link_adapter()
            self.evaluate("after")

    def evaluate(self, stage: str, *, bare: bool = False) -> None:
        """Evaluate every test set, unless a resumed run has done so already; ``bare``: without the adapter."""
        if stage == "before" and not self.config.evaluation.before and self.config.train.epochs:
            return
        for name in self.inputs.tests:
            if self.folder.is_evaluated(name, stage):
                continue
            if stage == "before" and self.origin.lost:
                self.remark(f"{name} is not measured before training: the adapter that the run began from is gone")
                continue
            self.listener.stage(f"Evaluating {name} {stage} training")
            evaluation = self.work.test_set(name, bare=bare)
            adapter = OWN_ADAPTER if stage == "after" else self.config.adapter
            files = [source.path for source in self.config.data.test[name]]
            write(evaluation, self.folder.path, stage, Measured.of(self.config.model.name, adapter, files))
            self.listener.evaluated(evaluation.result)

    def find_rate(self) -> None:
        """Let the trials of ``train.learning_rate: auto`` find the rate; the run then goes on with it."""
        known = (self.opening.summary or Summary()).learning_rate
        if self.config.train.learning_rate == "auto" and known and not self.folder.rate.is_file():
            self.config = at_rate(self.config, known)
        else:
            self.config = self.work.find_rate(self.folder.rate)
        self._note(learning_rate=self.config.train.rate)

    def attached(self, report: AttachReport) -> None:
        """Note what the plan did to the model."""
        plan = PlanRecord.of(report)
        plan.write_to(self.folder.plan)
        self._note(total_parameters=report.total_parameters, trainable_parameters=report.trainable_parameters)
        told = [*plan.remarks(usual=False), *self.origin.remarks(self.config)]
        for line in (plan.headline, *plan.remarks()):
            if line not in told:
                self.listener.note(line)
        for line in told:
            self.remark(line)

    def _has_taken_up(self) -> bool:
        """Whether training is over: the model then carries the adapter that it ended with."""
        if not self.opening.trained:
            return False
        wrong = self.work.load(self.folder.adapter)
        if wrong is not None:
            self.remark(f"the adapter is made again from the last checkpoint: {wrong}")
            self._note(trained=False)
        return wrong is None

    def train(self, checkpoint: Path | None) -> None:
        """Train, and leave the model with the adapter that the run ends with."""
        train = self.config.train
        at = step_of(checkpoint) if checkpoint is not None else 0
        earlier = self.folder.cut_metrics(at)
        # What a run that was killed could not write into its summary.
        lost = max((line.seconds or 0.0 for line in earlier), default=0.0) - self._earlier_seconds[0]
        training, total = (seconds + max(0.0, lost) for seconds in self._earlier_seconds)
        self._earlier_seconds = training, total
        if checkpoint is not None:
            self.listener.note(f"resuming at step {at}")
        if checkpoint is not None and self.opening.changes.longer:
            steps = train.total_steps(len(self.inputs.rows))
            self.remark(
                f"trained further, from step {at} to step {steps}: the learning rate goes on as in a run of {steps} "
                "steps"
                if steps > at
                else f"nothing is left to train: train.epochs and train.max_steps come to {steps} steps, as before"
            )
        began = time.perf_counter()
        self.listener.stage("Training")
        try:
            step = self.work.train(train, checkpoint, earlier, self._earlier_seconds[0])
        finally:
            self._note(
                steps=self.work.steps,
                epochs=self.work.epochs,
                training_seconds=round(self._earlier_seconds[0] + time.perf_counter() - began, 2),
            )
        if idle := self.work.idle:
            self.remark(
                f"no step reached {len(idle):,} of the adapted modules, the first of them {idle[0]}: these rows make "
                "no use of them, and they are as they were. A narrower match leaves them out"
            )
        if train.average is not None and not self.work.averaged:
            self.remark(
                f"train.average: none of the {self.work.steps} steps that were made is among the last "
                f"{train.average:g} of {train.total_steps(len(self.inputs.rows))}, so nothing is averaged"
            )
        if self.inputs.validation and train.keep_best:
            self._note(best_step=step)
            if step is None:
                self.remark(
                    f"train.metric: {train.metric}: no validation has a figure of it, so no step is the best, and the "
                    "run ends with its last adapter"
                )
            else:
                self.listener.note(f"kept the adapter of step {step}, the best in validation")

    def _keep(self) -> None:
        """Write the adapter that training ended with; what was measured of one before it does not hold any more."""
        for name in self.config.data.test:
            self.folder.forget_evaluation(name, "after")
        self.work.save(self.folder.adapter)
        # So that the adapter can be used without this run's configuration.
        source = self.job.source
        if source.add_tokens or source.chat_template or source.languages:
            self.work.reader.save_pretrained(self.folder.adapter)
        self._note(trained=True, adapter_mark=adapter_mark(self.folder))
        self._write_summary()

    def conclude(self) -> None:
        """Finish the run."""
        _conclude(self.folder, self._summarised("finished"))

    def ask_peft(self) -> None:
        """Tell of what PEFT makes of the adapter, if that is something else. The model is not to be used after it."""
        finished, trained = self.folder.read_summary(), self.config.train.epochs and self.folder.has_adapter
        if finished and trained and (problem := self.work.problem_in_peft(self.folder.adapter)):
            self.remark(problem)
            _conclude(self.folder, finished.updated(notes=self._summary.notes))  # the peaks are those before PEFT's

    def put_down(self, status: str) -> None:
        """Leave a run before its end; without its page where the user will not wait."""
        if self.folder.is_run:
            self._write_summary(status)
            if not self.work.at_once:
                from trimtab.reports.run.run_page import write_run_page

                write_run_page(self.folder.path)

    def remark(self, text: str) -> None:
        """Tell the user, and keep it for the summary."""
        self.listener.remark(text)
        self._note(notes=list(dict.fromkeys([*self._summary.notes, text])))

    def _note(self, **values: Any) -> None:
        """Keep ``values`` for the summary."""
        self._summary = self._summary.updated(**values)

    def _write_summary(self, status: str = "interrupted") -> None:
        """Write what is known by now, so that a run which is killed can be gone on with."""
        self._summarised(status).write_to(self.folder.summary)

    def _summarised(self, status: str) -> Summary:
        total = self._earlier_seconds[1] + time.perf_counter() - self._began
        return self._summary.updated(
            status=status,
            total_seconds=round(total, 2),
            peak_memory_gib=round(peak_memory_gib(), 3),
            **({} if (peak := peak_device_memory_gib(self.job.device)) is None else {"peak_device_memory_gib": peak}),
            adapter_bytes=sum(file.stat().st_size for file in self.folder.adapter.glob("*")),
        )

    @property
    def how_to_go_on(self) -> str:
        """The end of a message about a full disk and the like."""
        return f". Everything so far is kept; then go on with: {self.folder.resume_command}"

    def checkpoint_bytes(self) -> int:
        """About what a checkpoint takes: each trained number and its two moments in float32."""
        return 12 * (self._summary.trainable_parameters or 0)
