"""What a search has found so far: optuna's trials as the records of ``explore.json``, and the best of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.config.search import ExploreConfig
from trimtab.metrics import METRICS
from trimtab.runs.study_records import Confirmation, PlanPart, SearchedGroup, SearchResults, Trial
from trimtab.studies.search_space import Part, Space


def is_over(trial: Any) -> bool:
    """Whether optuna's ``trial`` has come to its end. One that was cut off is marked as failed, but says no reason."""
    return trial.state.is_finished() and (trial.state.name != "FAIL" or "why" in trial.user_attrs)


def ran(trials: Sequence[Any]) -> list[Any]:
    """Those of optuna's ``trials`` that took a run of their own, to its end or to where it was left."""
    return [trial for trial in trials if is_over(trial) and _has_plan(trial) and "same_as" not in trial.user_attrs]


def _has_plan(trial: Any) -> bool:
    return "plan" in trial.user_attrs


def trial_record(trial: Any, space: Space) -> Trial:
    """One of optuna's trials as ``explore.json`` has it."""
    said = trial.user_attrs
    parts = [Part(method, rank) for method, rank in said["plan"]]
    costs = [space.cost(group, part) or 0 for group, part in zip(space.groups, parts, strict=True)]
    last = trial.intermediate_values[max(trial.intermediate_values)] if trial.intermediate_values else None
    return Trial(
        number=trial.number,
        kind="uniform" if "uniform" in said else "mixed",
        state="failed" if trial.state.name == "FAIL" else trial.state.name.lower(),
        score=trial.value if trial.state.name == "COMPLETE" else last,
        parts=[
            PlanPart(group=group.name, method=part.method, rank=part.rank, parameters=cost)
            for group, part, cost in zip(space.groups, parts, costs, strict=True)
        ],
        parameters=sum(costs),
        learning_rate=said["rate"],
        validations=sorted(trial.intermediate_values.items()),
        seconds=said.get("seconds"),
        same_as=said.get("same_as"),
        why=said.get("why"),
    )


def best_of(trials: Sequence[Trial], metric: str, kind: str | None = None) -> Trial | None:
    """The completed trial with the best score, the earliest of equals; of one ``kind`` or of both."""
    done = [trial for trial in trials if trial.state == "complete" and kind in (None, trial.kind)]
    return min(done, key=lambda trial: (METRICS[metric].cost(trial.scored), trial.number), default=None)


def search_results(
    config: ExploreConfig, space: Space, trials: Sequence[Any], confirmation: Confirmation | None
) -> SearchResults:
    """What ``explore.json`` holds. ``trials``: optuna's."""
    records = [trial_record(trial, space) for trial in trials if is_over(trial) and _has_plan(trial)]
    best, mixed, uniform = (best_of(records, config.base.train.metric, kind) for kind in (None, "mixed", "uniform"))
    return SearchResults(
        model=config.base.model.name,
        metric=config.base.train.metric,
        budget=space.budget,
        at_least=space.at_least,
        groups=[
            SearchedGroup(name=group.name, match=list(group.match), layers=group.layers, modules=group.modules)
            for group in space.groups
        ],
        methods=list(space.methods),
        learning_rates=list(config.rates),
        seed=config.seed,
        run_seed=config.base.train.seed,
        runs=len(ran(trials)),
        repeated=sum(trial.same_as is not None for trial in records),
        unfit=sum(is_over(trial) and not _has_plan(trial) for trial in trials),
        best=best.number if best else None,
        best_mixed=mixed.number if mixed else None,
        best_uniform=uniform.number if uniform else None,
        trials=records,
        confirmation=confirmation,
    )
