"""What the files of a study and of a search say: one definition of each, which the study writes and the reports read.

    cell.json       CellRecord, one run of a study or of a search
    results.json    StudyResults
    explore.json    SearchResults

They are written and read as those of a run are, see `trimtab.runs.records`. Where a record has several parents, the
fields of the last one stand first in the file.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from trimtab.config.values import Rate
from trimtab.metrics import METRICS, Metric
from trimtab.runs.records import FlatRecord, Machine, MetricsLine, Record, Summary
from trimtab.runs.results import Result

AnyResult = Annotated[Result, Field(discriminator="kind")]


class MeanInterval(Record):
    """A mean over ``n`` runs and its 95 % interval; None for both ends where one run says nothing of its spread."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def ends(self) -> tuple[float, float] | None:
        """Both ends of the interval, where there is one."""
        return None if self.low is None or self.high is None else (self.low, self.high)


class Difference(Record):
    """A difference of two arms' shares of right answers, with its 95 % interval, over ``seeds`` by ``rows``."""

    mean: float
    low: float
    high: float
    p: float
    seeds: int
    rows: int


class CorrectedDifference(Difference):
    """A difference among others; ``p_holm`` is its p corrected for how many there are."""

    p_holm: float


class RunFacts(Record):
    """What a study's results have of a run's summary; a run that came to its end has all of it."""

    trainable_parameters: int
    training_seconds: float
    peak_memory_gib: float
    steps: int
    train_rows: int
    train_tokens: int
    total_seconds: float
    precision: str


class _Identified(Record):
    """``identity``: what decides a cell's results; see `trimtab.studies.cell.identity`."""

    identity: dict[str, Any]


class CellRecord(RunFacts, Summary, _Identified):
    """``cell.json``: the summary of the cell's run, and what came out.

    Attributes:
        tests: test set -> its evaluation after training, with ``correct``, a ``1`` or a ``0`` for each row; of a run of
            no epochs, the model's as it is.
        before: the same of the untuned model, if the run evaluates it.
        validation: the validations, in order.
        kept: the one of them whose adapter the run ended with; None without validation rows.
        measured: what a program that asked for more has measured.
    """

    tests: dict[str, AnyResult]
    before: dict[str, AnyResult] = Field(default_factory=dict)
    validation: list[MetricsLine]
    kept: MetricsLine | None
    measured: Any = None


class _Place(Record):
    """Which run of a study."""

    task: str
    arm: str
    seed: int


class _Trained(_Place):
    learning_rate: float | None
    """None where each run is to find its own, and has not."""


class StudyRun(RunFacts, _Trained):
    """One run of a study, with its test sets."""

    tests: dict[str, AnyResult]


class _Tried(_Place):
    learning_rate: float
    taken: bool
    validation: MetricsLine


class TriedRate(RunFacts, _Tried):
    """A run that tried a learning rate; ``taken`` is whether the arm's runs have it."""


class MissingRun(_Trained):
    """A run that is not done."""

    searching: bool


class FailedRun(_Place):
    """A run that failed the last time, and is not done."""

    searching: bool
    reason: str


class StudyMachine(Machine):
    """A machine that runs of the study were trained on, with the libraries there."""

    versions: dict[str, str] = Field(default_factory=dict)


class RateSearch(Record):
    """How learning rates were searched: the arm's own times each of ``factors``."""

    factors: list[float]
    seed: int
    settings: dict[str, Any]


class StudyArm(Record):
    """An arm; ``series`` is the line of the picture that it is on."""

    arm: str
    series: str | None


class Costs(Record):
    """What the runs of an arm took."""

    trainable_parameters: MeanInterval
    training_seconds: MeanInterval
    peak_memory_gib: MeanInterval


class SummaryLine(FlatRecord, MeanInterval):
    """One arm on one test set, over its seeds.

    Attributes:
        measure: the metric whose ``mean``, ``low`` and ``high`` these are; ``figures`` has others.
        majority: what always giving the commonest answer would reach; ``chance``: what guessing would.
        learning_rate: None of an arm that is not trained.
        against: the arm that it is compared with.
    """

    order: ClassVar[tuple[str, ...]] = (
        *("task", "test", "arm", "measure", "rows", "majority", "chance", "seeds", "learning_rate"),
        *("mean", "low", "high", "n", "figures", "costs", "against", "difference"),
    )

    task: str
    test: str
    arm: str
    measure: str
    rows: int
    majority: float | None
    chance: float | None = None
    seeds: list[int]
    learning_rate: float | None
    figures: dict[str, MeanInterval | None] = Field(default_factory=dict)
    costs: Costs
    against: str | None
    difference: CorrectedDifference | None

    @property
    def metric(self) -> Metric:
        return METRICS[self.measure]


class StudyResults(Record):
    """``results.json``: everything, so that the page and every number on it can be made again.

    ``doubts``: what speaks against comparing some arms, a sentence each. ``said``: the study's YAML, as
    `trimtab.config.study.StudyConfig` read it.
    """

    title: str
    question: str
    file: str
    reference: str
    seeds: list[int]
    search: RateSearch | None
    arms: list[StudyArm]
    summary: list[SummaryLine]
    searches: list[TriedRate]
    runs: list[StudyRun]
    missing: list[MissingRun]
    failed: list[FailedRun]
    machines: list[StudyMachine]
    doubts: list[str] = Field(default_factory=list)
    said: dict[str, Any]


class SearchedGroup(Record):
    """Modules that get one method and one rank between them."""

    name: str
    match: list[str]
    layers: str
    modules: int


class PlanPart(Record):
    """What one group gets; rank 0 where the method is ``none``."""

    group: str
    method: str
    rank: int
    parameters: int


class Trial(Record):
    """A plan that a search proposed, and what came of it.

    Attributes:
        state: no file holds one that is ``running``; a listener is told of it.
        score: of a pruned one that of its last validation; None of one that failed before its first.
        validations: step and score of each.
        same_as: the number of the trial that ran this plan before.
        why: the reason of a failed one.
    """

    number: int
    kind: Literal["uniform", "mixed"]
    state: Literal["running", "complete", "pruned", "failed"]
    score: float | None
    parts: list[PlanPart]
    parameters: int
    learning_rate: Rate
    validations: list[tuple[int, float]]
    seconds: float | None
    same_as: int | None
    why: str | None

    @property
    def scored(self) -> float:
        """The score of one that has one: it is complete or pruned."""
        assert self.score is not None, "a trial that failed has no score to compare"
        return self.score


class ConfirmedSeed(Record):
    """The scores of both plans with one new seed."""

    seed: int
    mixed: float
    uniform: float


class Confirmation(Record):
    """The best mixed and the best uniform plan with new seeds: the mean of mixed minus uniform with its 95 % interval.

    ``on``: the test sets, or ``validation``.
    """

    on: list[str]
    rows: list[ConfirmedSeed]
    difference: float
    low: float | None
    high: float | None

    @property
    def ends(self) -> tuple[float, float] | None:
        """Both ends of the interval; one seed has none."""
        return None if self.low is None or self.high is None else (self.low, self.high)


class SearchResults(Record):
    """``explore.json``: the trials of a search, the numbers of the best ones, and what new seeds gave.

    Attributes:
        runs: how many trials took a run of their own; ``repeated``: how many were known already.
        unfit: how many proposals could not spend the budget.
    """

    model: str
    metric: str
    budget: int
    at_least: float
    groups: list[SearchedGroup]
    methods: list[str]
    learning_rates: list[Rate]
    seed: int
    run_seed: int
    runs: int
    repeated: int
    unfit: int
    best: int | None
    best_mixed: int | None
    best_uniform: int | None
    trials: list[Trial]
    confirmation: Confirmation | None

    @field_validator("metric")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in METRICS:
            raise ValueError(f"expected one of {', '.join(METRICS)}")
        return name

    @property
    def improved(self) -> Metric:
        """What the search improves."""
        return METRICS[self.metric]

    def numbered(self, number: int | None) -> Trial | None:
        """The trial of that number."""
        return next((trial for trial in self.trials if trial.number == number), None)
