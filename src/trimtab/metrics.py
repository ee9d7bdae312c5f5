"""The one table of metrics. A metric is one entry: what it is called, how it is computed, how it is shown, and where.

The evaluation computes what the table has for its kind of result. The terminal, the page of a run and the comparison of
a study show what they find there, and ``train.metric`` takes what can choose the best step.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

Kind = Literal["choice", "multiple_choice", "generation", "perplexity", "labels", "number", "tags"]
"""What was asked of the rows: an answer of one closed set, one of each row's own choices, an open answer, no answer;
several labels of one set, a number, a tag for each word."""

KINDS: tuple[Kind, ...] = get_args(Kind)


class ClassFigures(NamedTuple):
    """How well each class is recognised: arrays in the order of the classes; ``rows``: how often it is the true one."""

    precision: Any
    recall: Any
    f1: Any
    rows: Any


@dataclass(frozen=True)
class Outcomes:
    """What metrics are computed from. A kind of result fills in what it has; a metric gives None without its part.

    Attributes:
        truth: the right answer of each row (of each part, where an answer has several).
        predicted: the model's answer to each.
        choices: the closed set of answers.
        by_length: the choice of each row that is best by its log-likelihood per character.
        correct: whether each row counts as right, where that is more than equal texts.
        usable: whether what the model wrote could be read at all.
        explanations: whether the answers are texts, whose words can be compared.
        overlaps: whether the answers are texts that may share a part with the true one.
        loss: the summed loss of the answers' ``tokens``.
        probabilities: of each choice for each row, ``[rows, choices]``, where a head gives them.
        true_labels, given_labels: of each row, where a row has several; ``choices`` are all that there are.
    """

    truth: Sequence[str] = ()
    predicted: Sequence[str] = ()
    choices: Sequence[str] = ()
    by_length: Sequence[str] | None = None
    correct: Sequence[bool] | None = None
    usable: Sequence[bool] | None = None
    explanations: bool = False
    overlaps: bool = False
    loss: float = 0.0
    tokens: int = 0
    probabilities: Any = None
    true_labels: Sequence[Sequence[str]] = ()
    given_labels: Sequence[Sequence[str]] = ()

    @cached_property
    def classes(self) -> ClassFigures:
        """By scikit-learn, over exactly the choices: a wrong answer never makes a class of its own."""
        from sklearn.metrics import precision_recall_fscore_support

        labels = list(self.choices)
        return ClassFigures(
            *precision_recall_fscore_support(self.truth, self.predicted, labels=labels, zero_division=0.0)
        )

    @cached_property
    def indicators(self) -> tuple[Any, Any]:
        """True and given labels as ``[rows, choices]`` of 0 and 1."""
        from sklearn.preprocessing import MultiLabelBinarizer

        binarizer = MultiLabelBinarizer(classes=list(self.choices))
        return binarizer.fit_transform(self.true_labels), binarizer.fit_transform(self.given_labels)

    @cached_property
    def label_figures(self) -> ClassFigures:
        """By scikit-learn, each label by itself, where a row has several."""
        from sklearn.metrics import precision_recall_fscore_support

        return ClassFigures(*precision_recall_fscore_support(*self.indicators, average=None, zero_division=0.0))


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
        unit: what a number is counted in.
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
    unit: str = ""

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
        unit = "%" if self.share else self.unit
        return f"{self.label} ({unit})" if unit else self.label

    def cost(self, value: float) -> float:
        """``value`` so that less is better."""
        return -value if self.higher_is_better else value


def _accuracy(rows: Outcomes) -> float:
    return _share(a == b for a, b in zip(rows.truth, rows.predicted, strict=True))


def _accuracy_norm(rows: Outcomes) -> float | None:
    return None if rows.by_length is None else _share(a == b for a, b in zip(rows.truth, rows.by_length, strict=True))


def _macro_f1(rows: Outcomes) -> float:
    return float((rows.label_figures if rows.true_labels else rows.classes).f1.mean())


def _weighted_f1(rows: Outcomes) -> float:
    classes = rows.classes
    return float((classes.f1 * classes.rows).sum() / classes.rows.sum())


def _matthews(rows: Outcomes) -> float | None:
    """Matthews' correlation, also of more than two classes."""
    if rows.probabilities is None:
        return None
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(rows.truth, rows.predicted))


def _auroc(rows: Outcomes) -> float | None:
    """The area under the ROC curve; of more than two classes the mean over them, each against the rest. None where one
    of them does not occur."""
    if rows.probabilities is None or set(rows.truth) != set(rows.choices):
        return None
    from sklearn.metrics import roc_auc_score

    truth = [[one == choice for choice in rows.choices] for one in rows.truth]
    return float(roc_auc_score(truth, rows.probabilities, average="macro"))


def _micro_f1(rows: Outcomes) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(*rows.indicators, average="micro", zero_division=0.0))


def _mean_loss(rows: Outcomes) -> float | None:
    return rows.loss / rows.tokens if rows.tokens else None


def _exact_match(rows: Outcomes) -> float | None:
    return None if rows.correct is None else _share(rows.correct)


def _unusable(rows: Outcomes) -> float | None:
    return None if rows.usable is None else _share(not usable for usable in rows.usable)


def _word_f1(rows: Outcomes) -> float | None:
    if not rows.explanations:
        return None
    return sum(word_f1(a, b) for a, b in zip(rows.predicted, rows.truth, strict=True)) / len(rows.truth)


def word_f1(one: str, other: str) -> float:
    """F1 of the words in common, counted as often as they stand in both; case and punctuation do not count."""
    first, second = (Counter(re.findall(r"\w+", text.casefold())) for text in (one, other))
    total = first.total() + second.total()
    return 2 * (first & second).total() / total if total else 1.0


def _chrf(rows: Outcomes) -> float | None:
    """chrF of all answers together, by sacrebleu, as a share of 1."""
    if not rows.overlaps:
        return None
    from sacrebleu.metrics.chrf import CHRF

    return float(CHRF().corpus_score(list(rows.predicted), [list(rows.truth)]).score) / 100


def _rouge_l(rows: Outcomes) -> float | None:
    """The mean ROUGE-L of the answers (F1 of the longest common subsequence of words), by rouge-score."""
    if not rows.overlaps:
        return None
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    pairs = zip(rows.truth, rows.predicted, strict=True)
    return sum(float(scorer.score(a, b)["rougeL"].fmeasure) for a, b in pairs) / len(rows.truth)


def _perplexity(rows: Outcomes) -> float | None:
    """``exp(loss / tokens)``; at most ``exp(700)``, near the largest number that a float holds."""
    return math.exp(min(rows.loss / rows.tokens, 700.0)) if rows.tokens else None


def _elsewhere(_: Outcomes) -> None:
    return None


def _share(flags: Iterable[bool]) -> float:
    values = list(flags)
    return sum(values) / len(values)


_TABLE = (
    Metric(
        "micro_f1",
        "micro F1",
        _micro_f1,
        kinds=("labels",),
        in_terminal=("labels",),
        chooses=True,
        compared=True,
        full_label="F1 over all labels of all rows",
    ),
    Metric(
        "accuracy",
        "accuracy",
        _accuracy,
        kinds=("choice", "multiple_choice"),
        in_terminal=("choice", "multiple_choice"),
        chooses=True,
        compared=True,
    ),
    Metric(
        "accuracy_norm",
        "accuracy per character",
        _accuracy_norm,
        kinds=("multiple_choice",),
        in_terminal=("multiple_choice",),
        full_label="accuracy by likelihood per character",
    ),
    Metric(
        "macro_f1",
        "macro F1",
        _macro_f1,
        kinds=("choice", "labels"),
        in_terminal=("choice", "labels"),
        chooses=True,
        compared=True,
    ),
    Metric("weighted_f1", "weighted F1", _weighted_f1, kinds=("choice",)),
    Metric("matthews", "Matthews", _matthews, kinds=("choice",), share=False, full_label="Matthews correlation"),
    Metric("auroc", "AUROC", _auroc, kinds=("choice",), share=False, full_label="area under the ROC curve"),
    Metric(
        "mean_weighted_f1",
        "weighted F1 over questions",
        _elsewhere,
        kinds=("choice",),
        full_label="mean of weighted F1 over questions",
    ),
    Metric(
        "exact_match",
        "exact match",
        _exact_match,
        kinds=("generation", "labels"),
        in_terminal=("generation",),
        compared=True,
    ),
    Metric(
        "unusable",
        "unusable",
        _unusable,
        kinds=("choice", "generation"),
        in_terminal=("generation",),
        higher_is_better=False,
    ),
    Metric("chrf", "chrF", _chrf, kinds=("generation",), in_terminal=("generation",), compared=True),
    Metric("rouge_l", "ROUGE-L", _rouge_l, kinds=("generation",), in_terminal=("generation",), compared=True),
    Metric("word_f1", "word F1", _word_f1, kinds=("generation",), full_label="F1 over words"),
    Metric(
        "perplexity",
        "perplexity",
        _perplexity,
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
        _mean_loss,
        kinds=("labels", "number", "tags"),
        share=False,
        higher_is_better=False,
        chooses=True,
        unit="nats per token",
    ),
)

METRICS = {metric.name: metric for metric in _TABLE}


def of_kind(kind: str) -> list[Metric]:
    """The metrics of a kind of result, the main one first."""
    return [metric for metric in _TABLE if kind in metric.kinds]


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


def measure(kind: Kind, outcomes: Outcomes) -> dict[str, float]:
    """Every metric of ``kind`` that ``outcomes`` suffice for, by name."""
    values = {metric.name: metric.function(outcomes) for metric in of_kind(kind)}
    return {name: value for name, value in values.items() if value is not None}


def first_in(values: Mapping[str, float | None]) -> Metric | None:
    """The first metric of the table that ``values`` hold: the main one of a result."""
    return next((metric for metric in _TABLE if values.get(metric.name) is not None), None)
