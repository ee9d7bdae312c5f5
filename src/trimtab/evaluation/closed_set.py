"""Figures for each class of a closed set of answers.

The classes are the choices, whatever was predicted: if wrong answers were classes of their own, the macro average would
fall with the number of different mistakes. A choice that neither occurs nor is predicted has an F1 of 0.
"""

from __future__ import annotations

from typing import Any

from trimtab.outcomes import Outcomes
from trimtab.runs.results import Majority, class_scores


def class_details(rows: Outcomes) -> dict[str, Any]:
    """The fields ``choices``, ``per_class``, ``confusion`` and ``majority`` of a `ChoiceResult`.

    A prediction that is not among the choices is wrong: it lowers the recall of the true class and is in no column of
    ``confusion[true][predicted]``. The majority answer is the most frequent true one, and the first of equals.
    """
    from sklearn.metrics import confusion_matrix

    labels, classes = list(rows.choices), rows.classes
    most = int(classes.rows.argmax())
    return {
        "choices": labels,
        "per_class": class_scores(labels, classes),
        "confusion": confusion_matrix(rows.truth, rows.predicted, labels=labels).tolist(),
        "majority": Majority(answer=labels[most], accuracy=float(classes.rows[most] / classes.rows.sum())),
    }
