"""The files of an analysis: ``changes.json`` with everything, ``changes.csv`` with a row for each weight and state."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trimtab.analysis.changes import Change, correlation
from trimtab.files import write_json, write_text

_COLUMNS = (
    "tuned",
    "state",
    "step",
    "method",
    "module",
    "kind",
    "block",
    "norm",
    "delta_magnitude",
    "delta_direction",
    "relative",
    "effective_rank",
)


def correlations(changes: Sequence[Change]) -> list[dict[str, Any]]:
    """The correlation of dM and dD for each folder and method: over all its weights and states (``kind`` null), and
    for each kind of projection. ``points`` is how many it is over."""
    groups: dict[tuple[str, str, str | None], list[Change]] = defaultdict(list)
    for one in changes:
        groups[one.tuned, one.method, None].append(one)
        groups[one.tuned, one.method, one.kind].append(one)
    return [
        {"tuned": tuned, "method": method, "kind": kind, "points": len(found), "correlation": correlation(found)}
        for (tuned, method, kind), found in groups.items()
    ]


def write_changes(out: Path, base: str, changes: Sequence[Change]) -> dict[str, Any]:
    """Write both files into ``out``; return what ``changes.json`` holds."""
    rows = [asdict(one) for one in changes]
    analysis = {"base": base, "correlations": correlations(changes), "changes": rows}
    write_json(out / "changes.json", analysis)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_COLUMNS, "most_grown_row", "most_grown", "most_turned_row", "most_turned", "singular_values"])
    for one in changes:
        extremes = (one.most_grown.row, one.most_grown.value, one.most_turned.row, one.most_turned.value)
        values = " ".join(f"{value:.6g}" for value in one.singular_values)
        writer.writerow([*(getattr(one, column) for column in _COLUMNS), *extremes, values])
    write_text(out / "changes.csv", text.getvalue())
    return analysis
