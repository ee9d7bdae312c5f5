"""Metrics of answers from a closed set, computed by scikit-learn over exactly that set.

The classes are the choices, whatever the predictions were: a wrong answer never makes a class of its own, which would
lower the macro average by how many different mistakes there are. A choice that neither occurs nor is predicted has
F1 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def choice_metrics(truth: Sequence[str], predicted: Sequence[str], choices: Sequence[str]) -> dict[str, Any]:
    """Accuracy, F1, figures per class, confusion and the majority class's accuracy, ready for JSON.

    Args:
        truth: the right answer of each row, one of ``choices``; at least one row.
        predicted: the model's answer of each row. One that is not among ``choices`` is wrong: it lowers the recall of
            the true class and is in no column of ``confusion``.
        choices: the classes, in the order in which ``confusion`` has them: ``confusion[true][predicted]``.

    Returns:
        ``accuracy``, ``macro_f1``, ``weighted_f1``, ``per_class``, ``confusion`` and ``majority``. The majority answer
        is the most frequent one of ``truth`` itself, the first of equals.
    """
    from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

    labels = list(choices)
    precision, recall, f1, rows = precision_recall_fscore_support(truth, predicted, labels=labels, zero_division=0.0)
    figures = zip(labels, precision.tolist(), recall.tolist(), f1.tolist(), rows.tolist(), strict=True)
    most = int(rows.argmax())
    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1.mean()),
        "weighted_f1": float((f1 * rows).sum() / rows.sum()),
        "per_class": {
            label: {"precision": p, "recall": r, "f1": f, "rows": int(count)} for label, p, r, f, count in figures
        },
        "confusion": confusion_matrix(truth, predicted, labels=labels).tolist(),
        "majority": {"answer": labels[most], "accuracy": float(rows[most] / rows.sum())},
    }
