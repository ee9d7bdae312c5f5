"""What several adapters have on one module, as one: the sums of `trimtab.combine`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from trimtab import bases, methods
from trimtab.bases import Base, WeightBase
from trimtab.errors import SurgeryError
from trimtab.methods import Options, lora, mora
from trimtab.ops import combination, reference
from trimtab.ops.combination import LowRankAdapter
from trimtab.ops.decomposition import Axis
from trimtab.ops.truncation import spectrum
from trimtab.surgery.adapted import Adapted
from trimtab.surgery.changed_weights import ChangedWeight
from trimtab.surgery.conversion_report import CombinedModule
from trimtab.surgery.plan import Target

How = Literal["linear", "svd", "ties", "dare_linear", "dare_ties"]


class Wishes(NamedTuple):
    """How adapters are combined: the arguments of `trimtab.combine`, settled."""

    how: How
    rank: int
    density: float
    seed: int


class Source(NamedTuple):
    """What one adapter has on one module."""

    share: float
    entry: Adapted
    change: ChangedWeight | None
    """What it does to the module's weight; None where it does not change it as a matrix."""


@dataclass
class Place:
    """One module that some of the combined adapters have."""

    names: tuple[str, ...]
    module: nn.Module
    sources: list[Source]
    apart: bool = False
    """Whether another module has its weight, and the adapters change it otherwise there."""

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def rank(self) -> int:
        """The ranks of what meets here, together."""
        return sum(getattr(one.entry.adapter.options, "rank", 0) for one in self.sources)

    @property
    def adapters(self) -> list[Any]:
        """The trained tensors that each source has here."""
        return [one.entry.adapter for one in self.sources]

    @property
    def key(self) -> tuple[tuple[float, int], ...]:
        """What is combined here: the same on modules that share it."""
        return tuple((one.share, id(_trained(one.entry.adapter))) for one in self.sources)

    @property
    def handle(self) -> WeightBase:
        """The handle on the module's weight."""
        handles = (one.entry.handle for one in self.sources)
        found = next((one for one in handles if isinstance(one, WeightBase)), None) or bases.find(self.module)
        assert found is not None
        return found

    def delta(self, change: ChangedWeight) -> Tensor:
        """``dW [..., out, in]`` in float64, the way round that this module multiplies with its weight."""
        delta = change.delta()
        return delta if change.handle.stored_transposed == self.handle.stored_transposed else delta.mT


def _trained(adapter: Any) -> object:
    """What modules share that share an adapter: the copy of a weight, or the adapter."""
    return adapter.stored_tensors().get("weight", adapter) if adapter.trains_base else adapter


@dataclass
class Sum:
    """What the new adapter has on one module."""

    base: Base
    method: str
    options: Options
    tensors: dict[str, Tensor]
    told: CombinedModule


def target(place: Place, total: Sum, every: Sequence[Sum]) -> Target:
    """The module of ``place`` for `surgery.install`. Modules with the same options are those of one rule."""
    kinds = list(dict.fromkeys((one.method, one.options.model_dump_json()) for one in every))
    return Target(
        place.names,
        place.module,
        total.base,
        rule=1 + kinds.index((total.method, total.options.model_dump_json())),
        method=total.method,
        adapter_class=methods.method_class(total.method).class_for(total.base),
        options=total.options,
        apart=place.apart,
    )


def sums(places: Sequence[Place], wishes: Wishes) -> list[Sum]:
    """What the new adapter has on each module; modules that share a weight and its adapters share it."""
    draw = torch.Generator().manual_seed(wishes.seed)
    # PEFT has magnitudes on all modules or on none; LoRA is DoRA with the norms that it has.
    magnitudes = any(getattr(one, "magnitude", None) is not None for place in places for one in place.adapters)
    known: dict[object, Sum] = {}
    made = []
    for place in places:
        shared = None if place.apart else known.get(place.key)
        if shared is None or shared.method == "full":
            shared = known[place.key] = _sum(place, wishes, draw, magnitudes=magnitudes)
        else:
            shared = replace(shared, base=place.handle)
        made.append(shared)
    return made


def _sum(place: Place, wishes: Wishes, draw: torch.Generator, *, magnitudes: bool) -> Sum:
    if any(one.entry.handle.kind == "table" for one in place.sources):
        return _rows(place)
    if all(one.change is None for one in place.sources):
        return _whole(place)
    if wishes.how != "linear":
        return _truncated(place, wishes, draw)
    adapters = place.adapters
    if all(isinstance(one, lora.LoRA) and one.groups == 1 for one in adapters):
        axes = {_axis(one, place.handle) for one in adapters if one.magnitude is not None}
        if len(axes) < 2:
            return _low_rank(place, next(iter(axes), "output"), magnitudes=magnitudes)
    elif all(isinstance(one, mora.MoRA) and one.magnitude is None for one in adapters):
        kinds = {(one.M.shape, one.options.form, _is_turned(one, place.handle)) for one in adapters}
        if len(kinds) == 1 and not next(iter(kinds))[2]:
            return _square(place)
    elif any(one.trains_base for one in adapters) and bases.find(place.module, "module") is not None:
        return _whole(place)
    said = " and ".join(dict.fromkeys(one.entry.method for one in place.sources))
    raise SurgeryError(
        f"combine: {place.name}: a sum of {said} is none of our methods there (MoRA with MoRA of one size and without "
        "magnitudes is, and any mix of LoRA and DoRA with magnitudes over one axis, and anything with full). Take svd "
        "(how='svd', --how svd), which is plain LoRA and states its error. Nothing was changed"
    )


def _is_turned(adapter: Any, handle: WeightBase) -> bool:
    """Whether the adapter was made for a layer that multiplies with the weight the other way round."""
    return bool(adapter.stored_transposed != handle.stored_transposed)


def _axis(adapter: Any, handle: WeightBase) -> Axis:
    """The axis of its magnitudes, as the layer of ``handle`` sees the weight."""
    is_output = (adapter.options.magnitude_axis == "output") != _is_turned(adapter, handle)
    return "output" if is_output else "input"


def _low_rank(place: Place, axis: Axis, *, magnitudes: bool) -> Sum:
    """A sum of LoRA and DoRA."""
    handle = place.handle
    weight = handle.weight().double()
    parts = [(one.share, _in_float64(one.entry.adapter, handle, weight)) for one in place.sources]
    total = combination.weighted_sum(weight, parts, axis)
    if magnitudes and total.magnitude is None and handle.is_called:
        total = total._replace(magnitude=torch.linalg.vector_norm(weight + total.b @ total.a, dim=-1))
    wanted = torch.stack([share * (_acting(weight, part, axis) - weight) for share, part in parts]).sum(0)
    rank, bias = total.a.shape[-2], _bias(place, handle)
    tensors = {"A": total.a, "B": total.b} if rank else {}
    options: dict[str, Any] = {"rank": rank, **({"alpha": float(rank)} if rank else {}), **bias.options}
    method = "lora" if total.magnitude is None else "dora"
    if total.magnitude is not None:
        tensors["magnitude"] = total.magnitude
        options["magnitude_axis"] = axis
    kept = LowRankAdapter(*(one if one is None else one.to(_dtype(handle)).double() for one in total))  # type: ignore[arg-type]
    told = CombinedModule(method, rank, *_relative(_acting(weight, kept, axis) - weight, wanted))
    return Sum(handle, method, methods.options_class(method)(**options), {**tensors, **bias.tensors}, told)


def _in_float64(adapter: Any, handle: WeightBase, weight: Tensor) -> LowRankAdapter:
    magnitude = None if adapter.magnitude is None else adapter.magnitude.double()
    if not adapter.options.rank:
        stack, (out_features, in_features) = weight.shape[:-2], weight.shape[-2:]
        return LowRankAdapter(
            weight.new_zeros(*stack, 0, in_features), weight.new_zeros(*stack, out_features, 0), magnitude
        )
    a, b = adapter.A.double(), adapter.options.scale * adapter.B.double()
    return LowRankAdapter(*((b.mT, a.mT) if _is_turned(adapter, handle) else (a, b)), magnitude)


def _acting(weight: Tensor, adapter: LowRankAdapter, axis: Axis) -> Tensor:
    return reference.effective_weight(weight, adapter.b @ adapter.a, magnitude=adapter.magnitude, axis=axis)


def _square(place: Place) -> Sum:
    """A sum of MoRA of one size."""
    handle, adapters = place.handle, place.adapters
    parts = [one.share * adapter.M.double() for one, adapter in zip(place.sources, adapters, strict=True)]
    total, bias = torch.stack(parts).sum(0), _bias(place, handle)
    plain = {"dtype": None, "dropout": 0.0, "bias": False}
    options: Any = adapters[0].options.model_copy(update=plain | bias.options)
    told = CombinedModule("mora", options.rank, *_relative(total.to(_dtype(handle)).double(), total))
    return Sum(handle, "mora", options, {"M": total, **bias.tensors}, told)


def _truncated(place: Place, wishes: Wishes, draw: torch.Generator) -> Sum:
    """Any sum, as the best plain LoRA of a rank."""
    handle = place.handle
    changes = [(one.share, one.change) for one in place.sources if one.change is not None]
    shares, deltas = [share for share, _ in changes], [place.delta(change) for _, change in changes]
    if wishes.how.startswith("dare"):
        deltas = [combination.drawn(delta, wishes.density, draw) for delta in deltas]
    elif wishes.how == "ties":
        deltas = [combination.largest(delta, wishes.density) for delta in deltas]
    if wishes.how.endswith("ties"):
        wanted = combination.elected(deltas, shares)
    else:
        wanted = torch.stack([share * delta for share, delta in zip(shares, deltas, strict=True)]).sum(0)
    stack = wanted.shape[:-2]
    factors = [spectrum(one).factors(wishes.rank) for one in wanted.reshape(-1, *wanted.shape[-2:])]
    a = torch.stack([one for one, _ in factors]).reshape(*stack, wishes.rank, wanted.shape[-1])
    b = torch.stack([one for _, one in factors]).reshape(*stack, wanted.shape[-2], wishes.rank)
    bias, dtype = _bias(place, handle), _dtype(handle)
    options = lora.Options(rank=wishes.rank, alpha=float(wishes.rank), **bias.options)
    told = CombinedModule("lora", wishes.rank, *_relative(b.to(dtype).double() @ a.to(dtype).double(), wanted))
    return Sum(handle, "lora", options, {"A": a, "B": b, **bias.tensors}, told)


def _whole(place: Place) -> Sum:
    """A sum of which one part trains tensors of the module itself."""
    base = bases.find(place.module, "module")
    assert base is not None
    own = _own_tensors(base)
    added: dict[str, Tensor] = {}
    counted: dict[str, Tensor] = {}  # and not trained
    for one in place.sources:
        for key, value in one.entry.adapter.stored_tensors().items():
            if key not in own or (key == "weight" and one.change is not None):
                continue
            if not value.is_floating_point():
                counted[key] = torch.maximum(counted.get(key, value), value)
                continue
            added[key] = added.get(key, 0) + one.share * (value.double() - own[key].double())
        if one.change is not None:  # by whatever method
            delta = place.delta(one.change)
            delta = delta if isinstance(base, WeightBase) else place.handle.as_stored(delta)
            added["weight"] = added.get("weight", 0) + one.share * delta
    tensors = {key: own[key].double() + change for key, change in added.items()} | counted
    names = tuple(key for key in own if key in tensors)
    options = methods.options_class("full")(**({} if len(names) == len(own) else {"tensors": names}))
    kept = {key: (tensors[key].to(_dtype(base)).double() - own[key].double()).flatten() for key in added}
    wanted = torch.cat([change.flatten() for change in added.values()])
    told = CombinedModule("full", None, *_relative(torch.cat(list(kept.values())), wanted))
    return Sum(base, "full", options, tensors, told)


def _own_tensors(base: Any) -> dict[str, Tensor]:
    """The tensors that method full trains on ``base``, by their names there."""
    if not isinstance(base, WeightBase):
        tensors: dict[str, Tensor] = base.tensors()
        return tensors
    return {"weight": base.weight().detach()} | ({} if base.bias is None else {"bias": base.bias.detach()})


def _rows(place: Place) -> Sum:
    """A sum of single rows of a table."""
    adapters = place.adapters
    if not all(one.entry.handle.kind == "table" for one in place.sources):
        raise SurgeryError(
            f"combine: {place.name}: one adapter trains single rows of this table, and another changes it otherwise. "
            "Combine adapters that agree in it. Nothing was changed"
        )
    base: Any = place.sources[0].entry.handle
    own = base.parameter.detach().double()
    numbers = sorted({row for adapter in adapters for row in adapter.options.rows})
    added = torch.zeros_like(own[numbers])
    for one, adapter in zip(place.sources, adapters, strict=True):
        at = torch.tensor([numbers.index(row) for row in adapter.options.rows], device=own.device)
        added[at] += one.share * (adapter.weight.double() - own[list(adapter.options.rows)])
    total = own[numbers] + added
    options = methods.options_class("full").read({"tensors": None, "rows": numbers}, ())
    told = CombinedModule("full", None, *_relative(total.to(_dtype(base)).double() - own[numbers], added))
    return Sum(base, "full", options, {"weight": total}, told)


class _Bias(NamedTuple):
    options: dict[str, Any]
    tensors: dict[str, Tensor]


def _bias(place: Place, handle: WeightBase) -> _Bias:
    """The sum of the trained biases; nothing where none is trained."""
    own, total = handle.bias, None
    for one in place.sources:
        mine = one.entry.adapter.stored_tensors().get("bias")
        if mine is not None:
            start = torch.zeros_like(mine).double() if own is None else own.detach().double()
            total = (start if total is None else total) + one.share * (mine.double() - start)
    if total is None:
        return _Bias({}, {})
    return _Bias({"bias": True} | ({"added_bias": True} if own is None else {}), {"bias": total})


def _dtype(base: Base) -> torch.dtype:
    """That in which the new adapter keeps its tensors."""
    return torch.float64 if base.dtype == torch.float64 else torch.float32


def _relative(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """How far ``found`` is from what was ``wanted``, relative to that; and the size of that."""
    size, off = float(wanted.norm()), float((found - wanted).norm())
    return (off / size if size > 0 else off), size
