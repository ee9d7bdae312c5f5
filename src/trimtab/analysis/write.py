"""Writes an analysis: ``changes.json`` with everything, and ``changes.csv`` with a row for each weight and state."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from trimtab.analysis.changes import Change, correlation
from trimtab.files import write_json, write_text

_COMPOSED = ("most_grown", "most_turned", "singular_values")
_COLUMNS = [field.name for field in fields(Change) if field.name not in _COMPOSED]


def correlations(changes: Sequence[Change]) -> list[dict[str, Any]]:
    """The correlation of dM and dD for each folder and method, over all weights and states (``kind`` is then None) and
    over those of each kind of projection."""
    groups: dict[tuple[str, str, str | None], list[Change]] = defaultdict(list)
    for one in changes:
        groups[one.tuned, one.method, None].append(one)
        groups[one.tuned, one.method, one.kind].append(one)
    return [
        {"tuned": tuned, "method": method, "kind": kind, "points": len(group), "correlation": correlation(group)}
        for (tuned, method, kind), group in groups.items()
    ]


def write_changes(out: Path, base: str, changes: Sequence[Change]) -> dict[str, Any]:
    """Write both files into ``out``, and return the content of ``changes.json``."""
    analysis = {"base": base, "correlations": correlations(changes), "changes": [asdict(one) for one in changes]}
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
