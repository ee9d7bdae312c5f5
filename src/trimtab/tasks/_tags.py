"""Tags of words, judged: as entities, or each by itself."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from trimtab.data.labelled import Labelled
from trimtab.evaluation.answers import Judged, prediction
from trimtab.evaluation.closed_set import class_details
from trimtab.outcomes import Outcomes
from trimtab.runs.results import ClassScore

NONE = "O"
"""The tag of a word that belongs to no entity."""

_PREFIXED = re.compile(r"[BIESLU]-.+")


def mark_entities(tags: Sequence[str]) -> bool:
    """Whether ``tags`` are those of a scheme (BIO, IOBES, BILOU): each begins or goes on with an entity, or is O."""
    marked = [tag for tag in tags if tag != NONE]
    return bool(marked) and all(_PREFIXED.fullmatch(tag) for tag in marked)


def likeliest(logits: Tensor, labels: Sequence[str]) -> list[str]:
    """The tag of each word by its ``logits`` ``[words, labels]``; a word that was not read, of NaN, has none: O, or the
    first tag where there is no O."""
    unread = list(labels).index(NONE) if NONE in labels else 0
    best = logits.argmax(-1).where(~logits.isnan().any(-1), unread)
    return [labels[at] for at in best.tolist()]


def judged(logits: Sequence[Tensor], examples: Sequence[Labelled], labels: Sequence[str]) -> Judged:
    """The likeliest tag of each word. ``logits``: of each row ``[words, labels]``, NaN for a word that was not read."""
    given = [likeliest(row, labels) for row in logits]
    truth = [list(example.labels) for example in examples]
    rows = [
        prediction(at, example, " ".join(tags), tags == list(example.labels), words=list(example.words))
        for at, (example, tags) in enumerate(zip(examples, given, strict=True))
    ]
    outcomes = Outcomes(
        truth=[tag for tags in truth for tag in tags],
        predicted=[tag for tags in given for tag in tags],
        choices=labels,
        true_tags=truth,
        given_tags=given,
    )
    words = {"words": len(outcomes.truth)}
    if not mark_entities(labels):
        return Judged("tags", outcomes, rows, {**class_details(outcomes), **words})
    per_class = {
        name: ClassScore(precision=one["precision"], recall=one["recall"], f1=one["f1-score"], rows=int(one["support"]))
        for name, one in outcomes.entities.items()
        if not name.endswith(" avg")
    }
    return Judged("entities", outcomes, rows, {"choices": list(labels), "per_class": per_class, **words})
