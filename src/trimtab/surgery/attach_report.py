"""What a plan did to a model: the adapted modules, and how many numbers are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trimtab.surgery.plan import Rule


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
        """The report as plain values: what ``plan.json`` of a run folder holds."""
        return {
            "total_parameters": self.total_parameters,
            "trainable_parameters": self.trainable_parameters,
            "zero_rows": self.zero_rows,
            "rules": [self._rule(number, rule) for number, rule in enumerate(self.rules, 1)],
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

    def _rule(self, number: int, rule: Rule) -> dict[str, Any]:
        mine = [module for module in self.modules if module.rule == number]
        return {
            "rule": number,
            "method": rule.method,
            "match": ", ".join(rule.match),
            "layers": rule.layers,
            "options": rule.options.said(),
            "modules": len(mine),
            "parameters": sum(module.parameters for module in mine),
        }
