"""What the YAML file of a search over plans may say, strictly.

    config = load_explore(Path("explore.yaml"), ["trials=40", "base.train.epochs=1"])

The smallest file:

    base:                       # a run without its plan
      model: smollm2-135m
      data: {train: rows.jsonl, validation: 0.2}
      train: {metric: accuracy}
    budget: "lora:8"            # what uniform LoRA of rank 8 costs
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from trimtab import metrics
from trimtab.config.read import build_config, parse_override, read_mapping, set_dotted, to_mapping, validated
from trimtab.config.run import RunConfig, Section
from trimtab.config.values import Rate
from trimtab.config.yaml_text import show, write_yaml
from trimtab.errors import ConfigError

NONE = "none"
"""The word for a group that is left frozen."""


def _budget(value: object) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str) and re.fullmatch(r"\w+:[1-9]\d*", value):
        return value
    raise ValueError('expected a number of trained parameters, or a method and a rank such as "lora:8"')


def _methods(value: object) -> dict[str, dict[str, Any]]:
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        value = dict.fromkeys(value, None)
    if isinstance(value, Mapping) and value and all(isinstance(item, str) for item in value):
        named = {name: {} if options is None else options for name, options in value.items()}
        if all(isinstance(options, dict) for options in named.values()) and not named.get(NONE):
            if set(named) == {NONE}:
                raise ValueError("expected a method beside none, which trains nothing")
            return named
    raise ValueError("expected a list of methods (lora, dora, mora, none), or a mapping of them to their options")


def _globs(value: object) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if isinstance(items, list | tuple) and items and all(isinstance(item, str) and item for item in items):
        return tuple(items)
    raise ValueError("expected a pattern of module names, or a list of them")


def _rates(value: object) -> tuple[float, ...]:
    if isinstance(value, list | tuple) and all(type(item) in (int, float) and item > 0 for item in value):
        return tuple(dict.fromkeys(map(float, value)))
    raise ValueError("expected a list of learning rates, such as [5e-4, 2e-3]")


def _path(value: object) -> Path:
    if isinstance(value, str | Path) and str(value):
        return Path(value).expanduser().absolute()
    raise ValueError("expected a path")


class GroupConfig(Section):
    """Modules that get one method and one rank between them."""

    match: Annotated[tuple[str, ...], BeforeValidator(_globs)] = Field(
        description="A pattern of module names, or a list of them, as in a rule of a plan."
    )
    layers: str = Field("all", description="Blocks: all, outer:K, inner:K, or ranges such as 0-3,26-29.")


class ExploreConfig(Section):
    """Everything that decides a search."""

    base: RunConfig = Field(
        description="A run (model, data, train, evaluation) without its plan and its output, which the search decides. "
        "train.metric is what is improved, on the validation rows."
    )
    budget: Annotated[int | str, BeforeValidator(_budget)] = Field(
        description='Trained parameters of every plan at most: a number, or such as "lora:8" for what uniform LoRA of '
        "rank 8 costs on the groups."
    )
    at_least: float = Field(0.95, gt=0, lt=1, description="The share of the budget that a proposal must use.")
    outer: int | None = Field(
        None,
        ge=1,
        description="Blocks at each end that count as outer; null: a quarter of the blocks. With attention and MLP "
        "apart, that makes the four default groups.",
    )
    groups: dict[str, GroupConfig] = Field(
        default_factory=dict, description="Other groups than the default ones: name -> match, layers."
    )
    methods: Annotated[dict[str, dict[str, Any]], BeforeValidator(_methods)] = Field(
        {"lora": {}, "dora": {}, "mora": {}, NONE: {}},
        description="Methods that a group may get: a list, or a mapping to their options (but for the rank). none "
        "leaves a group frozen.",
    )
    learning_rates: Annotated[tuple[float, ...], BeforeValidator(_rates)] = Field(
        (),
        description="Learning rates to choose from, for each proposal; every uniform plan is run with each. Empty: the "
        "base's alone.",
    )
    trials: int = Field(30, ge=1, description="Runs in all; the uniform plans come first and are among them.")
    at_once: int = Field(
        1,
        ge=1,
        description="Proposals made together, which know the runs before them and not each other; with --on ray as "
        "many runs go on at once. Higher: sooner done on several machines, less learned from each run. What is "
        "proposed does not depend on where the runs are done.",
    )
    prune: Literal["median", "hyperband"] | None = Field(
        "median",
        description="Stop a run at a validation where it is behind: median (of the finished runs at that step, once "
        "there are five), hyperband, or null for never. Uniform plans always run to their end.",
    )
    confirm: int = Field(
        0,
        ge=0,
        description="Train the best mixed and the best uniform plan again with so many new seeds each, and compare "
        "them on the test rows (without test rows: on the validation rows).",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the proposals. A run's own seed is base.train.seed.")
    output: Annotated[Path, BeforeValidator(_path)] = Field(
        description="The folder of the search, relative to the YAML's (on the command line, to the working directory); "
        "by default one beside the YAML, of its name."
    )

    @model_validator(mode="after")
    def _can_be_searched(self) -> Self:
        if self.base.data.validation is None:
            raise ValueError("base.data.validation: is null, but plans are chosen by their score on validation rows")
        if self.base.train.metric == "auto":
            raise ValueError(
                "base.train.metric: name what is to be improved: "
                f"{' or '.join(metrics.choosing('choice')[1:])} (closed answers), or loss"
            )
        if self.outer is not None and self.groups:
            raise ValueError("outer: belongs to the default groups, and groups names others; leave one out")
        return self

    @property
    def rates(self) -> tuple[Rate, ...]:
        """The learning rates to choose from, the base's alone where none are named."""
        return self.learning_rates or (self.base.train.learning_rate,)


def load_explore(path: Path | str, overrides: Sequence[str] = ()) -> ExploreConfig:
    """Read a search's YAML, apply ``key.sub=value`` overrides in order, and resolve paths as ``load_config`` does.

    Raises:
        ConfigError: the file is missing or not YAML; a key is unknown; a value is not what it should be.
    """
    file = Path(path)
    raw = read_mapping(file, "'base:' and 'budget:'")
    said = raw.get("output", file.stem)
    raw["output"] = str(file.parent / said) if isinstance(said, str) and said else said
    theirs = [text.removeprefix("base.") for text in overrides if text.startswith("base.")]
    overridden = []
    for text in overrides:
        if not text.startswith("base."):
            keys, value = parse_override(text)
            set_dotted(raw, keys, value)
            overridden.append(keys)
    base = raw.get("base")
    if isinstance(base, dict):
        named = {*base, *(re.split(r"[.=]", text)[0] for text in theirs)}
        for key, why in (("plan", "is what is searched"), ("output", "belongs outside base, to the whole search")):
            if key in named:
                raise ConfigError(f"{file}: base.{key}: {why}; leave it out")
        base["output"] = str(file.parent)  # each run has a folder of its own
        raw["base"] = build_config(base, file.parent, str(file), theirs, within="base.")
    elif base is not None:
        raise ConfigError(f"{file}: base: expected the keys of a run, such as model and data, got {show(base)}.")
    return validated(ExploreConfig, raw, str(file), overridden)


def search_to_yaml(config: ExploreConfig) -> str:
    """``config`` in full as YAML text for a file in its output folder; ``load_explore`` of that gives an equal config.

    The local paths of the model and of the rows are written as seen from there, so that the folder may be moved
    together with them.
    """
    said = config.model_dump(mode="json", exclude={"base", "output"})
    base = to_mapping(config.base, beside=config.output)
    del base["plan"], base["output"]  # the search decides them
    return write_yaml({"base": base, **said, "output": "."})
