"""What ``explore.json`` says, in words and in order; shared by the terminal, the page and the pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.reports import words

Row = Mapping[str, Any]


def part_words(part: Row) -> str:
    """``mora 9``, or ``none``."""
    return part["method"] + (f" {part['rank']}" if part["rank"] else "")


def plan_words(row: Row) -> str:
    """``mora 9, dora 7, none, lora 8``: the parts of a plan in the order of the groups; a uniform plan in one."""
    parts = [part_words(part) for part in row["parts"]]
    return parts[0] if row["kind"] == "uniform" else ", ".join(parts)


def score_words(found: Row, value: float | None) -> str:
    """A share in percent, a loss as a number."""
    if value is None:
        return words.DASH
    return f"{value:.4f}" if found["metric"] == "loss" else words.percent(value)


def confirmation_words(found: Row) -> str:
    """Mixed minus uniform over the new seeds, in one sentence."""
    said = found["confirmation"]
    loss = found["metric"] == "loss"
    digits, times, unit = (4, 1.0, "") if loss else (1, 100.0, " points")
    mean, *ends = (
        None if value is None else words.signed(times * value, digits)
        for value in (said["difference"], said["low"], said["high"])
    )
    count = len(said["rows"])
    span = f" (95 % interval over seeds {ends[0]} to {ends[1]})" if None not in ends else " (one seed has no interval)"
    verdict = "no difference is shown"
    if said["low"] is not None and said["low"] * said["high"] > 0:
        verdict = "mixed is better" if (said["difference"] < 0) == loss else "uniform is better"
    what = "loss" if loss else found["metric"].replace("_", " ")
    seeds = f"{count} new seed{'s' if count > 1 else ''}"
    return f"best mixed minus best uniform, {what} on {', '.join(said['on'])}, {seeds}: {mean}{unit}{span}; {verdict}"


def own_runs(found: Row) -> list[Row]:
    """The trials that took a run, in order."""
    return [row for row in found["trials"] if row["same_as"] is None]


def numbered(found: Row, number: int | None) -> Row | None:
    """The trial of that number."""
    return next((row for row in found["trials"] if row["number"] == number), None)


def by_score(found: Row, kind: str) -> list[Row]:
    """The runs of one kind (``mixed`` or ``uniform``) that came to their end, the best first."""
    sign = 1 if found["metric"] == "loss" else -1
    done = [row for row in own_runs(found) if row["kind"] == kind and row["state"] == "complete"]
    return sorted(done, key=lambda row: (sign * row["score"], row["number"]))


def best_uniform_runs(found: Row) -> list[Row]:
    """The best run of each uniform method, the best first."""
    best: dict[str, Row] = {}
    for row in by_score(found, "uniform"):
        best.setdefault(row["parts"][0]["method"], row)
    return list(best.values())


def best_quarter(found: Row) -> list[Row]:
    """The best quarter (three at least) of the mixed plans that came to their end; empty where there are fewer."""
    done = by_score(found, "mixed")
    return done[: max(3, len(done) // 4)] if len(done) >= 3 else []
