"""One search over plans: optuna proposes, cells run, optuna is told.

Proposals come in rounds of ``at_once``. A round knows what the rounds before it gave, and nothing of its own runs; so
it proposes the same plans whether its runs are done one after another or at once, here or elsewhere.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from trimtab.config.read import to_yaml
from trimtab.config.run import RunConfig
from trimtab.config.search import ExploreConfig
from trimtab.config.values import Rate
from trimtab.errors import Interrupted, RunError, TrimtabError
from trimtab.files import read_json, write_text
from trimtab.metrics import METRICS
from trimtab.runs.events import Listener, Steps
from trimtab.runs.folder import RunFolder
from trimtab.runs.records import MetricsLine
from trimtab.runs.study_records import CellRecord, Confirmation, Trial
from trimtab.studies.cell import changed_since, run_cell
from trimtab.studies.confirm import confirm, validation_score
from trimtab.studies.places import Errand, Place
from trimtab.studies.search_results import best_of, is_over, ran, search_results, trial_record
from trimtab.studies.search_space import Part, Proposal, Space

_IDLE = 100
"""After this many proposals in a row that needed no run (known already, or not within the budget) the search ends."""

_WEIGHTS = (0.25, 4.0)


class SearchListener(Listener):
    """A run's listener that is told of the search, too."""

    def trial_began(self, trial: Trial, runs: int, trials: int) -> None:
        """The run of the plan in ``trial`` begins; it is number ``runs`` of ``trials``."""

    def trial_told(self, trial: Trial, words: str) -> None:
        """Of a run elsewhere: on which machine it is, or that its worker was lost."""

    def trial_ended(self, trial: Trial) -> None:
        """``trial`` is what ``explore.json`` holds of it."""


class _Pruned(Interrupted):
    """A run was stopped early, since it is behind the others."""


class Search:
    """A search in progress. What is known of a trial is in optuna's study, in ``database``; everything else is made
    from that."""

    def __init__(self, config: ExploreConfig, space: Space, database: Any, listener: SearchListener, on: Place) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.config = config
        self.space = space
        self.listener = listener
        self.on = on
        self.metric = config.base.train.metric
        self.states = optuna.trial.TrialState
        self.study = optuna.create_study(
            storage=database,
            study_name="explore",
            direction="maximize" if METRICS[self.metric].higher_is_better else "minimize",
            load_if_exists=True,
        )
        self._take_up()

    def require_same_files(self) -> None:
        """Raise RunError if the rows or the model have changed since a trial was run: its score is not to be compared
        with those of new ones."""
        for trial in self.ran():
            config = self._run_config(trial_record(trial, self.space), tests=False)
            with suppress(OSError, ValueError, RecursionError):  # what a trial gave is known without its cell
                cell = CellRecord.read(read_json(config.output / "cell.json"))
                if (changed := changed_since(cell, config)) is not None:
                    raise RunError(
                        f"{self.config.output}: {changed} since the search began, so its trials cannot be compared "
                        "with new ones; put it back, or choose another output (output=NEW)"
                    )

    def ran(self) -> list[Any]:
        """optuna's trials that took a run of their own."""
        return ran(self._trials())

    def _trials(self) -> list[Any]:
        return self.study.get_trials(deepcopy=False)

    def run(self) -> None:
        """Propose and run until there are as many runs as asked for."""
        idle = 0
        while len(self.ran()) < self.config.trials and idle < _IDLE:
            proposed, ran = self._round(min(self.config.at_once, self.config.trials - len(self.ran())))
            idle = 0 if ran else idle + proposed
        if idle >= _IDLE:
            self.listener.note(f"stopped: the last {_IDLE} proposals were known already or could not spend the budget")

    def confirm(self) -> Confirmation:
        """Train the best mixed and the best uniform plan again with new seeds."""
        trials = [trial_record(trial, self.space) for trial in self.ran()]
        best = {kind: best_of(trials, self.metric, kind) for kind in ("mixed", "uniform")}
        if None in best.values():
            raise RunError("confirm: there is no mixed plan beside a uniform one to compare it with; raise trials")
        arms = {kind: self._run_config(trial, tests=True) for kind, trial in best.items() if trial is not None}
        return confirm(arms, self.config.confirm, self.config.output / "confirm", self.listener, self.on)

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

    def _round(self, runs: int) -> tuple[int, int]:
        """Ask for proposals, do ``runs`` runs of them or fewer, and tell optuna what they gave. Gives how many
        proposals there were, and how many of them were run."""
        known = self.ran()
        judges: list[_Judge] = []
        repeated: list[tuple[Any, int]] = []
        asked = 0
        while len(judges) < runs and asked < _IDLE:
            asked += 1
            trial, proposal, rate = self._ask()
            if proposal is None:
                trial.set_user_attr("why", "no ranks of these methods spend the budget")
                self.study.tell(trial, state=self.states.FAIL)
                continue
            plan = [[part.method, part.rank] for part in proposal]
            trial.set_user_attr("plan", plan)
            trial.set_user_attr("rate", rate)
            earlier = [*known, *(judge.trial for judge in judges)]
            same = (old.number for old in earlier if (old.user_attrs["plan"], old.user_attrs["rate"]) == (plan, rate))
            if (number := next(same, None)) is not None:
                repeated.append((trial, number))
                if number in {old.number for old in known}:
                    self._repeat(*repeated.pop())
                continue
            judges.append(self._judge(trial, len(known) + len(judges) + 1))
        self._run(judges)
        for trial, number in repeated:
            self._repeat(trial, number)
        if judges:
            self.write()
        return asked, len(judges)

    def _ask(self) -> tuple[Any, Proposal | None, Rate]:
        """The next trial, its plan (None where the budget cannot be spent), and its learning rate."""
        from optuna.samplers import TPESampler

        asked = sum(is_over(trial) or trial.state == self.states.RUNNING for trial in self._trials())
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

    def _repeat(self, trial: Any, number: int) -> None:
        """Tell ``trial`` what the same plan gave, in the trial of that number."""
        known = self._trials()[number]
        trial.set_user_attr("same_as", number)
        for step, value in known.intermediate_values.items():
            trial.report(value, step)
        if known.state == self.states.FAIL:
            trial.set_user_attr("why", known.user_attrs["why"])
        self.study.tell(trial, known.value if known.state == self.states.COMPLETE else None, state=known.state)

    def _judge(self, trial: Any, runs: int) -> _Judge:
        proposed = self._record(trial)
        config = self._run_config(proposed, tests=False)

        def begin(where: str) -> None:
            self.listener.trial_began(proposed, runs, self.config.trials)
            if where:
                tell(f"on {where}")

        def tell(words: str) -> None:
            self.listener.trial_told(proposed, words)

        stops = proposed.kind == "mixed"
        return _Judge(self.listener, trial, config, metric=self.metric, stops=stops, begin=begin, tell=tell)

    def _run(self, judges: Sequence[_Judge]) -> None:
        """Run the plans that are judged as cells, and when all are over tell optuna what each gave."""
        outcomes: dict[int, CellRecord | TrimtabError] = {}
        for number, failure in self.on.bring(judges):
            judge = judges[number]
            try:
                if failure is not None:
                    raise failure
                outcomes[number] = cell = run_cell(judge.config, judge, keep="adapters")
                for validation in cell.validation:
                    judge.report(validation)
                validation_score(cell.kept, self.metric)
            except _Pruned as pruned:
                shutil.rmtree(RunFolder(judge.config.output / "run").checkpoints, ignore_errors=True)
                outcomes[number] = pruned
            except Interrupted:
                raise
            except TrimtabError as error:
                outcomes[number] = error
            judge.trial.set_user_attr("seconds", round(time.perf_counter() - judge.since, 1))
        for number, judge in enumerate(judges):
            self._tell(judge, outcomes[number])

    def _tell(self, judge: _Judge, outcome: CellRecord | TrimtabError) -> None:
        trial = judge.trial
        if isinstance(outcome, CellRecord):
            told: dict[str, Any] = {"values": validation_score(outcome.kept, self.metric)}
        elif isinstance(outcome, _Pruned):
            told = {"state": self.states.PRUNED}
        else:
            # Before training, or before any plan has worked, it is not the plan's fault.
            if not judge.training or not any(each.state == self.states.COMPLETE for each in self._trials()):
                raise outcome
            trial.set_user_attr("why", str(outcome))
            told = {"state": self.states.FAIL}
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


class _Judge(Steps, Errand):
    """Passes on how a run goes, tells optuna of its validations, and stops the run when it is behind.

    ``stops``: whether it may be stopped.
    """

    def __init__(
        self,
        listener: SearchListener,
        trial: Any,
        config: RunConfig,
        *,
        metric: str,
        stops: bool,
        begin: Callable[[str], None],
        tell: Callable[[str], None],
    ) -> None:
        Steps.__init__(self, listener)
        Errand.__init__(self, config, "adapters")
        self.trial = trial
        self.training = False
        self.since = time.perf_counter()
        self._begin, self._tell = begin, tell
        self._metric = metric
        self._stops = stops
        # A run that goes on from a checkpoint does not tell of its earlier validations again.
        self._earlier = RunFolder(config.output / "run").read_metrics()
        self._reported: set[int] = set()

    def began(self, where: str) -> None:
        self.since = time.perf_counter()
        self._begin(where)

    def told(self, words: str) -> None:
        self._tell(words)

    def report(self, line: MetricsLine) -> None:
        """Tell optuna of a validation that has the metric, once."""
        if line.step not in self._reported and line.figure(self._metric) is not None:
            self._reported.add(line.step)
            self.trial.report(validation_score(line, self._metric), line.step)

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
            if self._stops and self.trial.should_prune():
                raise _Pruned("behind the other runs at this step")
