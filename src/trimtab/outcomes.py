"""What came of the rows of an evaluation, and each figure that can be computed from it. `trimtab.metrics` has the table
of them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple


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
        true_tags, given_tags: of each word of each row; ``truth`` and ``predicted`` have those of all rows in a row.
        true_numbers, given_numbers: of each row, where the answers are numbers.
    """

    truth: Sequence[str] = ()
    predicted: Sequence[str] = ()
    choices: Sequence[str] = ()
    by_length: Sequence[str] | None = None
    correct: Sequence[bool | None] | None = None
    usable: Sequence[bool] | None = None
    explanations: bool = False
    overlaps: bool = False
    loss: float = 0.0
    tokens: int = 0
    probabilities: Any = None
    true_labels: Sequence[Sequence[str]] = ()
    given_labels: Sequence[Sequence[str]] = ()
    true_tags: Sequence[Sequence[str]] = ()
    given_tags: Sequence[Sequence[str]] = ()
    true_numbers: Sequence[float] = ()
    given_numbers: Sequence[float] = ()

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
    def entities(self) -> Mapping[str, Mapping[str, float]]:
        """By seqeval: precision, recall, F1 and number of the entities of each kind, and of all (``micro avg``). An
        entity is right if it has the true kind, and begins and ends where the true one does, as conlleval has it."""
        from seqeval.metrics import classification_report

        sides = [[[_as_seqeval(tag) for tag in tags] for tags in side] for side in (self.true_tags, self.given_tags)]
        if {tag for side in sides for tags in side for tag in tags} <= {"O"}:
            return {"micro avg": {"precision": 0.0, "recall": 0.0, "f1-score": 0.0, "support": 0}}
        report: Mapping[str, Mapping[str, float]] = classification_report(*sides, output_dict=True, zero_division=0)
        return report

    @cached_property
    def label_figures(self) -> ClassFigures:
        """By scikit-learn, each label by itself, where a row has several."""
        from sklearn.metrics import precision_recall_fscore_support

        return ClassFigures(*precision_recall_fscore_support(*self.indicators, average=None, zero_division=0.0))


def accuracy(rows: Outcomes) -> float:
    return _share(a == b for a, b in zip(rows.truth, rows.predicted, strict=True))


def accuracy_norm(rows: Outcomes) -> float | None:
    return None if rows.by_length is None else _share(a == b for a, b in zip(rows.truth, rows.by_length, strict=True))


def macro_f1(rows: Outcomes) -> float:
    return float((rows.label_figures if rows.true_labels else rows.classes).f1.mean())


def weighted_f1(rows: Outcomes) -> float:
    classes = rows.classes
    return float((classes.f1 * classes.rows).sum() / classes.rows.sum())


def matthews(rows: Outcomes) -> float | None:
    """Matthews' correlation, also of more than two classes."""
    if rows.probabilities is None:
        return None
    if len({*rows.truth, *rows.predicted}) == 1:
        return 0.0  # scikit-learn says the same, and warns
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(rows.truth, rows.predicted))


def auroc(rows: Outcomes) -> float | None:
    """The area under the ROC curve; of more than two classes the mean over them, each against the rest. None where one
    of them does not occur."""
    if rows.probabilities is None or set(rows.truth) != set(rows.choices):
        return None
    from sklearn.metrics import roc_auc_score

    truth = [[one == choice for choice in rows.choices] for one in rows.truth]
    return float(roc_auc_score(truth, rows.probabilities, average="macro"))


def micro_f1(rows: Outcomes) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(*rows.indicators, average="micro", zero_division=0.0))


def entity_f1(rows: Outcomes) -> float:
    return float(rows.entities["micro avg"]["f1-score"])


def entity_precision(rows: Outcomes) -> float:
    return float(rows.entities["micro avg"]["precision"])


def entity_recall(rows: Outcomes) -> float:
    return float(rows.entities["micro avg"]["recall"])


def _as_seqeval(tag: str) -> str:
    """BILOU in the letters of IOBES: L (last) is E (end), U (unit) is S (single)."""
    return {"L-": "E-", "U-": "S-"}.get(tag[:2], tag[:2]) + tag[2:]


def rmse(rows: Outcomes) -> float:
    """Root of the mean squared error."""
    return math.sqrt(_mean((a - b) ** 2 for a, b in _numbers(rows)))


def mean_absolute_error(rows: Outcomes) -> float:
    return _mean(abs(a - b) for a, b in _numbers(rows))


def pearson(rows: Outcomes) -> float | None:
    from scipy.stats import pearsonr

    return float(pearsonr(*zip(*_numbers(rows), strict=True)).statistic) if _vary(rows) else None


def spearman(rows: Outcomes) -> float | None:
    from scipy.stats import spearmanr

    return float(spearmanr(*zip(*_numbers(rows), strict=True)).statistic) if _vary(rows) else None


def _numbers(rows: Outcomes) -> list[tuple[float, float]]:
    return list(zip(rows.true_numbers, rows.given_numbers, strict=True))


def _vary(rows: Outcomes) -> bool:
    """Whether both sides are more than one number over and over, beyond rounding: else they have no correlation."""
    sides = (rows.true_numbers, rows.given_numbers)
    return all(max(side) - min(side) > 1e-9 * max(map(abs, side)) for side in sides)


def mean_loss(rows: Outcomes) -> float | None:
    return rows.loss / rows.tokens if rows.tokens else None


def exact_match(rows: Outcomes) -> float | None:
    return None if rows.correct is None else _share(map(bool, rows.correct))


def unusable(rows: Outcomes) -> float | None:
    return None if rows.usable is None else _share(not usable for usable in rows.usable)


def mean_word_f1(rows: Outcomes) -> float | None:
    if not rows.explanations:
        return None
    return sum(word_f1(a, b) for a, b in zip(rows.predicted, rows.truth, strict=True)) / len(rows.truth)


def word_f1(one: str, other: str) -> float:
    """F1 of the words in common, counted as often as they stand in both; case and punctuation do not count."""
    first, second = (Counter(re.findall(r"\w+", text.casefold())) for text in (one, other))
    total = first.total() + second.total()
    return 2 * (first & second).total() / total if total else 1.0


def chrf(rows: Outcomes) -> float | None:
    """chrF of all answers together, by sacrebleu, as a share of 1."""
    if not rows.overlaps:
        return None
    from sacrebleu.metrics.chrf import CHRF

    return float(CHRF().corpus_score(list(rows.predicted), [list(rows.truth)]).score) / 100


def rouge_l(rows: Outcomes) -> float | None:
    """The mean ROUGE-L of the answers (F1 of the longest common subsequence of words), by rouge-score."""
    if not rows.overlaps:
        return None
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    pairs = zip(rows.truth, rows.predicted, strict=True)
    return sum(float(scorer.score(a, b)["rougeL"].fmeasure) for a, b in pairs) / len(rows.truth)


def perplexity(rows: Outcomes) -> float | None:
    """``exp(loss / tokens)``; at most ``exp(700)``, near the largest number that a float holds."""
    return math.exp(min(rows.loss / rows.tokens, 700.0)) if rows.tokens else None


def elsewhere(_: Outcomes) -> None:
    return None


def _mean(numbers: Iterable[float]) -> float:
    values = list(numbers)
    return math.fsum(values) / len(values)


def _share(flags: Iterable[bool]) -> float:
    values = list(flags)
    return sum(values) / len(values)
