"""Gives PEFT's models our kernels: its LoRA and DoRA layers compute with them, and are PEFT's in everything else."""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass

from torch import nn

from trimtab.errors import SurgeryError, TrimtabWarning
from trimtab.surgery.adapted import Adapted
from trimtab.surgery.wrappers import unwrapped

_NAMED = 3  # so many layers are named for each reason


@dataclass(frozen=True)
class SpeedUpReport:
    """Which layers take our kernels.

    Attributes:
        layers: the names of those that do.
        left: what goes on through PEFT's own forward pass, and why: the name of a layer, or of a layer and of one of
            its adapters (``layers.0.q_proj (adapter other)``), or of these while they train -> the reason.
    """

    layers: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        return " ".join([f"{len(self.layers)} LoRA layers of PEFT take trimtab's kernels.", *self.reasons()])

    def reasons(self) -> list[str]:
        """One sentence for each reason in ``left``, with the first layers that it holds for."""
        by_reason: dict[str, list[str]] = defaultdict(list)
        for name, reason in self.left.items():
            by_reason[reason].append(name)
        sentences = []
        for reason, names in by_reason.items():
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            sentences.append(f"As PEFT computes them stay {', '.join(names[:_NAMED])}{more}: {reason}.")
        return sentences


def speed_up(peft_model: nn.Module) -> SpeedUpReport:
    """Let the LoRA and DoRA layers of ``peft_model`` compute with our kernels, in place.

    Its outputs and gradients are the same to rounding (of the base's dtype), with PEFT's own dropout. Everything else
    is PEFT's as before: the names and files, ``merge_and_unload``, several adapters, ``disable_adapter``, mixed
    batches, and what trains it. Call it again when an adapter was added that reaches more layers.

    Args:
        peft_model: a ``PeftModel`` with LoRA adapters, or any model with PEFT's LoRA layers in it, which may be
            wrapped (compiled, DDP).

    Returns:
        Which layers do, and for each other one why it stays as PEFT computes it; a warning says so, too.

    Raises:
        SurgeryError: none of them does.
    """
    if not isinstance(peft_model, nn.Module):
        raise SurgeryError(f"speed_up: expected a model with LoRA layers of PEFT, got {type(peft_model).__name__}")
    try:
        from peft.tuners.lora import LoraLayer
    except ImportError:
        raise SurgeryError("speed_up: needs PEFT, which is not installed: pip install peft") from None
    from trimtab.integrations import peft_layers

    model = unwrapped(peft_model)
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not found:
        raise SurgeryError(f"speed_up: the model has no LoRA layers of PEFT. {_instead(model)}")
    taken, left = [], {}
    for name, layer in found.items():
        if reason := peft_layers.why_not(layer) or peft_layers.turn(layer):
            left[name] = reason
            continue
        others = {one: peft_layers.why_not_adapter(layer, one) for one in peft_layers.adapter_names(layer)}
        left |= {f"{name} (adapter {one})": reason for one, reason in others.items() if reason}
        if all(others.values()) and others:
            continue
        taken.append(name)
        training = {one: peft_layers.why_not_in_training(layer, one) for one in others if not others[one]}
        left |= {f"{name} (adapter {one}, in training)": reason for one, reason in training.items() if reason}
    report = SpeedUpReport(tuple(taken), left)
    if not taken:
        raise SurgeryError(f"speed_up: none of {len(found)} LoRA layers takes it. {' '.join(report.reasons())}")
    if left:
        warnings.warn(f"speed_up: {report}", TrimtabWarning, stacklevel=2)
    return report


def _instead(model: nn.Module) -> str:
    if any(isinstance(module, Adapted) for module in model.modules()):
        return "The adapters that it has are trimtab's own, and as fast as they get"
    found = [getattr(config, "peft_type", "") for config in getattr(model, "peft_config", {}).values()]
    if kinds := [str(getattr(kind, "value", kind)) for kind in found]:
        return f"Its adapters are of another kind: {', '.join(kinds)}"
    return "Give the model that peft.get_peft_model or PeftModel.from_pretrained returned"
