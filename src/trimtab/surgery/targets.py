"""Finds out which modules of a model get an adapter of which method under a plan. The model is not changed."""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterable

from torch import nn

from trimtab import bases, methods
from trimtab.errors import PlanError, nearest
from trimtab.surgery.adapted import bare, bare_modules
from trimtab.surgery.plan import Plan, Rule, Target

# The names of output heads, looked for among the top-level children of a model that does not say which is its head.
_HEAD_NAMES = {"lm_head", "classifier", "score", "qa_outputs", "head"}


def find_targets(model: nn.Module, plan: Plan) -> list[Target]:
    """The modules of ``model`` that ``plan`` selects, in the model's order.

    Raises PlanError if a rule ends with no module, if it names blocks that do not exist, or if modules that share a
    weight would get different rules.
    """
    modules = _Modules(model, {rule.sits_on for rule in plan.rules})
    _check_ranges(plan, modules)
    decided: dict[int, int] = {}  # id of a module -> number of the last rule that matches it
    matched: dict[int, dict[int, str]] = {}  # number of a rule -> all modules that it matches
    for number, rule in enumerate(plan.rules, 1):
        matched[number] = modules.matched_by(rule)
        decided.update(dict.fromkeys(matched[number], number))
    for key, held in modules.by_id.items():
        # A module that is trained as a whole trains what hangs on it, too.
        if isinstance(held, bases.HeldWeight) and decided.get(id(held.holder), 0) >= decided.get(key, 0) > 0:
            del decided[key]
    _check_rules(plan, decided, matched, modules)

    targets = []
    for key, number in decided.items():
        rule = plan.rules[number - 1]
        handle = modules.handles[rule.sits_on][key]
        names = tuple(modules.names[key])
        targets.append(
            Target(
                names,
                modules.by_id[key],
                handle,
                rule=number,
                method=rule.method,
                adapter_class=rule.method_class.class_for(handle),
                options=_options(rule, number, names, handle),
            )
        )
    _check_ties(targets)
    _check_biases(plan, targets)
    order = {key: place for place, key in enumerate(modules.by_id)}
    return sorted(targets, key=lambda target: order[id(target.module)])


def _options(rule: Rule, number: int, names: tuple[str, ...], base: bases.Base) -> methods.Options:
    """The options for a module that ``rule`` matches: its own, or where ``all-linear`` matches, such as fit the module.

    Raises PlanError for a module that the rule names, and that the rank does not fit.
    """
    if not isinstance(base, bases.WeightBase):
        return rule.options
    if not any(_globs_match(rule, name) for name in names):
        fitted: methods.Options = rule.method_class.fitted(rule.options, base.shape)
        return fitted
    try:
        rule.method_class.require_fit(rule.options, base.shape)
    except PlanError as error:
        raise PlanError(f"{names[0]} (rule {number}): {error}") from None
    return rule.options


def block_number(name: str) -> tuple[str, int] | None:
    """``("model.layers", 3)`` for ``"model.layers.3.self_attn.q_proj"``; the first number in a name is the block's."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:place]), int(part)
    return None


def output_heads(model: nn.Module) -> set[int]:
    """The ids of the modules that ``all-linear`` leaves out."""
    heads: set[int] = set()
    for module in model.modules():  # the model that knows its head may be inside another one
        getter = getattr(module, "get_output_embeddings", None)
        try:
            head = getter() if getter is not None else None
        except (NotImplementedError, AttributeError):
            head = None
        if isinstance(head, nn.Module):
            heads.update((id(head), id(bare(head))))
    if heads:
        return heads
    tops = [module for name, module in model.named_children() if name in _HEAD_NAMES]
    return {id(inner) for top in tops for inner in top.modules()}


class _Modules:
    """The modules of a model by their ids, since one module may have several names."""

    def __init__(self, model: nn.Module, kinds: Iterable[bases.Kind]) -> None:
        self.by_id: dict[int, nn.Module] = {}
        self.names: dict[int, list[str]] = defaultdict(list)
        self.by_holder: set[int] = set()  # what is selected by the name of the module that holds it, too
        for name, found in bare_modules(model):
            module = bare(found)  # which may have adapters under other names
            if name:
                self.by_id[id(module)] = module
                self.names[id(module)].append(name)
            if isinstance(module, bases.HeldWeight):
                self.by_holder.add(id(module))
            self.by_holder.update(id(bare(part)) for part in bases.parts(module))
        self.heads = output_heads(model)
        # The modules that a method of each kind could sit on.
        self.handles: dict[bases.Kind, dict[int, bases.Base]] = {kind: {} for kind in kinds}
        for kind, handles in self.handles.items():
            for key, module in self.by_id.items():
                if (handle := bases.find(module, kind)) is not None:
                    handles[key] = handle
        # The number of blocks in each list of blocks: {"model.layers": 30}
        self.blocks: dict[str, int] = defaultdict(int)
        for _, name in self.every_name():
            if (place := block_number(name)) is not None:
                self.blocks[place[0]] = max(self.blocks[place[0]], place[1] + 1)

    def every_name(self) -> list[tuple[int, str]]:
        """Every name with the id of its module."""
        return [(key, name) for key, names in self.names.items() for name in names]

    def matched_by(self, rule: Rule) -> dict[int, str]:
        """The modules that ``rule`` matches, each with a name that matches; of nested ones, only the outermost."""
        matched: dict[int, str] = {}
        handles = self.handles[rule.sits_on]
        for key in handles:
            for name in self.names[key]:
                if self.is_named_by(rule, key, name) and _selects(rule, *self._block(name)):
                    matched[key] = name
                    break
        # A module that is trained by its own tensors leaves those inside it to themselves.
        whole = [key for key in matched if handles[key].kind != "module"]
        nested = {id(inner) for key in whole for inner in list(self.by_id[key].modules())[1:]}
        return {key: name for key, name in matched.items() if key not in nested}

    def is_named_by(self, rule: Rule, key: int, name: str) -> bool:
        """Whether ``rule`` matches this module in any layer; its method must be able to sit on the module."""
        if self._is_fallback(rule, key):
            return _globs_name(rule, name)
        holder = name.rpartition(".")[0] if key in self.by_holder else ""
        if _globs_match(rule, name) or (holder and _globs_match(rule, holder)):
            return True
        handle = self.handles[rule.sits_on].get(key)
        is_linear = isinstance(handle, bases.WeightBase) and handle.is_linear and id(handle.owner) not in self.heads
        return rule.all_linear and is_linear and key not in self.heads

    def _is_fallback(self, rule: Rule, key: int) -> bool:
        handle = self.handles[rule.sits_on].get(key)
        return handle is not None and handle.is_fallback

    def matched_in_any_layer(self, rule: Rule) -> list[tuple[int, str]]:
        """What ``rule`` names, whether or not its method can sit on that."""
        possible = self.handles[rule.sits_on]
        return [
            (key, name)
            for key, name in self.every_name()
            if (key in possible and self.is_named_by(rule, key, name))
            or (_globs_match(rule, name) and not self._is_fallback(rule, key))
        ]

    def _block(self, name: str) -> tuple[int | None, int]:
        """The number of the block in which a module is, and how many such blocks there are; None and 0 outside."""
        place = block_number(name)
        return (place[1], self.blocks[place[0]]) if place else (None, 0)


def _globs_match(rule: Rule, name: str) -> bool:
    """Whether a glob of ``rule`` matches ``name``, or, for a method that takes a module with all that is inside it, the
    name of a module around it. ``all-linear`` is no glob, and `_Modules.is_named_by` handles it."""
    names = [name]
    if rule.sits_on == "module":
        names += [name[:place] for place, letter in enumerate(name) if letter == "."]
    return any(fnmatch.fnmatchcase(one, glob) for one in names for glob in rule.match)


def _globs_name(rule: Rule, name: str) -> bool:
    """Whether a glob of ``rule`` matches ``name`` and says something of its last part."""
    return any(fnmatch.fnmatchcase(name, glob) and glob.rpartition(".")[2].strip("*?") for glob in rule.match)


def _selects(rule: Rule, block: int | None, count: int) -> bool:
    """Whether ``rule.layers`` selects block number ``block`` of ``count``; None is a module outside of all blocks."""
    if rule.layers == "all":
        return True
    if block is None:
        return False
    if ":" in rule.layers:
        word, number = rule.layers.split(":")
        outer = block < int(number) or block >= count - int(number)
        return outer if word == "outer" else not outer
    return any(first <= block <= last for first, last in _ranges(rule))


def _ranges(rule: Rule) -> list[tuple[int, int]]:
    """The ranges of block numbers in ``rule.layers``, with both ends; none for ``all``, ``outer`` and ``inner``."""
    if not rule.layers[0].isdigit():
        return []
    ends = (part.split("-") for part in rule.layers.split(","))
    return [(int(pair[0]), int(pair[-1])) for pair in ends]


def _check_ranges(plan: Plan, modules: _Modules) -> None:
    most = max(modules.blocks.values(), default=0)
    for number, rule in enumerate(plan.rules, 1):
        last = max((end for _, end in _ranges(rule)), default=-1)
        if last >= most:
            there = f"has blocks 0 to {most - 1}" if most else "has no numbered blocks"
            raise PlanError(f"rule {number} (layers='{rule.layers}') names block {last}, and the model {there}")


def _check_rules(plan: Plan, decided: dict[int, int], matched: dict[int, dict[int, str]], modules: _Modules) -> None:
    """Raise PlanError for the first rule that is left with no module, and say why."""
    used = set(decided.values())
    for number, rule in enumerate(plan.rules, 1):
        if number not in used:
            globs = ", ".join(repr(glob) for glob in rule.match)
            why = _why_overruled(matched[number], decided) or _why_none(rule, modules)
            raise PlanError(f"rule {number} (match={globs}, layers='{rule.layers}') ends with no module: {why}")


def _why_overruled(matched: dict[int, str], decided: dict[int, int]) -> str:
    """The message about a rule whose modules are all decided by later rules; empty if it matches none."""
    if not matched:
        return ""
    key, name = next(iter(matched.items()))
    return (
        f"all {len(matched)} that it matches, such as {name}, are decided by a later rule (rule {decided[key]}). "
        "Remove it, or move it to the end"
    )


def _why_none(rule: Rule, modules: _Modules) -> str:
    """The message about a rule that matches no module in the layers that it selects."""
    possible = modules.handles[rule.sits_on]
    named = modules.matched_in_any_layer(rule)
    if any(key in possible for key, _ in named):
        return "its names match, but in no block that 'layers' selects"
    kinds = ", ".join(bases.names("weight"))
    if rule.sits_on == "block":
        what, none = "that are no blocks", "no blocks"
        known = f". Method {rule.method} sits on blocks, such as '*.mlp' or '*.self_attn', and not on linear layers"
    else:
        what, none = "of kinds that no base knows", f"no layer of a kind that a base knows ({kinds})"
        known = f". Known kinds: {kinds}" if named else ""
        if rule.sits_on == "module":
            what, none, known = "that hold no ordinary tensors of their own and can be called", "no module to train", ""
    if named:
        others = ", ".join(sorted({bases.named(modules.by_id[key]) for key, _ in named}))
        read = [f"{name}.{one.attribute}" for key, name in named for one in bases.held_weights(modules.by_id[key])]
        hint = (
            f". What such a module reads itself can be named: {read[0]!r}" if read and rule.sits_on == "weight" else ""
        )
        return f"it names {len(named)} {what} ({others}; such as {named[0][1]}){hint}{known}"
    if parameter := _parameter_named_by(rule, modules):
        return parameter
    candidates = [name for key, name in modules.every_name() if key in possible]
    near = _near_misses(rule, candidates) if candidates else f" The model has {none}"
    return f"nothing has such a name.{near}{known}"


def _parameter_named_by(rule: Rule, modules: _Modules) -> str:
    """The message about a rule that names a parameter of a module which keeps it to itself; empty if it names none."""
    for key, name in modules.every_name():
        module = modules.by_id[key]
        for parameter in module._parameters:
            if not any(fnmatch.fnmatchcase(f"{name}.{parameter}", glob) for glob in rule.match):
                continue
            if key in modules.handles[rule.sits_on]:
                alone = f", tensors=[{parameter!r}]" if rule.sits_on == "module" else ""
                return f"{name}.{parameter} is a parameter, and rules name modules: Rule(match={name!r}{alone}, ...)"
            return (
                f"{name}.{parameter} is a parameter, and how {bases.named(module)} reads it is not known. The module's "
                f"tensors can be trained themselves: Rule(match={name!r}, method='full')"
            )
    return ""


def _near_misses(rule: Rule, candidates: list[str]) -> str:
    """A sentence with names or globs that would match."""
    shapes = sorted({re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name) for name in candidates})
    tails = sorted({name.rsplit(".", 1)[-1] for name in candidates})
    nested = any("." in name for name in candidates)
    near: list[str] = []
    for glob in rule.match:
        tail = glob.rsplit(".", 1)[-1].strip("*")
        if tail:
            near += [f"*.{close}" if nested else close for close in nearest(tail, tails)]
        near += nearest(glob, shapes)
    if near:
        return f" Near misses: {', '.join(dict.fromkeys(near))}"
    return f" Names that could be matched: {', '.join(shapes[:8])}{', ...' if len(shapes) > 8 else ''}"


def _turned(one: bases.Base, other: bases.Base) -> bool:
    """Whether two layers with one weight multiply with it in two directions, as a look-up and a tied head do."""
    if isinstance(one, bases.WeightBase) and isinstance(other, bases.WeightBase):
        return one.stored_transposed != other.stored_transposed
    return False


def _check_biases(plan: Plan, targets: list[Target]) -> None:
    """Raise PlanError for a rule that asks for biases to be trained where no layer of its has one."""
    for number, rule in enumerate(plan.rules, 1):
        mine = [target.base for target in targets if target.rule == number]
        layers = [base for base in mine if isinstance(base, bases.WeightBase)]
        asked = getattr(rule.options, "bias", False) and not rule.method_class.trains_base
        asked = asked and not getattr(rule.options, "added_bias", False)
        if asked and all(base.stored_bias is None for base in layers):
            raise PlanError(
                f"rule {number} (match={', '.join(map(repr, rule.match))}) asks for biases to be trained (bias: true), "
                f"and none of its {len(layers)} layers has one. Leave 'bias' out"
            )


def _check_ties(targets: list[Target]) -> None:
    """Raise PlanError unless modules that share one weight have the same rule."""
    first: dict[int, Target] = {}
    for target in targets:
        for other in (first.setdefault(id(one), target) for one in target.base.shared):
            both = f"{other.name} and {target.name} share one weight, and"
            if other.rule != target.rule:
                raise PlanError(
                    f"{both} the plan gives them different rules ({other.rule} and {target.rule}). "
                    "Let one rule match both"
                )
            layers = other.base.kind == target.base.kind == "weight"
            if layers and _turned(other.base, target.base) and target.adapter_class.trains_base:
                raise PlanError(
                    f"{both} multiply with it in two directions, [out, in] = {list(other.base.shape)} and "
                    f"{list(target.base.shape)}: magnitudes of method {target.method} are one of them. Let the rule "
                    "match one of the two (a merge gives it a weight of its own), or leave the magnitude out"
                )
