"""Attaches a plan's adapters to a model, removes them, and inspects what they do."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab import bases, methods
from trimtab.errors import PlanError, SurgeryError, nearest
from trimtab.surgery.adapted import Adapted, AdaptedBlock, AdaptedLayer, adapted_modules, bare_modules, owners
from trimtab.surgery.plan import Plan, Rule
from trimtab.surgery.targets import Target, find_targets

# The attribute of a model with the names of the parameters that were trainable before, which detach restores.
_TRAINABLE_BEFORE = "_trimtab_trainable_before"


@dataclass(frozen=True)
class ModuleReport:
    """One adapted module."""

    name: str
    method: str
    rule: int
    out_features: int
    in_features: int
    parameters: int
    zero_rows: int
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class AttachReport:
    """What was attached.

    Attributes:
        modules: one entry for each adapted module.
        rules: those of the plan.
        trainable_parameters: how many numbers are trained; shared ones count once.
        total_parameters: how many numbers the bare model has; shared ones count once.
        zero_rows: module name -> how many of its magnitudes belong to rows of zeros, and stay untrained.
    """

    modules: tuple[ModuleReport, ...]
    rules: tuple[Rule, ...]
    trainable_parameters: int
    total_parameters: int

    @property
    def zero_rows(self) -> dict[str, int]:
        return {module.name: module.zero_rows for module in self.modules if module.zero_rows}

    @property
    def counts(self) -> dict[str, int]:
        return {
            "modules": len(self.modules),
            "trainable": self.trainable_parameters,
            "total": self.total_parameters,
            "zero_rows": sum(self.zero_rows.values()),
        }

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, as in ``plan.json`` of a run folder."""
        rules = []
        for number, rule in enumerate(self.rules, 1):
            mine = [module for module in self.modules if module.rule == number]
            rules.append(
                {
                    "rule": number,
                    "method": rule.method,
                    "match": ", ".join(rule.match),
                    "layers": rule.layers,
                    "options": rule.options.said(),
                    "modules": len(mine),
                    "parameters": sum(module.parameters for module in mine),
                }
            )
        return {
            "total_parameters": self.total_parameters,
            "trainable_parameters": self.trainable_parameters,
            "zero_rows": self.zero_rows,
            "rules": rules,
            "modules": [
                {
                    "module": module.name,
                    "method": module.method,
                    "rule": module.rule,
                    "out": module.out_features,
                    "in": module.in_features,
                    "parameters": module.parameters,
                }
                for module in self.modules
            ],
        }


def attach(model: nn.Module, plan: Plan | Rule | list[Rule]) -> AttachReport:
    """Attach the adapters of ``plan`` to ``model`` in place, and freeze everything else.

    The outputs of the model do not change until it is trained. A module with several names gets one adapter, and so do
    modules that share one weight. If anything is wrong, the model is left unchanged.

    Raises:
        PlanError: a rule ends with no module, or its options do not suit a module that it matches.
        SurgeryError: the model has adapters already, or is itself a layer, which cannot be replaced in place.
    """
    if isinstance(plan, Rule):
        plan = Plan([plan])
    elif isinstance(plan, list):
        plan = Plan(plan)
    if not isinstance(plan, Plan):
        raise PlanError(f"attach: expected a Plan, a Rule or a list of rules, got {type(plan).__name__}")
    if not isinstance(model, nn.Module):
        raise SurgeryError(f"attach: expected a torch.nn.Module, got {type(model).__name__}")
    if names := [name for name, _ in adapted_modules(model)]:
        raise SurgeryError(
            f"attach: the model already has adapters on {len(names)} modules, such as "
            f"{names[0] or 'the model itself'}; call trimtab.merge(model) or trimtab.detach(model) first"
        )
    if bases.find(model) is not None:
        raise SurgeryError(
            f"attach: the model is a bare {type(model).__name__}, which cannot be replaced inside itself; wrap it, "
            "for instance torch.nn.Sequential(layer)"
        )
    targets = find_targets(model, plan)
    return install(model, targets, plan.rules)


def install(model: nn.Module, targets: list[Target], rules: tuple[Rule, ...]) -> AttachReport:
    """Put an adapter onto every target. The model is not changed before all adapters are built."""
    adapters: dict[int, methods.Method] = {}
    for target in targets:
        key = id(target.base.identity)
        if key not in adapters:
            try:
                adapters[key] = methods.method_class(target.method)(target.base, target.options)
            except PlanError as error:
                raise PlanError(f"{target.name} (rule {target.rule}): {error}") from None

    # A shared parameter is noted under all its names: if a merge unties it, both are trainable where the one was.
    every = model.named_parameters(remove_duplicate=False)
    setattr(model, _TRAINABLE_BEFORE, tuple(name for name, parameter in every if parameter.requires_grad))
    model.requires_grad_(False)
    replacement = {
        id(target.module): Adapted.around(target.base, adapters[id(target.base.identity)], target.method, target.rule)
        for target in targets
    }
    for _, parent, attribute, child in list(owners(model)):
        if id(child) in replacement:
            parent._modules[attribute] = replacement[id(child)]
    return describe(model, rules)


def describe(model: nn.Module, rules: tuple[Rule, ...]) -> AttachReport:
    """The report of a model with adapters; ``rules`` are those of its plan."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, module in bare_modules(model):
        if isinstance(module, Adapted):
            names[id(module)].append(name)
    reports = []
    counted: set[int] = set()
    for name, module in adapted_modules(model):
        adapter = module.adapter
        fresh = id(adapter) not in counted  # modules that share a weight share an adapter, whose numbers count once
        counted.add(id(adapter))
        reports.append(
            ModuleReport(
                name=name,
                method=module.method,
                rule=module.rule,
                out_features=adapter.out_features,
                in_features=adapter.in_features,
                parameters=sum(parameter.numel() for parameter in adapter.parameters()) if fresh else 0,
                zero_rows=adapter.zero_rows if fresh else 0,
                aliases=tuple(names[id(module)][1:]),
            )
        )
    trainable = sum(report.parameters for report in reports)
    # A quantised weight packs several numbers into one element, so its base knows how many there are.
    shapes = {id(base.parameter): base.shape for module in model.modules() if (base := bases.find(module)) is not None}
    numbers = sum(math.prod(shapes.get(id(parameter), parameter.shape)) for parameter in model.parameters())
    return AttachReport(tuple(reports), rules, trainable, numbers - trainable)


def detach(model: nn.Module) -> int:
    """Remove every adapter from ``model`` in place, and return how many modules had one.

    The model is then bit for bit what it was before, and the same parameters are trainable. Raises SurgeryError if the
    model has no adapters.
    """
    count = len({id(module) for _, module in require_adapted(model, "detach")})
    remove_adapters(model)
    return count


def remove_adapters(model: nn.Module) -> None:
    """Put every frozen module back in its place, and give the parameters their old ``requires_grad``."""
    for _, parent, attribute, child in list(owners(model)):
        if isinstance(child, Adapted):
            parent._modules[attribute] = child.remove()
    before = set(getattr(model, _TRAINABLE_BEFORE, ()))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(name in before)
    if hasattr(model, _TRAINABLE_BEFORE):
        delattr(model, _TRAINABLE_BEFORE)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """``name -> parameter`` for everything that is trained. A shared parameter is listed once, by its first name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def rate_groups(model: nn.Module) -> dict[str, methods.RateGroup]:
    """``name -> rate group`` for everything in ``trainable_parameters``; each method says those of its tensors."""
    known = {
        id(parameter): module.adapter.rate_groups.get(key, "weight")
        for _, module in adapted_modules(model)
        for key, parameter in module.adapter.named_parameters()
    }
    return {
        name: known.get(id(parameter), "weight" if parameter.dim() > 1 else "bias")
        for name, parameter in trainable_parameters(model).items()
    }


def effective_weight(model: nn.Module, name: str) -> Tensor:
    """The weight ``[out, in]`` that the module ``name`` computes with: ``m * (W + dV) / ||W + dV||`` or ``W + dV``.

    It is computed by the plain formula in float32 (float64 on a float64 base). Without an adapter it is the module's
    own weight. Raises SurgeryError if there is no such module, if it is a block, or if no base knows its kind.
    """
    modules = dict(bare_modules(model))
    module = modules.get(name)
    if isinstance(module, AdaptedBlock):
        raise SurgeryError(
            f"effective_weight: '{name}' is a block with an adapter of method {module.method}, which changes a hidden "
            "state and no weight. Name a layer inside it"
        )
    if isinstance(module, AdaptedLayer):
        return module.adapter.effective_weight(module.handle)
    handle = bases.find(module) if module is not None else None
    if handle is None:
        known = [other for other, inner in modules.items() if isinstance(inner, AdaptedLayer)] or [
            other for other, inner in modules.items() if bases.find(inner) is not None
        ]
        near = [other for other in known if other.endswith(name)] or nearest(name, known)
        what = f"is a {type(module).__name__}, which no base knows" if module is not None else "is not in the model"
        hint = f" Did you mean {', '.join(repr(other) for other in near[:3])}?" if near else ""
        raise SurgeryError(f"effective_weight: '{name}' {what}.{hint}")
    weight = handle.weight().detach()
    return weight.clone() if weight.dtype in (torch.float32, torch.float64) else weight.float()


def require_adapted(model: nn.Module, verb: str) -> list[tuple[str, Adapted]]:
    """Every adapted module of ``model`` with its name.

    Raises SurgeryError if there is none, or if ``model`` itself is one, which cannot be replaced in place.
    """
    if isinstance(model, Adapted):
        raise SurgeryError(f"{verb}: this is one adapted layer; give the model that holds it")
    adapted = list(adapted_modules(model))
    if not adapted:
        raise SurgeryError(
            f"{verb}: the model has no adapters; attach some first (trimtab.attach or trimtab.load_adapter)"
        )
    return adapted
