"""What a plan did to a model: the adapted modules, how many numbers are trained, and what no rule reached."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from trimtab import bases
from trimtab.surgery.adapted import Adapted, bare, bare_modules, carriers
from trimtab.surgery.carrier import DEFAULT
from trimtab.surgery.names import entries_by_every_name
from trimtab.surgery.plan import Rule
from trimtab.surgery.targets import output_heads

OUTPUT_HEAD = "output head"


def usually_frozen(kind: str) -> bool:
    """Whether most plans leave this ``kind`` of ``AttachReport.unreached`` as it is: embeddings, models' own scaled
    ones too, and the output head."""
    return kind == OUTPUT_HEAD or kind.endswith("Embedding")


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
    lowered_rank: int | None = None
    """The rank that the module took in place of its rule's, which is larger than the matrix."""


@dataclass(frozen=True)
class AttachReport:
    """What was attached.

    Attributes:
        modules: one entry for each adapted module.
        rules: those of the plan.
        trainable_parameters: how many numbers are trained; shared ones count once.
        total_parameters: how many numbers the bare model has; shared ones count once.
        zero_rows: module name -> how many of its magnitudes belong to rows of zeros, and stay untrained.
        lowered_ranks: module name -> the rank it took, where ``all-linear`` met a matrix that its rank does not fit.
        unreached: kind of module -> how many numbers it has in matrices (of two axes or more) that no rule reached and
            that are not trained. A kind is the name of a class, or ``output head``; the largest comes first.
        frozen_ties: module without an adapter -> the adapted module with which it shares its weight, and whose adapter
            it does not see: an output head that is tied to an embedding, where the plan names the embedding alone.
    """

    modules: tuple[ModuleReport, ...]
    rules: tuple[Rule, ...]
    trainable_parameters: int
    total_parameters: int
    unreached: dict[str, int] = field(default_factory=dict)
    frozen_ties: dict[str, str] = field(default_factory=dict)

    @property
    def lowered_ranks(self) -> dict[str, int]:
        return {module.name: module.lowered_rank for module in self.modules if module.lowered_rank is not None}

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
        """The report as plain values: what ``plan.json`` of a run's folder holds, and what is said of the plan."""
        return {
            "total_parameters": self.total_parameters,
            "trainable_parameters": self.trainable_parameters,
            "zero_rows": self.zero_rows,
            "lowered_ranks": self.lowered_ranks,
            "unreached": self.unreached,
            "frozen_ties": self.frozen_ties,
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


def describe(model: nn.Module, rules: tuple[Rule, ...], called: str = DEFAULT) -> AttachReport:
    """The report of a model with the adapter ``called`` so; ``rules`` are those of its plan, if they are known."""
    entries = entries_by_every_name(model, called)
    names: dict[int, list[str]] = defaultdict(list)
    for name, entry in entries.items():
        names[id(entry)].append(name)
    reports = []
    counted: set[int] = set()
    for entry in {id(entry): entry for entry in entries.values()}.values():
        adapter, (name, *aliases) = entry.adapter, names[id(entry)]
        # Modules that share a weight share an adapter, or a trained tensor in it, whose numbers count once.
        fresh = [one for one in adapter.parameters() if id(one) not in counted]
        counted.update(map(id, fresh))
        rank = getattr(adapter.options, "rank", None)
        asked = getattr(rules[entry.rule - 1].options, "rank", None) if rules else rank
        reports.append(
            ModuleReport(
                name=name,
                method=entry.method,
                rule=entry.rule,
                out_features=adapter.out_features,
                in_features=adapter.in_features,
                parameters=sum(parameter.numel() for parameter in fresh),
                zero_rows=adapter.zero_rows if fresh else 0,
                aliases=tuple(aliases),
                lowered_rank=None if rank == asked else rank,
            )
        )
    trainable = sum(report.parameters for report in reports)
    # A quantised weight packs several numbers into one element, so its base knows how many there are.
    handles = [base for module in model.modules() if (base := bases.find(module)) is not None]
    shapes = {id(base.parameter): base.shape for base in handles if not base.stored_dense}
    sizes = {id(parameter): tuple(shapes.get(id(parameter), parameter.shape)) for parameter in model.parameters()}
    carried = {id(one) for module in carriers(model) for every in module.every_adapter() for one in every.parameters()}
    numbers = sum(math.prod(size) for key, size in sizes.items() if key not in carried)
    return AttachReport(
        tuple(reports),
        rules,
        trainable,
        numbers,
        unreached=_unreached(model, sizes, entries.values()),
        frozen_ties=_frozen_ties(model, entries),
    )


def _frozen_ties(model: nn.Module, entries: dict[str, Adapted]) -> dict[str, str]:
    """`AttachReport.frozen_ties`; ``entries``: the modules with an adapter, by every name."""
    sharing = {id(one): name for name, entry in reversed(entries.items()) for one in entry.handle.shared}
    with_adapter = {id(entry.handle.owner) for entry in entries.values()}
    with_adapter |= {id(inner) for entry in entries.values() for inner in entry.base.modules()}
    return {
        name: sharing[id(parameter)]
        for name, module in bare_modules(model)
        if id(own := bare(module)) not in with_adapter
        for parameter in own._parameters.values()
        if id(parameter) in sharing
    }


def _unreached(model: nn.Module, sizes: dict[int, tuple[int, ...]], entries: Iterable[Adapted]) -> dict[str, int]:
    """`AttachReport.unreached`, a shared matrix once; ``sizes``: id of a parameter -> the shape of what it holds;
    ``entries``: the modules with an adapter."""
    seen = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    for entry in entries:
        handle = entry.handle
        reached = [handle.parameter] if isinstance(handle, bases.WeightBase) else entry.base.parameters()
        seen.update(map(id, reached))
    heads = output_heads(model)
    parts: dict[int, str] = {}  # the output projection of an attention is counted as the attention's
    found: dict[str, int] = defaultdict(int)
    for _, module in bare_modules(model):
        own, within = bare(module), bases.parts(bare(module))
        left = {id(one): one for one in own._parameters.values() if one is not None and id(one) not in seen}
        left = {key: one for key, one in left.items() if _is_matrix(sizes[key])}
        if not left and not within:
            continue
        kind = OUTPUT_HEAD if id(module) in heads else parts.get(id(module)) or bases.named(own)
        parts |= {id(part): kind for part in within}
        for key in left:
            seen.add(key)
            found[kind] += math.prod(sizes[key])
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def _is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether a tensor of ``shape`` is one or more matrices; one that stands for a token or a key, ``[1, 1, n]``, is
    not."""
    return len(shape) == 2 or (len(shape) > 2 and math.prod(shape[:-1]) > 1)
