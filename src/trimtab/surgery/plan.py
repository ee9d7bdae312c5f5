"""Rules and plans: which modules, in which layers, get which method with which options."""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import nn

from trimtab import bases, methods
from trimtab.errors import PlanError, did_you_mean, nearest
from trimtab.surgery.adapted import Adapted

ALL_LINEAR = "all-linear"
# Where a model does not say which module is its output head, a top-level child of one of these names is taken for it.
_HEAD_NAMES = {"lm_head", "classifier", "score", "qa_outputs", "head"}


class Rule(BaseModel):
    """Which modules get which method.

    Args:
        match: a glob over module names such as ``"*.q_proj"`` (``fnmatch``), a list of them, or ``"all-linear"``:
            every linear layer but the output head. Only modules of the kind that the method sits on are looked at;
            of blocks inside one another the outermost is taken.
        layers: blocks by number: ``"all"``, ``"outer:K"`` (the first K and the last K), ``"inner:K"`` (all but
            those), or ranges such as ``"0-3,26-29"``.
        method: name of a method: ``lora``, ``dora``, ``mora``, ``full`` on linear layers, ``serial``, ``parallel`` on
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
                raise ValueError(f"unknown option '{key}' for method {own['method']}.{did_you_mean(key, known)}")
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
        if not re.fullmatch(r"all|(outer|inner):[1-9]\d*|\d+(-\d+)?(,\d+(-\d+)?)*", text):
            raise ValueError(f"expected 'all', 'outer:K', 'inner:K' or ranges such as '0-3,26-29', got '{value}'")
        return text

    @property
    def sits_on(self) -> bases.Kind:
        """The kind of base that the method takes."""
        return methods.method_class(self.method).sits_on

    @property
    def all_linear(self) -> bool:
        """Whether this rule asks for every linear layer but the output head; a block is none."""
        return ALL_LINEAR in self.match and self.sits_on == "weight"

    def matches(self, name: str) -> bool:
        """Whether a glob of this rule matches ``name`` (``all-linear`` is not a glob and is handled by the plan)."""
        return any(fnmatch.fnmatchcase(name, glob) for glob in self.match)

    def selects(self, block: int | None, count: int) -> bool:
        """Whether ``layers`` takes block number ``block`` of ``count``; a module outside any block is taken by
        ``all`` only."""
        if self.layers == "all":
            return True
        if block is None:
            return False
        if ":" in self.layers:
            word, number = self.layers.split(":")
            outer = block < int(number) or block >= count - int(number)
            return outer if word == "outer" else not outer
        return any(first <= block <= last for first, last in self.ranges())

    def ranges(self) -> list[tuple[int, int]]:
        """The ranges of block numbers that ``layers`` lists, ends included; empty for the selectors in words."""
        if not self.layers[0].isdigit():
            return []
        ends = (part.split("-") for part in self.layers.split(","))
        return [(int(pair[0]), int(pair[-1])) for pair in ends]

    def describe(self) -> dict[str, Any]:
        """The rule as a mapping that gives it back: ``Rule(**rule.describe())``."""
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

    names: tuple[str, ...]  # every name it hangs under, the first one being its name in reports and on disk
    module: nn.Module
    base: bases.Base
    rule: int  # 1-based
    method: str
    options: methods.Options

    @property
    def name(self) -> str:
        return self.names[0]


def block_number(name: str) -> tuple[str, int] | None:
    """``("model.layers", 3)`` for ``"model.layers.3.self_attn.q_proj"``: the first number in the path counts blocks."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:place]), int(part)
    return None


def output_heads(model: nn.Module) -> set[int]:
    """The ids of the modules that ``all-linear`` leaves alone."""
    heads = set()
    for module in model.modules():  # the one that knows may be wrapped
        getter = getattr(module, "get_output_embeddings", None)
        try:
            head = getter() if getter is not None else None
        except (NotImplementedError, AttributeError):
            head = None
        if isinstance(head, nn.Module):
            heads.add(id(head))
    if heads:
        return heads
    tops = [module for name, module in model.named_children() if name in _HEAD_NAMES]
    return {id(inner) for top in tops for inner in top.modules()}


def resolve(model: nn.Module, plan: Plan) -> list[Target]:
    """Which modules of ``model`` get which method under ``plan``, in the model's order; the model is only looked at.

    Raises PlanError for a rule that ends with no module, names blocks that do not exist, or treats tied modules
    differently.
    """
    names: dict[int, list[str]] = defaultdict(list)
    modules: dict[int, nn.Module] = {}
    inside_adapted: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Adapted):
            inside_adapted.update(id(inner) for inner in module.modules())
        if name:
            names[id(module)].append(name)
            modules[id(module)] = module
    counts: dict[str, int] = defaultdict(int)
    for all_names in names.values():
        for name in all_names:
            if (found := block_number(name)) is not None:
                counts[found[0]] = max(counts[found[0]], found[1] + 1)

    handles = {
        kind: {key: bases.find(module, kind) for key, module in modules.items() if key not in inside_adapted}
        for kind in {rule.sits_on for rule in plan.rules}
    }
    heads = output_heads(model)
    _check_ranges(plan, counts)
    decided: dict[int, int] = {}
    touched: dict[int, list[str]] = defaultdict(list)
    for number, rule in enumerate(plan.rules, 1):
        taken: dict[int, str] = {}
        for key, handle in handles[rule.sits_on].items():
            if handle is None:
                continue
            for name in names[key]:
                found = block_number(name)
                block, count = (found[1], counts[found[0]]) if found else (None, 0)
                linear = rule.all_linear and key not in heads
                if (linear or rule.matches(name)) and rule.selects(block, count):
                    taken[key] = name
                    break
        within = {id(inner) for key in taken for inner in list(modules[key].modules())[1:]}
        outermost = {key: name for key, name in taken.items() if key not in within}
        decided.update(dict.fromkeys(outermost, number))
        touched[number] += outermost.values()
    _check_rules(plan, decided, touched, names, modules, handles, heads)

    targets = []
    for key, number in decided.items():
        rule = plan.rules[number - 1]
        handle = handles[rule.sits_on][key]
        assert handle is not None
        targets.append(Target(tuple(names[key]), modules[key], handle, number, rule.method, rule.options))
    _check_ties(targets)
    order = {key: place for place, key in enumerate(names)}
    return sorted(targets, key=lambda target: order[id(target.module)])


def _check_ranges(plan: Plan, counts: dict[str, int]) -> None:
    most = max(counts.values(), default=0)
    for number, rule in enumerate(plan.rules, 1):
        last = max((end for _, end in rule.ranges()), default=-1)
        if last >= most:
            there = f"has blocks 0 to {most - 1}" if most else "has no numbered blocks"
            raise PlanError(f"rule {number} (layers='{rule.layers}') names block {last}, and the model {there}")


def _check_rules(
    plan: Plan,
    decided: dict[int, int],
    touched: dict[int, list[str]],
    names: dict[int, list[str]],
    modules: dict[int, nn.Module],
    handles: Mapping[bases.Kind, Mapping[int, bases.Base | None]],
    heads: set[int],
) -> None:
    """Raise PlanError for the first rule that no module was left to."""
    used = set(decided.values())
    for number, rule in enumerate(plan.rules, 1):
        if number in used:
            continue
        said = f"rule {number} (match={', '.join(repr(glob) for glob in rule.match)}, layers='{rule.layers}')"
        if touched[number]:
            first = touched[number][0]
            key = next(key for key, all_names in names.items() if first in all_names)
            raise PlanError(
                f"{said} ends with no module: all {len(touched[number])} that it matches, such as {first}, are "
                "decided by "
                f"a later rule (rule {decided[key]}). Remove it, or move it to the end"
            )
        known = {key for key, handle in handles[rule.sits_on].items() if handle is not None}
        linear = known - heads if rule.all_linear else set()
        matched = [
            (name, key) for key, all_names in names.items() for name in all_names if key in linear or rule.matches(name)
        ]
        if any(key in known for _, key in matched):
            raise PlanError(f"{said} ends with no module: its names match, but in no block that 'layers' selects")
        candidates = [name for key, all_names in names.items() if key in known for name in all_names]
        raise PlanError(f"{said} ends with no module: {_why_none(rule, matched, candidates, modules)}")


def _why_none(rule: Rule, matched: list[tuple[str, int]], candidates: list[str], modules: dict[int, nn.Module]) -> str:
    """What is said of a rule that matches no module of its kind: ``matched`` are those that it does match, by name and
    id, ``candidates`` the names of those that it could."""
    kinds = ", ".join(bases.names("weight"))
    what, none, known = "of kinds that no base knows", f"no layer of a kind that a base knows ({kinds})", ""
    if rule.sits_on == "block":
        what, none = "that are no blocks", "no blocks"
        known = f". Method {rule.method} sits on blocks, such as '*.mlp' or '*.self_attn', and not on linear layers"
    if matched:
        others = ", ".join(sorted({type(modules[key]).__name__ for _, key in matched}))
        known = known or f". Known kinds: {kinds}"
        return f"it names {len(matched)} {what} ({others}; such as {matched[0][0]}){known}"
    near = _near_misses(rule, candidates) if candidates else f" The model has {none}"
    return f"nothing has such a name.{near}{known}"


def _near_misses(rule: Rule, candidates: list[str]) -> str:
    """A sentence with names or globs that would have matched."""
    shapes = sorted({re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name) for name in candidates})
    tails = sorted({name.rsplit(".", 1)[-1] for name in candidates})
    near: list[str] = []
    for glob in rule.match:
        tail = glob.rsplit(".", 1)[-1].strip("*")
        if tail:
            near += [
                f"*.{found}" if any("." in name for name in candidates) else found for found in nearest(tail, tails)
            ]
        near += nearest(glob, shapes)
    if near:
        return f" Near misses: {', '.join(dict.fromkeys(near))}"
    return f" Names that could be matched: {', '.join(shapes[:8])}{', ...' if len(shapes) > 8 else ''}"


def _check_ties(targets: list[Target]) -> None:
    """Modules that share one weight must get one and the same treatment."""
    first: dict[int, Target] = {}
    for target in targets:
        other = first.setdefault(id(target.base.identity), target)
        if other is not target and (other.rule != target.rule or other.base.shape != target.base.shape):
            raise PlanError(
                f"{other.name} and {target.name} share one weight, and the plan gives them different rules "
                f"({other.rule} and {target.rule}). Let one rule match both"
            )
