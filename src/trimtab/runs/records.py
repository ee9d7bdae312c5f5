"""What the files of a run folder say: one definition of each, which the run writes and all others read.

    summary.json    Summary          metrics.jsonl         MetricsLine, one a line
    plan.json       PlanRecord       evaluation/, predictions/    see `trimtab.runs.results`

Whoever makes a record names its fields, and a field that there is not is an error. A file is read with more patience:
keys that are unknown are left out, so that what a newer version wrote can still be shown, and so are old ones.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_serializer,
    model_serializer,
    model_validator,
)

from trimtab.files import write_json
from trimtab.hints import seen_from_here
from trimtab.metrics import METRICS
from trimtab.models.locate import ModelHead

if TYPE_CHECKING:
    from trimtab.surgery.attach_report import AttachReport


class Record(BaseModel):
    """What a file says. Its fields stand in the file in their order."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)

    @classmethod
    def read(cls, values: Any) -> Self:
        """The record of plain values that came from a file; raises pydantic's ValidationError."""
        return cls.model_validate(values, extra="ignore")

    def plain(self) -> dict[str, Any]:
        """The values as the file holds them; what was never said is left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    def updated(self, **values: Any) -> Self:
        """A copy with other values, which are checked as those of a new record are."""
        return type(self)(**{**{name: getattr(self, name) for name in self.model_fields_set}, **values})

    def write_to(self, file: Path) -> None:
        """Write the file in one step."""
        write_json(file, self.plain())


class FlatRecord(Record):
    """A record with something of each of several metrics. In the file each stands by the metric's name among the other
    keys; here they are ``figures``, which a subclass declares."""

    order: ClassVar[tuple[str, ...]] = ("figures",)
    """How the keys follow each other: metrics that are not named stand at the place of ``figures``."""

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "figures" in values:
            return values
        names = [name for name in METRICS if name in values and name not in cls.model_fields]
        rest = {key: value for key, value in values.items() if key not in names}
        return {**rest, "figures": {name: values[name] for name in names}}

    @model_serializer(mode="wrap")
    def _flatten(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = handler(self)
        figures = values.pop("figures", {})
        free = [name for name in METRICS if name in figures and name not in self.order]
        keys = [name for key in self.order for name in (free if key == "figures" else [key])]
        known = {**values, **figures}
        return {key: known[key] for key in keys if key in known}


class FiguresRecord(FlatRecord):
    """A record with metrics."""

    figures: dict[str, float | None] = {}


class SourceRecord(Record):
    """What was taken of one source of training rows."""

    path: str
    forms: list[str]
    rows: int
    training: int
    """Those that are left when ``data.train_limit`` and the validation rows are taken."""
    weight: float = 1.0
    an_epoch: int
    """How many come in an epoch: ``training`` times ``weight``."""

    @property
    def shown(self) -> str:
        """The path as seen from here, where it lies below."""
        path = Path(self.path)
        return str(seen_from_here(path)) if path.is_absolute() else self.path

    def __str__(self) -> str:
        said = f"{self.shown}: {self.rows:,} row{'s' * (self.rows != 1)} ({', '.join(self.forms)})"
        if self.training != self.rows:
            said += f", {self.training:,} to train on"
        return said + (f", weight {self.weight:g}: {self.an_epoch:,} in an epoch" if self.weight != 1 else "")


class RowsDigest(Record):
    """By which a run that is resumed knows its rows again, wherever they lie now."""

    train: str
    validation: str | None = None
    test: dict[str, str] = {}


def same_rows(then: str | None, now: str | None) -> bool:
    """Whether two digests say the same. What pictures hold, in the second part, earlier versions did not record."""
    if then is None or now is None:
        return then == now
    return all(before == after for before, after in zip(then.split(), now.split(), strict=False))


class RuleRecord(Record):
    """One rule of a plan and what it came to."""

    rule: int
    method: str
    match: str | list[str]
    layers: Any = "all"
    options: dict[str, Any] = {}
    modules: int
    parameters: int


class ModuleRecord(Record):
    """One module that got an adapter; ``rows`` and ``columns`` are the shape ``[out, in]`` of its base."""

    module: str
    method: str
    rule: int
    rows: int = Field(alias="out")
    columns: int = Field(alias="in")
    parameters: int


class PlanRecord(Record):
    """``plan.json``: what the plan did to the model; its fields are those of `AttachReport`."""

    total_parameters: int
    trainable_parameters: int
    zero_rows: dict[str, int] = {}
    # Said when the plan is made, and not written: they follow from the model and the rules.
    lowered_ranks: dict[str, int] = Field({}, exclude=True)
    unreached: dict[str, int] = Field({}, exclude=True)
    frozen_ties: dict[str, str] = Field({}, exclude=True)
    rules: list[RuleRecord]
    modules: list[ModuleRecord] = []

    @classmethod
    def of(cls, report: AttachReport) -> PlanRecord:
        """What ``attach`` reports."""
        return cls.model_validate(report.to_dict())

    @property
    def methods(self) -> list[str]:
        """The methods in the order of the rules, each once."""
        return list(dict.fromkeys(rule.method for rule in self.rules))

    @property
    def headline(self) -> str:
        """How many modules are adapted, and what share of the model is trained."""
        share = 100 * self.trainable_parameters / max(1, self.total_parameters)
        told = f"{share:.2f}" if share >= 0.1 or not share else f"{share:.3g}"
        return (
            f"{len(self.modules)} module{'s' * (len(self.modules) != 1)} adapted: {self.trainable_parameters:,} of "
            f"{self.total_parameters:,} parameters trained ({told} %)"
        )

    def remarks(self, *, usual: bool = True) -> list[str]:
        """What the user should know of the plan, a line each: rows of zeros, ranks that were lowered, layers
        that are tied to an adapted one, and what no rule reached.

        ``usual``: also where that is what most plans leave alone, the embedding and the output head.
        """
        from trimtab.surgery.attach_report import usually_frozen  # torch: not to read a record

        lines = []
        if self.zero_rows:
            rows = sum(self.zero_rows.values())
            lines.append(f"{rows} rows of zeros in {len(self.zero_rows)} modules keep their output at zero")
        if self.lowered_ranks:
            lines.append(f"rank lowered to the largest that fits: {_some(self.lowered_ranks)}")
        lines += [
            f"{name} has the weight of {adapted} and not its adapter: one rule that matches both trains it for both"
            for name, adapted in self.frozen_ties.items()
        ]
        if self.unreached and self.modules and (usual or not all(map(usually_frozen, self.unreached))):
            kinds = f"{len(self.unreached)} kind{'s' * (len(self.unreached) > 1)}"
            numbers = sum(self.unreached.values())
            lines.append(f"not reached by any rule: {numbers:,} numbers in {kinds}: {_some(self.unreached)}")
        return lines


def _some(figures: dict[str, int]) -> str:
    """The first few entries of ``figures`` for a line of text."""
    said = [f"{name} {figure:,}" for name, figure in list(figures.items())[:6]]
    return ", ".join([*said, f"and {len(figures) - 6} more"] if len(figures) > 6 else said)


class MetricsLine(FiguresRecord):
    """A line of ``metrics.jsonl``: of training, or of a validation, whose metrics are ``figures``.

    A loss that is no number is read: the page says so.
    """

    model_config = ConfigDict(allow_inf_nan=True)
    order: ClassVar[tuple[str, ...]] = (
        *("kind", "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second"),
        *("figures", "seconds", "memory_gib", "device_memory_gib"),
    )

    kind: str
    step: int
    epoch: float | None = None
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None
    memory_gib: float | None = None
    device_memory_gib: float | None = None

    def figure(self, name: str) -> float | None:
        """The metric of that name, the loss among them; None where the line does not have it."""
        return self.loss if name == "loss" else self.figures.get(name)


class Machine(Record):
    """Where a run was trained; ``device`` is the name of an accelerator, where it was one."""

    processor: str | None = None
    cores: int | None = None
    memory_gib: float | None = None
    device: str | None = None
    device_memory_gib: float | None = None


class BeganFrom(Record):
    """The adapter that a run began from, and the SHA-256 of its files."""

    adapter: str
    sha256: str


class HeadRecord(Record):
    """What the model of a run was read for; its fields are those of `ModelHead`."""

    model_class: str
    problem: str
    labels: list[str] = []
    seed: int = 0
    centre: float = 0.0
    spread: float = 0.0

    @classmethod
    def of(cls, head: ModelHead) -> HeadRecord | None:
        """None where the model brought its head."""
        if head == ModelHead():
            return None
        return cls(**{**asdict(head), "labels": list(head.labels)})

    @property
    def head(self) -> ModelHead:
        """The same for `Source`."""
        return ModelHead(**{**self.model_dump(), "labels": tuple(self.labels)})


class Summary(Record):
    """``summary.json``; a run that was stopped early leaves parts of it out.

    Attributes:
        status: ``interrupted`` until the run is ``finished``, or has ``diverged``.
        trained: whether training is over and its adapter written; None in what an earlier version wrote.
        precision: what the run computed in.
        best_step: whose adapter the run ended with; None: that of the last one.
        task: what the model is asked for; ``head``: what it was read for, where it is no causal language model.
        form: of the rows; ``choices``: the closed set of their answers, if they have one.
        train_tokens: of all training rows once; ``counted``: what stands in for tokens, such as pictures;
            ``loss_unit``: what the loss of training is counted in.
        learning_rate: the peak rate, as it was said or found.
        processes: how many trained it; memory is that of the first.
        peak_memory_gib: of the process; ``peak_device_memory_gib``: of an accelerator.
        notes: what the user should know of the rows, the settings and the model, a sentence each.
        began_from: the adapter that training began with; None: a fresh one.
        sources: what was taken of each source of training rows; ``digests``: by which the rows are known again;
            ``model_digest``: by which the model is; ``adapter_mark``: by which the adapter is that training ended with.
        settings: those that decide what is trained, by their dotted keys.
    """

    status: str = "interrupted"
    trained: bool | None = None
    model: str | None = None
    created: datetime | None = None
    steps: int | None = None
    epochs: float | None = None
    training_seconds: float | None = None
    precision: str | None = None
    quantisation: str | None = None
    best_step: int | None = None
    task: str | None = None
    head: HeadRecord | None = None
    form: str | None = None
    choices: list[str] | None = None
    train_rows: int | None = None
    validation_rows: int | None = None
    train_tokens: int | None = None
    counted: str = "tokens"
    loss_unit: str = "nats per token"
    learning_rate: float | None = None
    versions: dict[str, str] = {}
    machine: Machine = Machine()
    processes: int = 1
    total_parameters: int | None = None
    trainable_parameters: int | None = None
    total_seconds: float | None = None
    peak_memory_gib: float | None = None
    peak_device_memory_gib: float | None = None
    adapter_bytes: int | None = None
    notes: list[str] = []
    began_from: BeganFrom | None = None
    sources: list[SourceRecord] = []
    digests: RowsDigest | None = None
    model_digest: str | None = None
    adapter_mark: str | None = None
    settings: dict[str, Any] = {}

    @property
    def peaks(self) -> str:
        """The peak memory, in words: of an accelerator, where the run computed on one, and of the process."""
        process, there = f"{self.peak_memory_gib or 0.0:.2f} GiB", self.peak_device_memory_gib
        return process if there is None else f"{there:.2f} GiB on {self.machine.device}, and {process} of the machine's"

    @field_serializer("created")
    def _iso(self, moment: datetime | None) -> str | None:
        return moment.isoformat(timespec="seconds") if moment is not None else None
