"""Rules and plans, which say which modules in which layers get which method with which options.

What a plan comes to in a model is a list of targets, which `trimtab.surgery.targets` finds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import nn

from trimtab import bases, methods
from trimtab.errors import PlanError, did_you_mean

ALL_LINEAR = "all-linear"
_LAYERS = re.compile(r"all|(outer|inner):[1-9]\d{0,5}|\d{1,6}(-\d{1,6})?(,\d{1,6}(-\d{1,6})?)*", re.ASCII)


class Rule(BaseModel):
    """Which modules get which method.

    Args:
        match: a glob over module names such as ``"*.q_proj"`` (``fnmatch``), a list of them, or ``"all-linear"`` for
            every linear layer except the output head, with the projections of ``nn.MultiheadAttention``. A weight that
            hangs on a module as a parameter is called ``MODULE.PARAMETER``, and selected by the module's name, too.
            Only modules of the kind that the method sits on can match; of nested blocks, only the outermost is taken.
        layers: blocks by number: ``"all"``, ``"outer:K"`` (the first K and the last K), ``"inner:K"`` (all except
            those), or ranges such as ``"0-3,26-29"``.
        method: the name of a method: ``lora``, ``dora`` and ``mora`` sit on layers with one weight (linear layers,
            look-ups, convolutions), ``full`` on any module, with all that is inside it, ``serial`` and ``parallel`` on
            blocks.
        **options: the method's own options (``rank=8, alpha=16``).

    Raises PlanError for an unknown method, option or layer selector.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    match: tuple[str, ...]
    layers: str = "all"
    method: str
    options: methods.Options

    def __init__(self, **said: Any) -> None:
        try:
            super().__init__(**said)
        except ValidationError as error:
            raise PlanError(_explain(error, said)) from None

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, said: dict[str, Any]) -> dict[str, Any]:
        own = {key: value for key, value in said.items() if key in ("match", "layers", "method")}
        given = {key: value for key, value in said.items() if key not in own}
        if "method" not in own:
            raise ValueError(f"'method' is missing: expected one of {', '.join(methods.names())}")
        kind = methods.options_class(str(own["method"]))
        for key in given:
            if key not in kind.model_fields:
                known = [*kind.model_fields, "match", "layers", "method"]
                hint = did_you_mean(key, known) or f" Known here: {', '.join(known)}."
                raise ValueError(f"unknown option '{key}' for method {own['method']}.{hint}")
        return {**own, "options": kind(**given)}

    @field_validator("match", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("match")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or not all(value):
            raise ValueError("expected a glob over module names, or a list of them")
        return value

    @field_validator("layers", mode="before")
    @classmethod
    def _layers_form(cls, value: Any) -> str:
        text = str(value).replace(" ", "")
        if not _LAYERS.fullmatch(text):
            raise ValueError(f"expected 'all', 'outer:K', 'inner:K' or ranges such as '0-3,26-29', got '{value}'")
        return text

    @property
    def method_class(self) -> type[methods.Method]:
        """The class of the method's adapters."""
        return methods.method_class(self.method)

    @property
    def sits_on(self) -> bases.Kind:
        """The kind of base that the method takes."""
        return self.method_class.kind_for(self.options)

    @property
    def all_linear(self) -> bool:
        """Whether this rule asks for every linear layer except the output head."""
        return ALL_LINEAR in self.match and self.sits_on != "block"

    def describe(self) -> dict[str, Any]:
        """The rule as a mapping, such that ``Rule(**rule.describe())`` equals it."""
        match = self.match[0] if len(self.match) == 1 else list(self.match)
        return {"match": match, "layers": self.layers, "method": self.method, **self.options.said()}


def _explain(error: ValidationError, said: dict[str, Any]) -> str:
    lines = []
    for problem in error.errors():
        place = ".".join(str(part) for part in problem["loc"] if part != "options")
        got = "" if isinstance(problem["input"], dict) else f", got {problem['input']!r}"
        message = problem["msg"].removeprefix("Value error, ")
        lines.append(f"{place}: {message}{got}" if place else message)
    return f"rule {said!r}: " + "; ".join(lines)


class Plan(BaseModel):
    """An ordered list of rules; the last rule that matches a module decides."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rules: tuple[Rule, ...] = Field(min_length=1)

    def __init__(self, rules: Iterable[Rule | dict[str, Any]]) -> None:
        made = []
        for number, rule in enumerate(rules, 1):
            if not isinstance(rule, (Rule, dict)):
                raise PlanError(f"rule {number}: expected a Rule or a mapping, got {type(rule).__name__}")
            made.append(rule if isinstance(rule, Rule) else Rule(**rule))
        if not made:
            raise PlanError("the plan is empty: give it at least one rule")
        super().__init__(rules=tuple(made))


@dataclass(frozen=True)
class Target:
    """One module that gets an adapter."""

    names: tuple[str, ...]
    """All its names in the model. The first one is its name in reports and on disk."""
    module: nn.Module
    base: bases.Base
    rule: int
    """Counted from 1."""
    method: str
    adapter_class: type[methods.Method]
    options: methods.Options
    apart: bool = False
    """Whether it has an adapter of its own although another module has its weight."""

    @property
    def name(self) -> str:
        return self.names[0]
