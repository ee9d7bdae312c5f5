"""The one table of metrics. A metric is one entry: what it is called, how it is computed, how it is shown, and where.

The evaluation computes what the table has for its kind of result. The terminal, the page of a run and the comparison of
a study show what they find there, and ``train.metric`` takes what can choose the best step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from trimtab import outcomes
from trimtab.outcomes import Outcomes

Kind = Literal["choice", "multiple_choice", "generation", "perplexity", "labels", "number", "tags", "entities"]
"""What was asked of the rows: an answer of one closed set, one of each row's own choices, an open answer, no answer;
several labels of one set, a number, a tag for each word, tags that mark entities."""

KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: its key in every file, and in ``train.metric``.
        label: its name in tables.
        function: computes it; None where the outcomes do not have what it needs, or where whoever asks other questions
            than a row's computes it.
        kinds: the kinds of result that have it. The first entry of a kind is its main one, which studies compare.
        in_terminal: the kinds whose closing table in the terminal has room for it.
        share: a share of 1, shown in percent; otherwise a number.
        higher_is_better: which way is better.
        chooses: whether it can decide which step of a training was best.
        compared: whether studies gather it.
        full_label: its name where there is room to say how it is counted.
    """

    name: str
    label: str
    function: Callable[[Outcomes], float | None]
    kinds: tuple[Kind, ...]
    in_terminal: tuple[Kind, ...] = ()
    share: bool = True
    higher_is_better: bool = True
    chooses: bool = False
    compared: bool = False
    full_label: str = ""

    @property
    def scale(self) -> int:
        """By what a value is multiplied before it is shown."""
        return 100 if self.share else 1

    @property
    def described(self) -> str:
        """The full label, or the label where that is all."""
        return self.full_label or self.label

    @property
    def axis(self) -> str:
        """What stands at an axis: ``accuracy (%)``."""
        return f"{self.label} (%)" if self.share else self.label

    def cost(self, value: float) -> float:
        """``value`` so that less is better."""
        return -value if self.higher_is_better else value


_TABLE = (
    Metric(
        "entity_f1",
        "entity F1",
        outcomes.entity_f1,
        kinds=("entities",),
        in_terminal=("entities",),
        chooses=True,
        compared=True,
        full_label="F1 over entities (seqeval)",
    ),
    Metric(
        "entity_precision",
        "entity precision",
        outcomes.entity_precision,
        kinds=("entities",),
        in_terminal=("entities",),
    ),
    Metric("entity_recall", "entity recall", outcomes.entity_recall, kinds=("entities",), in_terminal=("entities",)),
    Metric(
        "rmse",
        "RMSE",
        outcomes.rmse,
        kinds=("number",),
        in_terminal=("number",),
        share=False,
        higher_is_better=False,
        chooses=True,
        compared=True,
        full_label="root mean squared error",
    ),
    Metric(
        "pearson",
        "Pearson",
        outcomes.pearson,
        kinds=("number",),
        in_terminal=("number",),
        share=False,
        chooses=True,
        compared=True,
        full_label="Pearson correlation",
    ),
    Metric(
        "spearman",
        "Spearman",
        outcomes.spearman,
        kinds=("number",),
        in_terminal=("number",),
        share=False,
        chooses=True,
        full_label="Spearman correlation",
    ),
    Metric(
        "mean_absolute_error",
        "mean absolute error",
        outcomes.mean_absolute_error,
        kinds=("number",),
        in_terminal=("number",),
        share=False,
        higher_is_better=False,
        chooses=True,
    ),
    Metric(
        "micro_f1",
        "micro F1",
        outcomes.micro_f1,
        kinds=("labels",),
        in_terminal=("labels",),
        chooses=True,
        compared=True,
        full_label="F1 over all labels of all rows",
    ),
    Metric(
        "accuracy",
        "accuracy",
        outcomes.accuracy,
        kinds=("choice", "multiple_choice", "tags", "entities"),
        in_terminal=("choice", "multiple_choice", "tags", "entities"),
        chooses=True,
        compared=True,
    ),
    Metric(
        "accuracy_norm",
        "accuracy per character",
        outcomes.accuracy_norm,
        kinds=("multiple_choice",),
        in_terminal=("multiple_choice",),
        full_label="accuracy by likelihood per character",
    ),
    Metric(
        "macro_f1",
        "macro F1",
        outcomes.macro_f1,
        kinds=("choice", "labels", "tags"),
        in_terminal=("choice", "labels", "tags"),
        chooses=True,
        compared=True,
        full_label="F1, the mean over all labels (0 of one that no row has)",
    ),
    Metric("weighted_f1", "weighted F1", outcomes.weighted_f1, kinds=("choice",)),
    Metric(
        "matthews", "Matthews", outcomes.matthews, kinds=("choice",), share=False, full_label="Matthews correlation"
    ),
    Metric("auroc", "AUROC", outcomes.auroc, kinds=("choice",), share=False, full_label="area under the ROC curve"),
    Metric(
        "mean_weighted_f1",
        "weighted F1 over questions",
        outcomes.elsewhere,
        kinds=("choice",),
        full_label="mean of weighted F1 over questions",
    ),
    Metric(
        "exact_match",
        "exact match",
        outcomes.exact_match,
        kinds=("generation", "labels"),
        in_terminal=("generation",),
        compared=True,
    ),
    Metric(
        "unusable",
        "unusable",
        outcomes.unusable,
        kinds=("choice", "generation"),
        in_terminal=("generation",),
        higher_is_better=False,
    ),
    Metric("chrf", "chrF", outcomes.chrf, kinds=("generation",), in_terminal=("generation",), compared=True),
    Metric("rouge_l", "ROUGE-L", outcomes.rouge_l, kinds=("generation",), in_terminal=("generation",), compared=True),
    Metric("word_f1", "word F1", outcomes.mean_word_f1, kinds=("generation",), full_label="F1 over words"),
    Metric(
        "perplexity",
        "perplexity",
        outcomes.perplexity,
        kinds=("choice", "multiple_choice", "generation", "perplexity"),
        in_terminal=("multiple_choice", "generation", "perplexity"),
        share=False,
        higher_is_better=False,
        compared=True,
    ),
    # Of a validation, by ``of_validation``, where results have the perplexity.
    Metric(
        "loss",
        "loss",
        outcomes.mean_loss,
        kinds=("labels", "number", "tags", "entities"),
        share=False,
        higher_is_better=False,
        chooses=True,
    ),
)

METRICS = {metric.name: metric for metric in _TABLE}


def of_kind(kind: str) -> list[Metric]:
    """The metrics of a kind of result, the main one first."""
    return [metric for metric in _TABLE if kind in metric.kinds]


def counts_rows(kind: str) -> bool:
    """Whether the main metric of that kind is the share of rows that are right: then rows can be paired, and the
    interval of a share holds."""
    return kind in ("choice", "multiple_choice", "generation")


def main_metric(kind: str) -> Metric:
    """The metric by which results of that kind are compared."""
    return of_kind(kind)[0]


def choosing(kind: str | None = None) -> list[str]:
    """The names of the metrics that can choose the best step: all, or those that validation rows of ``kind`` have.

    Every validation has its loss.
    """
    return ["loss"] + [m.name for m in _TABLE if m.chooses and m.name != "loss" and kind in (None, *m.kinds)]


def best_by(said: str, *, scored: bool) -> Metric:
    """What ``train.metric`` means: ``auto`` is the accuracy where answers are ``scored``, and else the loss."""
    return METRICS[("accuracy" if scored else "loss") if said == "auto" else said]


def of_validation(figures: Mapping[str, float | None]) -> dict[str, float]:
    """What the line of a validation says: the loss, and of the ``figures`` of its rows those that can choose."""
    return {name: of_result(name, figures) for name in choosing() if name == "loss" or figures.get(name) is not None}


def of_result(name: str, figures: Mapping[str, float | None]) -> float:
    """The metric ``name``, one that can choose, of a result: its loss is the logarithm of its perplexity."""
    from_perplexity = name == "loss" and figures.get("loss") is None
    value = figures["perplexity" if from_perplexity else name]
    assert value is not None, "rows that are answered or continued have a loss"
    return math.log(value) if from_perplexity else value


def compared() -> list[Metric]:
    """The metrics that studies gather."""
    return [metric for metric in _TABLE if metric.compared]


def measure(kind: Kind, rows: Outcomes) -> dict[str, float]:
    """Every metric of ``kind`` that ``rows`` suffice for, by name."""
    values = {metric.name: metric.function(rows) for metric in of_kind(kind)}
    return {name: value for name, value in values.items() if value is not None}


def first_in(values: Mapping[str, float | None]) -> Metric | None:
    """The first metric of the table that ``values`` hold: the main one of a result."""
    return next((metric for metric in _TABLE if values.get(metric.name) is not None), None)
