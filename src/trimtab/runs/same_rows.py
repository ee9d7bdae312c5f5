"""Whether a run that is resumed has the rows that it began with.

Rows are held by their content and order, not by their place: they may have moved. Other training or validation rows
would go on with another split and another order, so they are refused; other test rows are evaluated anew.
"""

from __future__ import annotations

from collections.abc import Sequence

from trimtab import hints
from trimtab.errors import RunError
from trimtab.runs.beginning import Opening
from trimtab.runs.records import RowsDigest, SourceRecord


def require_same_rows(opening: Opening, now: RowsDigest, sources: Sequence[SourceRecord], *, trains: bool) -> list[str]:
    """The names of test sets whose rows are others than when the run began.

    Args:
        opening: the run's folder and what is known of it; one of an older version has no digests, and is not held.
        now: of the rows as they were read now; ``sources``: of the training rows.
        trains: whether there is training left to do.

    Raises RunError if the training or validation rows are others, and there is training left.
    """
    before, folder = opening.summary, opening.folder.path
    if before is None or before.digests is None:
        if before is not None and opening.changes.moved:
            raise RunError(
                f"{folder}: the run began with an earlier version, which did not record its rows; resume it with the "
                f"paths that it began with: {opening.folder.resume_command}"
            )
        return []
    then = before.digests
    if trains and (then.train, then.validation) != (now.train, now.validation):
        which = "training" if then.train != now.train else "validation"
        then_rows, now_rows = (sum(source.rows for source in told) for told in (before.sources, sources))
        if which == "validation":
            told = "other rows, or another order"
        elif then_rows != now_rows:
            told = f"{then_rows:,} rows were read then, {now_rows:,} now"
        else:
            told = f"{now_rows:,} rows as then, but others, or in another order"
        named = ", ".join(source.path for source in sources)
        raise RunError(
            f"{folder}: the {which} rows are not those that the run began with ({told}), so it cannot go on as it "
            f"began. Put the rows back ({named}), or name them where they lie now (data.train=...), and resume; or "
            f"train on the new rows in a run of its own: "
            f"{hints.pasted('finetune', folder / 'config.yaml', 'output=NEW')}"
        )
    return sorted(name for name, digest in now.test.items() if then.test.get(name, digest) != digest)
