"""What a search has found so far: optuna's trials as the rows of ``explore.json``, and the best of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.config.search import ExploreConfig
from trimtab.metrics import METRICS
from trimtab.studies.search_space import Part, Space

Row = dict[str, Any]


def is_over(trial: Any) -> bool:
    """Whether optuna's ``trial`` has come to its end. One that was cut off is marked as failed, but says no reason."""
    return trial.state.is_finished() and (trial.state.name != "FAIL" or "why" in trial.user_attrs)


def ran(trials: Sequence[Any]) -> list[Any]:
    """Those of optuna's ``trials`` that took a run of their own, to its end or to where it was left."""
    return [trial for trial in trials if is_over(trial) and _has_plan(trial) and "same_as" not in trial.user_attrs]


def _has_plan(trial: Any) -> bool:
    return "plan" in trial.user_attrs


def row_of(trial: Any, space: Space) -> Row:
    """One of optuna's trials as ``explore.json`` has it. ``score`` of a pruned one is that of its last validation."""
    said = trial.user_attrs
    parts = [Part(method, rank) for method, rank in said["plan"]]
    costs = [space.cost(group, part) or 0 for group, part in zip(space.groups, parts, strict=True)]
    last = trial.intermediate_values[max(trial.intermediate_values)] if trial.intermediate_values else None
    return {
        "number": trial.number,
        "kind": "uniform" if "uniform" in said else "mixed",
        "state": "failed" if trial.state.name == "FAIL" else trial.state.name.lower(),
        "score": trial.value if trial.state.name == "COMPLETE" else last,
        "parts": [
            {"group": group.name, "method": part.method, "rank": part.rank, "parameters": cost}
            for group, part, cost in zip(space.groups, parts, costs, strict=True)
        ],
        "parameters": sum(costs),
        "learning_rate": said["rate"],
        "validations": sorted(trial.intermediate_values.items()),
        "seconds": said.get("seconds"),
        "same_as": said.get("same_as"),
        "why": said.get("why"),
    }


def best_of(rows: Sequence[Row], metric: str, kind: str | None = None) -> Row | None:
    """The completed row with the best score, the earliest of equals; of one ``kind`` or of both."""
    done = [row for row in rows if row["state"] == "complete" and kind in (None, row["kind"])]
    return min(done, key=lambda row: (METRICS[metric].cost(row["score"]), row["number"]), default=None)


def found(
    config: ExploreConfig, space: Space, trials: Sequence[Any], confirmation: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What ``explore.json`` holds."""
    rows = [row_of(trial, space) for trial in trials if is_over(trial) and _has_plan(trial)]
    best = [best_of(rows, config.base.train.metric, kind) for kind in (None, "mixed", "uniform")]
    numbers = [None if row is None else row["number"] for row in best]
    return {
        "model": config.base.model.name,
        "metric": config.base.train.metric,
        "budget": space.budget,
        "at_least": space.at_least,
        "groups": [
            {"name": group.name, "match": list(group.match), "layers": group.layers, "modules": group.modules}
            for group in space.groups
        ],
        "methods": list(space.methods),
        "learning_rates": list(config.rates),
        "seed": config.seed,
        "run_seed": config.base.train.seed,
        "runs": len(ran(trials)),
        "repeated": sum(row["same_as"] is not None for row in rows),
        "unfit": sum(is_over(trial) and not _has_plan(trial) for trial in trials),
        **dict(zip(("best", "best_mixed", "best_uniform"), numbers, strict=True)),
        "trials": rows,
        "confirmation": confirmation,
    }
