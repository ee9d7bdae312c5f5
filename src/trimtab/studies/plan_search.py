"""One search over plans: optuna proposes, cells run, optuna is told."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any, cast

from trimtab.config.read import to_yaml
from trimtab.config.run import RunConfig
from trimtab.config.search import ExploreConfig
from trimtab.config.values import Rate
from trimtab.errors import Interrupted, RunError, TrimtabError
from trimtab.files import write_text
from trimtab.metrics import METRICS
from trimtab.runs.events import Listener, Steps
from trimtab.runs.folder import RunFolder
from trimtab.runs.records import MetricsLine
from trimtab.runs.study_records import Confirmation, Trial
from trimtab.studies.cell import run_cell
from trimtab.studies.confirm import confirm, validation_score
from trimtab.studies.search_results import best_of, is_over, ran, search_results, trial_record
from trimtab.studies.search_space import Part, Proposal, Space

_IDLE = 100
"""After this many proposals in a row that needed no run (known already, or not within the budget) the search ends."""

_WEIGHTS = (0.25, 4.0)


class SearchListener(Listener):
    """A run's listener that is told of the search, too."""

    def trial_began(self, trial: Trial, runs: int, trials: int) -> None:
        """The run of the plan in ``trial`` begins; it is number ``runs`` of ``trials``."""

    def trial_ended(self, trial: Trial) -> None:
        """``trial`` is what ``explore.json`` holds of it."""


class _Pruned(Interrupted):
    """A run was stopped early, since it is behind the others."""


class Search:
    """A search in progress. What is known of a trial is in optuna's study; everything else is made from that."""

    def __init__(self, config: ExploreConfig, space: Space, listener: SearchListener) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.config = config
        self.space = space
        self.listener = listener
        self.metric = config.base.train.metric
        self.states = optuna.trial.TrialState
        self.study = optuna.create_study(
            storage=f"sqlite:///{config.output / 'study.db'}",
            study_name="explore",
            direction="maximize" if METRICS[self.metric].higher_is_better else "minimize",
            load_if_exists=True,
        )
        self._take_up()

    def ran(self) -> list[Any]:
        """optuna's trials that took a run of their own."""
        return ran(self._trials())

    def _trials(self) -> list[Any]:
        return self.study.get_trials(deepcopy=False)

    def run(self) -> None:
        """Propose and run until there are as many runs as asked for."""
        idle = 0
        while len(self.ran()) < self.config.trials and idle < _IDLE:
            idle = 0 if self._next_proposal() else idle + 1
        if idle == _IDLE:
            self.listener.note(f"stopped: the last {_IDLE} proposals were known already or could not spend the budget")

    def confirm(self) -> Confirmation:
        """Train the best mixed and the best uniform plan again with new seeds."""
        trials = [trial_record(trial, self.space) for trial in self.ran()]
        best = {kind: best_of(trials, self.metric, kind) for kind in ("mixed", "uniform")}
        if None in best.values():
            raise RunError("confirm: there is no mixed plan beside a uniform one to compare it with; raise trials")
        arms = {kind: self._run_config(trial, tests=True) for kind, trial in best.items() if trial is not None}
        return confirm(arms, self.config.confirm, self.config.output / "confirm", self.listener)

    def write(self, confirmation: Confirmation | None = None) -> None:
        """Write what is known so far: ``explore.json`` and the best runs."""
        results = search_results(self.config, self.space, self._trials(), confirmation)
        for name in ("best", "best_mixed", "best_uniform"):
            if (trial := results.numbered(getattr(results, name))) is not None:
                best = self._run_config(trial, tests=True)
                best = best.model_copy(update={"output": Path("runs") / f"{self.config.output.name}-{name}"})
                write_text(self.config.output / f"{name}.yaml", to_yaml(best, beside=self.config.output))
        results.write_to(self.config.output / "explore.json")

    def _take_up(self) -> None:
        """Put the trials that were cut off at the head of the queue."""
        for trial in self._trials():
            if trial.state == self.states.RUNNING:
                self.study.enqueue_trial(trial.params, user_attrs=trial.user_attrs)
                self.study.tell(trial.number, state=self.states.FAIL)

    def _queue_uniform(self) -> None:
        """Queue the next uniform plan, unless all of them were proposed or something else is waiting."""
        trials = self._trials()
        there = [(trial.user_attrs.get("uniform"), trial.user_attrs.get("rate")) for trial in trials]
        every = [(method, rate) for method in self.space.trained for rate in self.config.rates]
        missing = [each for each in every if each not in there and self.space.uniform(each[0]) is not None]
        if missing and not any(trial.state == self.states.WAITING for trial in trials):
            method, rate = missing[0]
            even: dict[str, Any] = {"learning rate": rate}
            for group in self.space.groups:
                even |= {f"{group.name}: method": method, f"{group.name}: weight": 1.0}
            self.study.enqueue_trial(even, user_attrs={"uniform": method, "rate": rate})

    def _next_proposal(self) -> bool:
        """Ask for one proposal and run it, unless the same plan was run before. Gives whether it was run."""
        known = self.ran()
        trial, proposal, rate = self._ask()
        if proposal is None:
            trial.set_user_attr("why", "no ranks of these methods spend the budget")
            self.study.tell(trial, state=self.states.FAIL)
            return False
        plan = [[part.method, part.rank] for part in proposal]
        trial.set_user_attr("plan", plan)
        trial.set_user_attr("rate", rate)
        same = next((old for old in known if (old.user_attrs["plan"], old.user_attrs["rate"]) == (plan, rate)), None)
        if same is not None:
            self._repeat(trial, same)
            return False
        self._run(trial, len(known) + 1)
        self.write()
        return True

    def _ask(self) -> tuple[Any, Proposal | None, Rate]:
        """The next trial, its plan (None where the budget cannot be spent), and its learning rate."""
        from optuna.samplers import TPESampler

        asked = sum(map(is_over, self._trials()))
        self.study.sampler = TPESampler(seed=random.Random(f"{self.config.seed} {asked}").getrandbits(32))
        self.study.pruner = self._pruner()
        self._queue_uniform()
        trial = self.study.ask()
        space, rates = self.space, self.config.rates
        chosen = [trial.suggest_categorical(f"{group.name}: method", space.methods) for group in space.groups]
        weights = [trial.suggest_float(f"{group.name}: weight", *_WEIGHTS, log=True) for group in space.groups]
        rate = cast(Rate, trial.suggest_categorical("learning rate", rates)) if len(rates) > 1 else rates[0]
        uniform = trial.user_attrs.get("uniform")
        return trial, space.uniform(uniform) if uniform else space.fill(chosen, weights), rate

    def _pruner(self) -> Any:
        from optuna import pruners

        if self.config.prune == "hyperband":
            steps = [step for trial in self.ran() for step in trial.intermediate_values]
            return pruners.HyperbandPruner(min_resource=min(steps, default=1))
        return pruners.MedianPruner() if self.config.prune else pruners.NopPruner()

    def _repeat(self, trial: Any, known: Any) -> None:
        """Tell ``trial`` what the same plan gave before."""
        trial.set_user_attr("same_as", known.number)
        for step, value in known.intermediate_values.items():
            trial.report(value, step)
        if known.state == self.states.FAIL:
            trial.set_user_attr("why", known.user_attrs["why"])
        self.study.tell(trial, known.value if known.state == self.states.COMPLETE else None, state=known.state)

    def _run(self, trial: Any, runs: int) -> None:
        """Run the plan of ``trial`` as a cell, and tell optuna what it gave."""
        proposed = self._record(trial)
        config = self._run_config(proposed, tests=False)
        judge = _Judge(self.listener, trial, self.metric, config, stops=proposed.kind == "mixed")
        self.listener.trial_began(proposed, runs, self.config.trials)
        began = time.perf_counter()
        told: dict[str, Any] = {}
        try:
            cell = run_cell(config, judge, keep="adapters")
            for validation in cell.validation:
                judge.report(validation)
            told = {"values": validation_score(cell.kept, self.metric)}
        except _Pruned:
            shutil.rmtree(RunFolder(config.output / "run").checkpoints, ignore_errors=True)
            told = {"state": self.states.PRUNED}
        except Interrupted:
            raise
        except TrimtabError as error:
            # Before training, or before any plan has worked, it is not the plan's fault.
            if not judge.training or not any(each.state == self.states.COMPLETE for each in self._trials()):
                raise
            trial.set_user_attr("why", str(error))
            told = {"state": self.states.FAIL}
        trial.set_user_attr("seconds", round(time.perf_counter() - began, 1))
        self.study.tell(trial, **told)
        self.listener.trial_ended(self._record(trial))

    def _record(self, trial: Any) -> Trial:
        return trial_record(self._trials()[trial.number], self.space)

    def _run_config(self, trial: Trial, *, tests: bool) -> RunConfig:
        """The run of a plan. Without ``tests`` the test rows are left out, so that nothing can be chosen by them."""
        base = self.config.base
        parts = tuple(Part(part.method, part.rank) for part in trial.parts)
        name = ".".join(map(str, parts)) + (f"_lr{trial.learning_rate:g}" if len(self.config.rates) > 1 else "")
        return base.model_copy(
            update={
                "plan": tuple(self.space.rules(parts)),
                "train": base.train.model_copy(update={"learning_rate": trial.learning_rate}),
                "data": base.data if tests else base.data.model_copy(update={"test": {}}),
                "output": self.config.output / "trials" / name,
            }
        )


class _Judge(Steps):
    """Passes on how a run goes, tells optuna of its validations, and stops the run when it is behind.

    ``stops``: whether it may be stopped.
    """

    def __init__(self, listener: SearchListener, trial: Any, metric: str, config: RunConfig, stops: bool) -> None:
        super().__init__(listener)
        self.training = False
        self._trial = trial
        self._metric = metric
        self._stops = stops
        # A run that goes on from a checkpoint does not tell of its earlier validations again.
        self._earlier = RunFolder(config.output / "run").read_metrics()
        self._reported: set[int] = set()

    def report(self, line: MetricsLine) -> None:
        """Tell optuna of a validation, once."""
        if line.step not in self._reported:
            self._reported.add(line.step)
            self._trial.report(validation_score(line, self._metric), line.step)

    def training_began(self, step: int, steps: int) -> None:
        self.training = True
        for line in self._earlier:
            if line.kind == "validation" and line.step <= step:
                self.report(line)
        super().training_began(step, steps)

    def metrics(self, row: dict[str, Any]) -> None:
        super().metrics(row)
        if row["kind"] == "validation":
            self.report(MetricsLine.read(row))
            if self._stops and self._trial.should_prune():
                raise _Pruned("behind the other runs at this step")
