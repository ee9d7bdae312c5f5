"""What `benchmarks/gpu.py` has found so far: rows in a JSON file that is whole after every one of them, the bars that
they are held against, and the tables."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import show

BAR_TOKENS = 4096
"""Tokens of the step that most bars are about."""


class Record:
    """The file of a measurement: ``{"about": ..., "rows": [...], "notes": [...]}``, read back if it is there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        held = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        self.about: dict[str, Any] = held.get("about", {})
        self.rows: list[dict[str, Any]] = held.get("rows", [])
        self.notes: list[str] = held.get("notes", [])

    def add(self, part: str, **row: Any) -> None:
        """One more row, written at once; it replaces an earlier one that says the same ``name``."""
        known = [one for one in self.rows if (one["part"], one["name"]) != (part, row["name"])]
        self.rows = [*known, {"part": part, **row}]
        self.write()

    def note(self, text: str) -> None:
        """A sentence about what was left out, and why."""
        if text not in self.notes:
            print(f"note: {text}", flush=True)
            self.notes.append(text)
            self.write()

    def has(self, part: str, name: str) -> bool:
        return any((one["part"], one["name"]) == (part, name) for one in self.rows)

    def of(self, part: str) -> list[dict[str, Any]]:
        return [one for one in self.rows if one["part"] == part]

    def write(self) -> None:
        from trimtab.files import write_json

        self.path.parent.mkdir(parents=True, exist_ok=True)
        bars = [vars(bar) for bar in bars_of(self)]
        write_json(self.path, {"about": self.about, "rows": self.rows, "notes": self.notes, "bars": bars})


@dataclass(frozen=True)
class Bar:
    """One of the bars, and the figure that it is about."""

    what: str
    most: float
    found: float | None

    @property
    def verdict(self) -> str:
        return "not measured" if self.found is None else "met" if self.found <= self.most else "MISSED"


def bars_of(record: Record) -> list[Bar]:
    """The bars for Llama-8B-shaped blocks in every kind that was measured at ``BAR_TOKENS`` tokens (of tiny shapes:
    the longest that there is), and the checks."""
    steps = [one for one in record.of("steps") if "ratio" in one]
    longest = max((one["tokens"] for one in steps if one["tokens"] <= BAR_TOKENS), default=BAR_TOKENS)
    shape = next((one["shape"] for one in steps if "8b" in one["shape"]), steps[0]["shape"] if steps else "8b")
    bars = []
    for kind in ("bf16", "int8", "nf4"):
        at = next((one for one in steps if (one["shape"], one["kind"], one["tokens"]) == (shape, kind, longest)), {})
        time, peak = at.get("ratio", {}), at.get("peak_mib", {})
        bars += [
            Bar(f"{kind}: DoRA / frozen", 1.15, time.get("dora")),
            Bar(f"{kind}: DoRA / our LoRA", 1.05, _over(time, "dora", "lora")),
            Bar(f"{kind}: DoRA / PEFT's DoRA", 0.5, _over(time, "dora", "peft dora")),
            Bar(f"{kind}: DoRA's peak memory / our LoRA's", 1.02, _over(peak, "dora", "lora")),
        ]
    checks = record.of("checks")
    failed = [one for one in checks if one.get("failed")]
    return [Bar("checks that fail", 0, float(len(failed)) if checks else None), *bars]


def _over(figures: dict[str, float], one: str, other: str) -> float | None:
    there = figures.get(one) is not None and figures.get(other)
    return figures[one] / figures[other] if there else None


def print_tables(record: Record) -> None:
    """All that there is, whatever is missing."""
    if record.about:
        print("\n".join(f"{name}: {value}" for name, value in record.about.items()))
    if checks := record.of("checks"):
        columns = ["against float64", "cases", "worst / tolerance", "failed"]
        show("checks", columns, [_check_cells(one) for one in checks])
    for one in record.of("steps"):
        if "error" in one:
            print(f"{one['name']}: {one['error']}")
            continue
        rows = [
            [
                arm,
                *(_cell(one[key].get(arm), form) for key, form in STEP_COLUMNS.values()),
                one.get("errors", {}).get(arm, ""),
            ]
            for arm in {**one["ms"], **one.get("errors", {})}
        ]
        show(f"{one['name']}, medians of {one['repeats']}", ["arm", *STEP_COLUMNS, "failed with"], rows)
    for one in record.of("run"):
        lines = [f"  {name}: {value}" for name, value in one.items() if name not in ("part", "name")]
        print("\n".join([one["name"], *lines]))
    verdicts = [[bar.what, f"{bar.most:g}", _cell(bar.found, ".3f"), bar.verdict] for bar in bars_of(record)]
    show(f"bars, at most ({BAR_TOKENS:,} tokens, blocks of Llama-8B's shape)", ["", "bar", "found", ""], verdicts)
    for text in record.notes:
        print(f"note: {text}")


STEP_COLUMNS = {
    "ms": ("ms", ".2f"),
    "/ frozen": ("ratio", ".3f"),
    "busy ms": ("busy_ms", ".2f"),
    "launches": ("launches", ".0f"),
    "peak MiB": ("peak_mib", ".0f"),
    "held MiB": ("held_mib", ".0f"),
}
"""Title -> key of a row of steps, and how its figures are written. Busy: the kernels' own time. Peak: what a step takes
beyond what stood there before it; held: the weights of the arm."""


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _check_cells(one: dict[str, Any]) -> Iterable[str]:
    return one["name"], str(one.get("cases", "")), _cell(one.get("worst"), ".2f"), "; ".join(one.get("failed", [])[:2])
