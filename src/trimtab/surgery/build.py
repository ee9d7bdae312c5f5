"""Builds the adapters of a plan's targets, and has those share what their modules share."""

from __future__ import annotations

import torch
from torch import nn

from trimtab.bases import WeightBase
from trimtab.errors import PlanError
from trimtab.methods import Method
from trimtab.surgery.plan import Target


def build_adapters(targets: list[Target]) -> list[Method]:
    """The adapter of each target. Modules that share a weight share the adapter; where the base itself is trained, they
    share the copy of each parameter that they share.

    Raises PlanError if a method's options do not suit a module.
    """
    groups: dict[int, list[Target]] = {}
    for target in targets:
        groups.setdefault(_key(target), []).append(target)
    made: dict[int, Method] = {}
    for key, group in groups.items():
        target = _with_the_bias(group)
        try:
            with torch.inference_mode(False):  # tensors of that mode could never be trained
                made[key] = target.adapter_class(target.base, target.options)
        except PlanError as error:
            raise PlanError(f"{target.name} (rule {target.rule}): {error}") from None
    adapters = [made[_key(target)] for target in targets]
    _share_copies(targets, adapters)
    return adapters


def _key(target: Target) -> int:
    copies = target.adapter_class.trains_base and not getattr(target.options, "magnitude", False)
    return id(target.module if target.apart or copies else target.base.identity)


def _with_the_bias(group: list[Target]) -> Target:
    """The one of several modules with one weight whose bias the shared adapter trains: the first that has one."""
    if not getattr(group[0].options, "bias", False) or len(group) == 1:
        return group[0]
    having = [target for target in group if isinstance(target.base, WeightBase) and target.base.stored_bias is not None]
    if len({id(target.base.stored_bias) for target in having}) > 1:  # type: ignore[attr-defined]
        names = " and ".join(target.name for target in having)
        raise PlanError(
            f"{names} share one weight, and so an adapter, and each has a bias of its own. Leave 'bias' out of rule "
            f"{group[0].rule}, or match one of them"
        )
    return having[0] if having else group[0]


def _share_copies(targets: list[Target], adapters: list[Method]) -> None:
    """Let two copies of one parameter be one, where one rule made them."""
    first: dict[tuple[int, int], nn.Parameter] = {}
    for target, adapter in zip(targets, adapters, strict=True):
        if target.adapter_class.trains_base and not target.apart:
            for name, own in adapter.copies(target.base).items():
                copy = first.setdefault((id(own), target.rule), adapter._parameters[name])  # type: ignore[arg-type]
                adapter._parameters[name] = copy
