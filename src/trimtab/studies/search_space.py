"""The plans that a search may propose: a method and a rank for each group of modules, within one budget.

    space = Space(find_groups(model, {...}), {"lora": {}, "mora": {}, "none": {}}, budget=2_442_240, at_least=0.95)
    space.uniform("lora")                                   # one method and one rank for all groups
    space.fill(["mora", "lora", "none", "lora"], [1, 2, 1, 0.5])

A proposal spends whole ranks, so it cannot meet the budget to the number; ``fill`` comes as near from below as the
ranks allow, and gives None where that is less than ``at_least`` of it. What a rank costs is counted on the method's own
tensors (on the meta device, without memory), never by a formula of this file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from trimtab import methods
from trimtab.bases import WeightBase
from trimtab.config.search import NONE
from trimtab.errors import ConfigError, PlanError
from trimtab.methods import Options
from trimtab.surgery.plan import Plan, Rule
from trimtab.surgery.targets import block_number, find_targets

KINDS = {
    "attention": ("*attn.*", "*ttention.[!r]*"),  # without the relative biases of T5
    # Encoders call the two layers of a block's MLP "intermediate" and "output", "ffn", or "DenseReluDense".
    "mlp": ("*.mlp.*", "*.intermediate.*", "*[0-9].output.*", "*.ffn.*", "*.DenseReluDense.*"),
}
"""How the modules of a block are told apart by default."""


@dataclass(frozen=True)
class Group:
    """Modules that get one method and one rank between them. ``weights``: a weight of each shape, and how many there
    are (one that several modules share counts once)."""

    name: str
    match: tuple[str, ...]
    layers: str
    weights: tuple[tuple[WeightBase, int], ...]

    @property
    def modules(self) -> int:
        return sum(count for _, count in self.weights)


@dataclass(frozen=True)
class Part:
    """What one group gets; rank 0 where the method is ``none``."""

    method: str
    rank: int

    def __str__(self) -> str:
        return self.method if self.method == NONE else f"{self.method}{self.rank}"


Proposal = tuple[Part, ...]
"""A part for each group, in the order of the groups."""


def default_groups(model: nn.Module, outer: int | None) -> dict[str, tuple[tuple[str, ...], str]]:
    """Name -> (match, layers): the first and last ``outer`` blocks apart from those between, attention from MLP.

    ``outer``: by default a quarter of the blocks. Raises PlanError where no block is left in between.
    """
    places = (block_number(name) for name, _ in model.named_modules())
    blocks = max((place[1] for place in places if place is not None), default=-1) + 1
    ends = max(1, blocks // 4) if outer is None else outer
    if 2 * ends >= blocks:
        raise PlanError(
            f"outer: {ends} blocks at each end leave none between, the model has {blocks}; lower it, or name the groups"
        )
    names = [name for name, _ in model.named_modules()]
    met = {
        kind: tuple(glob for glob in globs if any(fnmatchcase(name, glob) for name in names)) or globs
        for kind, globs in KINDS.items()
    }
    return {
        f"{place} {kind}": (match, f"{place}:{ends}") for place in ("outer", "inner") for kind, match in met.items()
    }


def find_groups(model: nn.Module, said: Mapping[str, tuple[Sequence[str], str]]) -> tuple[Group, ...]:
    """The groups ``name -> (match, layers)`` on ``model``, which is only looked at.

    Raises PlanError for a group that matches no module, or for two that match the same one.
    """
    owner: dict[int, str] = {}
    groups = []
    for name, (match, layers) in said.items():
        try:
            targets = find_targets(model, Plan([Rule(match=list(match), layers=layers, method="lora")]))
        except PlanError as error:
            raise PlanError(f"groups.{name}: {error}") from None
        bases = {id(target.base.identity): target.base for target in targets if isinstance(target.base, WeightBase)}
        for target in targets:
            other = owner.setdefault(id(target.base.identity), name)
            if other != name:
                raise PlanError(f"groups.{name}: {target.name} is in the group '{other}' already; a module has one")
        counts = Counter(base.shape for base in bases.values())
        example = {base.shape: base for base in bases.values()}
        weights = tuple((example[shape], count) for shape, count in counts.items())
        groups.append(Group(name, tuple(match), layers, weights))
    return tuple(groups)


def trained_numbers(base: WeightBase, method: str, options: Options) -> int:
    """How many numbers ``method`` trains on a weight such as ``base``. Raises PlanError where the rank is too large."""
    kind = methods.method_class(method)
    kind.require_fit(options, base.shape)
    adapter = kind(base, options)
    return sum(parameter.numel() for parameter in adapter.parameters())


class Space:
    """Every plan that may be proposed. Complete when constructed.

    Args:
        groups: from ``find_groups``.
        allowed: the methods, each with its options (but for the rank); ``none`` has no options.
        budget: trained parameters, or such as ``"lora:8"``: what uniform LoRA of rank 8 costs on these groups.
        at_least: the share of the budget that a proposal must use.

    Raises:
        ConfigError: a method has no rank or is unknown, an option is not one of its own, or no uniform plan fits.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        allowed: Mapping[str, Mapping[str, Any]],
        budget: int | str,
        at_least: float,
    ) -> None:
        self.groups = tuple(groups)
        self.methods = tuple(allowed)
        self.trained = tuple(name for name in allowed if name != NONE)
        self.at_least = at_least
        self._options = {name: dict(allowed[name]) for name in self.trained}
        self._counted: dict[tuple[tuple[int, int], str, int], int | None] = {}
        for name, options in self._options.items():
            _check_method(name, options)
        self.budget = self._worth(budget) if isinstance(budget, str) else budget
        cheapest = {name: self._uniform_cost(name, 1) for name in self._options}
        if not any(cost is not None and cost <= self.budget for cost in cheapest.values()):
            said = ", ".join(f"{name} {cost:,}" for name, cost in cheapest.items() if cost is not None)
            raise ConfigError(
                f"budget: no uniform plan fits into {self.budget:,} trained parameters; at rank 1 they cost {said}"
            )

    def cost(self, group: Group, part: Part) -> int | None:
        """Trained parameters of ``part`` on ``group``; None where the rank is too large for one of its weights."""
        if part.method == NONE:
            return 0
        counts = [(self._count(base, part.method, part.rank), times) for base, times in group.weights]
        return None if any(each is None for each, _ in counts) else sum((each or 0) * times for each, times in counts)

    def parameters(self, proposal: Proposal) -> int:
        """Trained parameters of the whole proposal."""
        return sum(self.cost(group, part) or 0 for group, part in zip(self.groups, proposal, strict=True))

    def uniform(self, method: str) -> Proposal | None:
        """``method`` on every group, at the largest rank within the budget; None where even rank 1 costs more."""
        rank = 0
        while (cost := self._uniform_cost(method, rank + 1)) is not None and cost <= self.budget:
            rank += 1
        return tuple(Part(method, rank) for _ in self.groups) if rank else None

    def fill(self, chosen: Sequence[str], weights: Sequence[float]) -> Proposal | None:
        """Ranks about proportional to ``weights``, spending the budget as far as whole ranks do.

        Every group starts at rank 1. Then ranks are raised by one, each time that of the group whose next rank is the
        least in proportion to its weight, among those that still fit (d'Hondt's rule). None where that uses less than
        ``at_least`` of the budget, or where rank 1 is too much already.
        """
        parts = [Part(method, 0 if method == NONE else 1) for method in chosen]
        costs = [self.cost(group, part) for group, part in zip(self.groups, parts, strict=True)]
        if any(cost is None for cost in costs):
            return None
        spent = [cost or 0 for cost in costs]
        while True:
            steps = []
            for place, (group, part) in enumerate(zip(self.groups, parts, strict=True)):
                more = Part(part.method, part.rank + 1)
                cost = None if part.method == NONE else self.cost(group, more)
                if cost is not None and sum(spent) - spent[place] + cost <= self.budget:
                    steps.append((more.rank / weights[place], place, more, cost))
            if not steps:
                break
            _, place, parts[place], spent[place] = min(steps, key=lambda step: step[:2])
        return tuple(parts) if self.at_least * self.budget <= sum(spent) <= self.budget else None

    def rules(self, proposal: Proposal) -> list[dict[str, Any]]:
        """The plan of ``proposal``, as a run's YAML has it."""
        return [
            {
                "match": group.match[0] if len(group.match) == 1 else list(group.match),
                "layers": group.layers,
                "method": part.method,
                "rank": part.rank,
                **self._options[part.method],
            }
            for group, part in zip(self.groups, proposal, strict=True)
            if part.method != NONE
        ]

    def _count(self, base: WeightBase, method: str, rank: int) -> int | None:
        key = (base.shape, method, rank)
        if key not in self._counted:
            options = methods.options_class(method)(rank=rank, **self._options.get(method, {}))  # type: ignore[call-arg]
            try:
                self._counted[key] = trained_numbers(base, method, options)
            except PlanError:
                self._counted[key] = None
        return self._counted[key]

    def _uniform_cost(self, method: str, rank: int) -> int | None:
        costs = [self.cost(group, Part(method, rank)) for group in self.groups]
        return None if any(cost is None for cost in costs) else sum(cost or 0 for cost in costs)

    def _worth(self, text: str) -> int:
        method, _, rank = text.partition(":")
        _check_method(method, {})
        if (cost := self._uniform_cost(method, int(rank))) is None:
            raise ConfigError(f"budget: {method} of rank {rank} is larger than the smallest matrix of the groups")
        return cost


def _check_method(name: str, options: Mapping[str, Any]) -> None:
    if "rank" in options:
        raise ConfigError(f"methods.{name}.rank: the rank is what is searched; leave it out")
    try:
        Rule(match="*", method=name, rank=1, **options)
    except PlanError as error:
        raise ConfigError(f"methods.{name}: {error}") from None
