"""What the YAML file of a study may say: arms by tasks by seeds, all else equal.

    base:                               # what all runs share, as a run's YAML says it
      model: smollm2-135m
      data: {train: rows.jsonl, test: test.jsonl, validation: null, train_limit: 1000}
      train: {epochs: 1, learning_rate: 5e-4}
    tasks: {finance: {}}                # name -> what differs from base; one task called "all" if left out
    arms:                               # name -> what differs from base and task
      lora: {plan: [{match: all-linear, method: lora, rank: 8}]}
      dora: {plan: [{match: all-linear, method: dora, rank: 8}]}
      untrained: {train: {epochs: 0}}
    reference: lora                     # what every other arm is compared with
    seeds: [0, 1, 2]
    means: {both: [fpb, fiqa]}          # a name -> test sets whose mean is told, too
    search:                             # as many learning rates tried for every arm
      factors: [0.4, 1, 2.5]            # times the arm's own
      settings: {data: {validation: 0.25}}

A later mapping is merged into an earlier one key by key; any other value replaces what was there. What the runs of such
a study are is told by `trimtab.studies.study_cells`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from trimtab.config.read import Schema, override, read_mapping, spell_out, validated
from trimtab.config.run import Section
from trimtab.config.yaml_text import show
from trimtab.errors import did_you_mean

Settings = dict[str, Any]
ONE_TASK = "all"
"""The name of the task of a study that names none."""


def _names(value: dict[str, Any]) -> dict[str, Any]:
    for name in value:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._+-]*", name):
            raise ValueError(f"expected names made of letters, digits, spaces and '.', '_', '+', '-', not '{name}'")
    if not value:
        raise ValueError("expected at least one")
    return value


def _arms(value: dict[str, Any]) -> dict[str, Any]:
    for name, arm in value.items():
        if not isinstance(arm.get("series", ""), str):
            raise ValueError(f"expected series to be a name; '{name}' has {show(arm['series'])}")
        if (other := arm.get("against")) is not None and (other not in value or other == name):
            raise ValueError(f"expected against to be another arm or null; '{name}' has {show(other)}")
    return _names(value)


def _mapping(value: object) -> object:
    if not isinstance(value, Mapping):
        raise ValueError("expected a mapping")
    if "output" in value:
        raise ValueError("output is the study's to choose, not a run's; remove it")
    return value


def _listed(value: object) -> object:
    if not isinstance(value, list | tuple):
        raise ValueError("expected a list")
    return tuple(value)


def _different(value: tuple[Any, ...]) -> tuple[Any, ...]:
    if not value or len(set(value)) < len(value):
        raise ValueError("expected one or more, all different")
    return value


_Overrides = Annotated[Settings, BeforeValidator(_mapping)]
_Factor = Annotated[float, Field(gt=0)]
_Seed = Annotated[int, Field(ge=0, lt=2**32)]


class RateSearchConfig(Section):
    """How every arm's learning rate is found, on validation rows and by runs of their own."""

    factors: Annotated[tuple[_Factor, ...], BeforeValidator(_listed), AfterValidator(_different)] = Field(
        description="Learning rates tried, as multiples of the arm's own; so every arm gets the same effort."
    )
    seed: int = Field(1000, ge=0, lt=2**32, description="train.seed of these runs; none of the study's seeds.")
    settings: _Overrides = Field(
        default_factory=dict,
        description="What differs in these runs, such as fewer rows and those split off for validation.",
    )


class StudyConfig(Section):
    """A study: every arm on every task by every seed."""

    title: str | None = Field(None, description="The page's title; null: the file's name.")
    question: str = Field("", description="What is asked, in a sentence or two for the page.")
    base: _Overrides = Field(description="What all runs share: the keys of a run's YAML.")
    tasks: Annotated[dict[str, _Overrides], AfterValidator(_names)] = Field(
        {ONE_TASK: {}}, description="Name of a task -> what differs from base."
    )
    arms: Annotated[dict[str, _Overrides], AfterValidator(_arms)] = Field(
        description="Name of an arm -> what differs from base and task; 'series', the name of a line through arms; "
        "'against', the arm that it is compared with in place of the reference, or null for none."
    )
    reference: str = Field(description="The arm that every other is compared with.")
    seeds: Annotated[tuple[_Seed, ...], BeforeValidator(_listed), AfterValidator(_different)] = Field(
        (0, 1, 2), description="train.seed of the runs of an arm."
    )
    means: dict[str, Annotated[tuple[str, ...], BeforeValidator(_listed), AfterValidator(_different)]] = Field(
        default_factory=dict,
        description="Name of a mean -> the test sets that it is of, each of which counts as one however many rows it "
        "has; told like a test set.",
    )
    search: RateSearchConfig | None = Field(None, description="The search for learning rates; null: as the arms say.")
    keep: Literal["results", "adapters"] = Field("results", description="What is kept of a run that is done.")
    output: str | None = Field(
        None,
        min_length=1,
        description="The study's folder, relative to the YAML's; null: the file's name.",
    )

    @model_validator(mode="after")
    def _reference_is_an_arm(self) -> Self:
        if self.reference not in self.arms:
            raise ValueError(f"reference: '{self.reference}' is no arm.{did_you_mean(self.reference, self.arms)}")
        if self.search is not None and self.search.seed in self.seeds:
            raise ValueError(f"search.seed: {self.search.seed} is among the study's seeds; choose another")
        return self


def read_study(schema: type[Schema], file: Path, overrides: Sequence[str]) -> Schema:
    """What the YAML of a study says, with ``key.sub=value`` put into its ``base`` in order. Raises ConfigError."""
    raw = read_mapping(file, "'base:' and 'arms:'")
    if isinstance(raw.get("base"), dict):
        spell_out(raw["base"])
        for text in overrides:
            override(raw["base"], text)
    return validated(schema, raw, str(file), ())


def merge_settings(before: Settings, after: Settings) -> Settings:
    """``after`` put into ``before``, mapping into mapping; both stay as they are."""
    merged, after = deepcopy(before), deepcopy(after)
    spell_out(after)
    for key, value in after.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge_settings(merged[key], value) if both else value
    return merged
