"""Attaches the adapters of a plan to a model, detaches them, and says what is trained and what a weight has become."""

from __future__ import annotations

import re
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trimtab import bases, methods
from trimtab.errors import PlanError, SurgeryError, TrimtabWarning, nearest
from trimtab.surgery.adapted import Adapted, AdaptedBlock, adapted_modules, bare, bare_modules, require_adapted
from trimtab.surgery.attach_report import AttachReport, describe
from trimtab.surgery.carrier import DEFAULT, is_of_peft
from trimtab.surgery.install import install, remove_adapters
from trimtab.surgery.names import require_new_name
from trimtab.surgery.plan import Plan, Rule, Target
from trimtab.surgery.sharded import put_away, require_open, require_same_mesh, whole_tensors
from trimtab.surgery.targets import find_targets
from trimtab.surgery.weight_of_own import usable
from trimtab.surgery.wrappers import unwrapped, without_wrappers


def attach(model: nn.Module, plan: Plan | Rule | list[Rule], name: str = DEFAULT) -> AttachReport:
    """Attach the adapter of ``plan`` to ``model`` in place, under ``name``, and freeze everything else.

    What the bare model gives does not change until the adapter is trained. Adapters under other names stay beside it,
    whatever modules and methods they have; the new one is the active one (``trimtab.set_adapter``). A module with
    several names gets one adapter, and so do modules that share one weight. Where ``all-linear`` meets a layer that the
    rank does not fit (a gate with one output), the layer takes the largest rank that does, at the same scale. The
    report says so, and what no rule reached. If anything is wrong, the model is left unchanged.

    A model may be sharded by FSDP2 (``fully_shard``) afterwards, or before: then all processes attach the same plan,
    each weight is gathered for a moment, and the adapter is whole in all of them and kept alike.

    Raises:
        PlanError: a rule ends with no module, or its options do not suit a module that it matches.
        SurgeryError: the model has an adapter of that name already, or is itself a layer, which cannot be replaced in
            place; or tensors of its own are trained beside its adapters, which all of them would share.
    """
    if isinstance(plan, Rule):
        plan = Plan([plan])
    elif isinstance(plan, list):
        plan = Plan(plan)
    if not isinstance(plan, Plan):
        raise PlanError(f"attach: expected a Plan, a Rule or a list of rules, got {type(plan).__name__}")
    if not isinstance(model, nn.Module):
        raise SurgeryError(f"attach: expected a torch.nn.Module, got {type(model).__name__}")
    require_open(model, "attach", "Attach", SurgeryError)
    model = unwrapped(model)
    require_same_mesh(model, "attach")
    put_away(model)
    require_new_name(model, name, "attach")
    if bases.find(model) is not None:
        raise SurgeryError(
            f"attach: the model is a bare {type(model).__name__}, which cannot be replaced inside itself; wrap it, "
            "for instance torch.nn.Sequential(layer)"
        )
    targets = find_targets(model, plan)
    _require_none_of_peft(model, targets)
    install(model, targets, name)
    if drawn := _drawn_and_frozen(model):
        warnings.warn(
            f"attach: the files of this {type(model).__name__} had no weights for {' and '.join(drawn)}, which no rule "
            "trains whole: what was drawn for them stays, and no adapter holds it. Let the last rule train them, "
            f'Rule(match={drawn}, method="full"), or unfreeze them',
            TrimtabWarning,
            stacklevel=2,
        )
    return describe(model, plan.rules, name)


def _require_none_of_peft(model: nn.Module, targets: list[Target]) -> None:
    """Raise SurgeryError if a target lies inside a layer of PEFT's: its base, or the factors of its adapter."""
    names = {id(target.module): target.name for target in targets}
    for module in model.modules():
        if is_of_peft(module):
            for inside in module.modules():
                if id(inside) in names:
                    raise SurgeryError(
                        f"attach: {names[id(inside)]} is a part of one of PEFT's layers ({type(module).__name__}), "
                        "which has an adapter already. Attach to the bare model (peft_model.unload()), or to one with "
                        "that adapter in it (peft_model.merge_and_unload()); trimtab.load_adapter reads PEFT's "
                        "folders, and trimtab.speed_up keeps PEFT's layers"
                    )


def _drawn_and_frozen(model: Any) -> list[str]:
    """The layers of a classifier of transformers that were drawn, since its files lack them, and are not trained whole:
    those of its head, and a pooler below it."""
    if not re.search(r"For\w*(Classification|QuestionAnswering|MultipleChoice)$", type(model).__name__):
        return []
    base = getattr(model, model.base_model_prefix, None)
    below = {id(module) for module in base.modules()} if isinstance(base, nn.Module) else set()
    trained = {name for name, module in adapted_modules(model) if module.current_adapter.trains_base}
    layers = {name: unwrapped(bare(module)) for name, module in bare_modules(model)}
    drawn = {
        name: not any(getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters(recurse=False))
        for name, module in layers.items()
        if any(True for _ in module.parameters(recurse=False))
    }
    if all(drawn.values()):  # made of a configuration, and not of files
        return []
    mine = {name for name, module in layers.items() if id(module) not in below or "pooler" in name.split(".")}
    return [name for name, none in drawn.items() if none and name in mine and name not in trained]


def detach(model: nn.Module) -> int:
    """Remove every adapter, of all names, from ``model`` in place, and return how many modules had one.

    The model is then bit for bit what it was before, and the same parameters are trainable. Raises SurgeryError if the
    model has no adapters.
    """
    model = unwrapped(model)
    count = len({id(module) for _, module in require_adapted(model, "detach")})
    remove_adapters(model)
    return count


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """``name -> parameter`` for everything that is trained. A shared parameter is listed once, by its first name;
    names are those inside of what torch wraps around a model (for compilation, sharding, several devices)."""
    model = unwrapped(model)
    return {
        without_wrappers(model, name): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


class TrainedTensor(NamedTuple):
    """A tensor that is trained, and at which rate: that of its ``group``, times its ``unit``."""

    parameter: nn.Parameter
    group: methods.RateGroup
    unit: float


def trained_tensors(model: nn.Module) -> dict[str, TrainedTensor]:
    """``name -> tensor`` for everything in ``trainable_parameters``; each method says the groups of its own."""
    known = {
        id(parameter): (adapter.rate_groups.get(key, "weight"), adapter.unit)
        for _, module in adapted_modules(model)
        for adapter in module.every_adapter()
        for key, parameter in adapter.named_parameters()
    }
    return {
        name: TrainedTensor(parameter, *known.get(id(parameter), ("weight" if parameter.dim() > 1 else "bias", 1.0)))
        for name, parameter in trainable_parameters(model).items()
    }


def effective_weight(model: nn.Module, name: str) -> Tensor:
    """The weight ``[out, in]`` that the module ``name`` computes with: ``m * (W + dV) / ||W + dV||`` or ``W + dV``.

    It is computed by the plain formula in float32 (float64 on a float64 base). Without an adapter it is the module's
    own weight. Raises SurgeryError if there is no such module, if it is a block, or if no base knows its kind.
    """
    put_away(model)
    modules = dict(bare_modules(model))
    module = modules.get(name)
    if isinstance(module, Adapted) and module.off:
        module = module.base
    if isinstance(module, AdaptedBlock):
        raise SurgeryError(
            f"effective_weight: '{name}' is a block with an adapter of method {module.method}, which changes a hidden "
            "state and no weight. Name a layer inside it"
        )
    if isinstance(module, Adapted):
        with whole_tensors(module.current_adapter), usable([module]):
            effective: Tensor = module.current_adapter.effective_weight(module.handle)
        return effective
    handle = bases.find(module) if module is not None else None
    if handle is None:
        known = [other for other, inner in modules.items() if isinstance(inner, Adapted)] or [
            other for other, inner in modules.items() if bases.find(inner) is not None
        ]
        near = [other for other in known if other.endswith(name)] or nearest(name, known)
        what = f"is a {bases.named(module)}, which no base knows" if module is not None else "is not in the model"
        hint = f" Did you mean {', '.join(repr(other) for other in near[:3])}?" if near else ""
        raise SurgeryError(f"effective_weight: '{name}' {what}.{hint}")
    weight = handle.weight().detach()
    return weight.clone() if weight.dtype in (torch.float32, torch.float64) else weight.float()
