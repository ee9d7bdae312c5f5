"""Turns the adapter of a model, of whatever method, into plain LoRA.

Where LoRA cannot express a change exactly, the best product of the asked rank takes its place
(`trimtab.ops.truncation`), and the report says by how much it is off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.bases import TurnedBase, WeightBase
from trimtab.errors import SurgeryError
from trimtab.methods import lora, method_class
from trimtab.ops.truncation import Moments, Spectrum, output_norm, spectrum
from trimtab.surgery.adapted import adapted_modules, bare, bare_modules, carriers, require_adapted
from trimtab.surgery.changed_weights import ChangedWeight, changed_weights
from trimtab.surgery.contexts import evaluating
from trimtab.surgery.conversion_report import ConversionReport, ModuleError
from trimtab.surgery.exchange import Exchange, Successor
from trimtab.surgery.install import require_no_rows
from trimtab.surgery.names import entries, known_adapter
from trimtab.surgery.row_passes import Rows
from trimtab.surgery.weight_of_own import usable
from trimtab.surgery.wrappers import synchronised_by, unwrapped

_MOMENTS_AT_ONCE = 2**30  # bytes; what does not fit is gathered by further passes over the rows
_ROUNDING = 4 * torch.finfo(torch.float32).eps  # of a weight: a smaller change is none

Progress = Callable[[int, int], None]
"""Called with the number of modules done and of all."""


def convert_to_lora(
    model: nn.Module,
    rank: int | None = 32,
    rows: Iterable[Any] | None = None,
    *,
    error: float | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Turn the active adapter of ``model``, of any method or mix of methods, into plain LoRA in place.

    Each module's change ``dW = W' - W`` becomes the best product ``B A`` of the asked rank: the truncated singular
    value decomposition of dW; or, given ``rows``, of dW weighed by the second moments of what the rows feed to the
    module, which keeps the outputs (`trimtab.ops.truncation`). Plain LoRA of no higher rank is kept exactly, and so is
    any change whose rank is no higher. The converted modules have one rank and the scale 1, so that any reader of LoRA
    takes them; where some need less than others, the rest is filled with zeros. A trained bias stays beside it.

    A module that is trained in full becomes LoRA if it is a layer with one weight; another (a norm, single rows of an
    embedding) stays as it is, and ``report.kept`` says so. One change of a weight is in memory at a time, in float64.

    Args:
        model: the model, which has an adapter.
        rank: the rank; with ``error``, the most that a module may get, where None is no limit.
        rows: an iterable of model inputs, each a mapping of keywords (a tokenizer's batch), a tensor, or a tuple of
            tensors. They are gone through more than once. A few dozen typical ones do.
        error: choose the lowest rank, module by module, whose relative error is at most this: of the outputs on the
            rows, or without rows of the weight's change. The ranks then differ from module to module.
        progress: called as modules get done.

    Raises SurgeryError if the model has no adapters, if one sits on a block, holds NaN or infinity, or if nothing in
    it can become LoRA; and for rows that the model does not take. The model is then unchanged.
    """
    _check(rank, error)
    if (wrapper := synchronised_by(model)) is not None:
        raise SurgeryError(
            f"convert_to_lora: {wrapper} has taken the model already. Save the adapter, and convert it in one process"
        )
    model = unwrapped(model)
    require_adapted(model, "convert_to_lora")
    require_no_rows(model)
    if any(module.adapters_disabled for module in carriers(model)):
        raise SurgeryError(
            "convert_to_lora: adapters are switched off (trimtab.disable_adapter); leave that context first"
        )
    active = known_adapter(model, None, "convert_to_lora")
    if any(callable(getattr(module, "reshard", None)) for module in model.modules()):
        raise SurgeryError(
            "convert_to_lora: the model is sharded (fully_shard). Save the adapter, and convert it on a model that is "
            "loaded as a whole"
        )
    carried = entries(model, active)
    own_heads = [name for name in _own_heads(model) if name in carried and carried[name].method == "full"]
    heads = {name: carried.pop(name) for name in own_heads}
    changes, kept = changed_weights(carried, "convert_to_lora")
    kept |= dict.fromkeys(heads, "a head for the task, which is drawn anew where the base is loaded, and so kept whole")
    if not changes:
        name, why = next(iter(kept.items()))
        raise SurgeryError(f"convert_to_lora: nothing in this adapter can become LoRA; {name}: {why}")
    with evaluating(model), usable(carried.values()):
        inputs = None if rows is None else Rows(model, rows)
        known = _Known(inputs, dict(adapted_modules(model)))
        products = _products(changes, known, rank, error, progress)
        if error is None:
            most = max(product.rank for product in products)
            products = [product.of_rank(most) for product in products]
        _match_partners(changes, products)
        exchange = Exchange(model, active, _converted(changes, products))
        outputs = None if inputs is None else inputs.compare(exchange.made)
    exchange.make()
    modules = {name: one.error for change, one in zip(changes, products, strict=True) for name in change.names}
    return ConversionReport(modules, kept, outputs)


def _own_heads(model: Any) -> list[str]:
    """The modules that a classifier or the like has on top of its base, or as a pooler: the files of a base lack them,
    so that a change of their weights would be added to others."""
    base = getattr(model, str(getattr(model, "base_model_prefix", "") or "-"), None)
    if not isinstance(base, nn.Module) or base is model:
        return []
    getter = getattr(model, "get_output_embeddings", None)
    try:
        has_files = getter is not None and getter() is not None
    except (NotImplementedError, AttributeError):
        has_files = False
    below = {id(bare(module)) for module in base.modules()}
    return [
        name
        for name, module in bare_modules(model)
        if "pooler" in name.split(".") or not (has_files or id(bare(module)) in below)
    ]


def _check(rank: Any, error: Any) -> None:
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise SurgeryError(f"convert_to_lora: rank: expected a whole number of at least 1, got {rank!r}")
    if error is not None and not (isinstance(error, (int, float)) and 0 < error < 1):
        raise SurgeryError(f"convert_to_lora: error: expected a number between 0 and 1, such as 0.01, got {error!r}")
    if rank is None and error is None:
        raise SurgeryError("convert_to_lora: give a rank, an error, or both")


@dataclass
class _Product:
    """``B A`` in the place of a change, in the dtype in which it will be kept."""

    a: Tensor
    b: Tensor
    error: ModuleError

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    def of_rank(self, rank: int) -> _Product:
        """The same, filled with zeros."""
        more = rank - self.rank
        if more <= 0:
            return self
        a, b = nn.functional.pad(self.a, (0, 0, 0, more)), nn.functional.pad(self.b, (0, more))
        return _Product(a, b, _with_rank(self.error, rank))


def _with_rank(error: ModuleError, rank: int) -> ModuleError:
    return ModuleError(**{**vars(error), "rank": rank})


@dataclass
class _Known:
    """What is known of the inputs of modules: the rows, if there are some, and the modules by name."""

    rows: Rows | None
    modules: Mapping[str, nn.Module]

    def moments(self, changes: Sequence[ChangedWeight]) -> dict[int, Moments]:
        """By the id of each change, the moments of what the rows feed to its modules. Those that multiply with one
        weight in two directions have none."""
        if self.rows is None:
            return {}
        fed = [
            (self.modules[name], change.handle)
            for change in changes
            for name in change.names
            if change.is_in_one_direction and not isinstance(change.handle, TurnedBase)
        ]
        found = self.rows.moments(fed)
        known = {}
        for change in changes:
            of_each = [found.get(id(self.modules[name])) for name in change.names]
            if parts := [part for part in of_each if part is not None]:
                count = sum(part.inputs for part in parts)
                mean = torch.stack([part.mean * (part.inputs / count) for part in parts]).sum(0)
                known[id(change)] = Moments(mean, count)
        return known


def _products(
    changes: Sequence[ChangedWeight],
    inputs: _Known,
    rank: int | None,
    error: float | None,
    progress: Progress | None,
) -> list[_Product]:
    """The product for each change. Moments are gathered for as many at once as fit into ``_MOMENTS_AT_ONCE``."""
    products: list[_Product] = []
    while len(products) < len(changes):
        group: list[ChangedWeight] = []
        room = _MOMENTS_AT_ONCE
        for change in changes[len(products) :]:
            room -= _moments_bytes(change)
            if group and (inputs.rows is None or room < 0):
                break
            group.append(change)
        known = inputs.moments(group)
        for change in group:
            products.append(_product(change, known.pop(id(change), None), rank, error))
            if progress is not None:
                progress(len(products), len(changes))
    return products


def _moments_bytes(change: ChangedWeight) -> int:
    size = change.handle.shape[1]
    return 8 * size * (1 if change.handle.stored_transposed and not change.handle.is_linear else size)


def _product(change: ChangedWeight, moments: Moments | None, rank: int | None, error: float | None) -> _Product:
    """The best product for one change, and how far it is off as it is kept."""
    dtype = torch.float64 if change.handle.dtype == torch.float64 else torch.float32
    delta = change.delta()
    place, stack = delta.device, delta.shape[:-2]
    weights = delta.reshape(-1, *delta.shape[-2:])
    if _is_rounding(weights, change.handle):
        weights = torch.zeros_like(weights)
    of_each = [spectrum(weight, moments) for weight in weights]
    full = max((one.rank for one in of_each), default=0)
    chosen = full if rank is None else min(rank, full)
    if error is not None:
        chosen = min(chosen, max(int((one.errors > error).sum()) for one in of_each))
    chosen = max(chosen, 1)
    exact = None if change.low_rank is None else change.low_rank()
    if exact is not None and exact[0].shape[-2] <= (rank or chosen if error is None else chosen):
        chosen = exact[0].shape[-2]
        a, b = (one.reshape(-1, *one.shape[-2:]).to(weights.device, dtype) for one in exact)
    else:
        factors = [one.factors(chosen) for one in of_each]
        a = torch.stack([one for one, _ in factors]).to(dtype)
        b = torch.stack([one for _, one in factors]).to(dtype)
    left = weights - b.double() @ a.double()
    size = float(weights.norm())
    told = _judged(left[0], weights[0], moments) if moments is not None else (None, None)
    module = ModuleError(
        method=change.method,
        rank=chosen,
        bound=max(one.bound(chosen) for one in of_each),
        error=float(left.norm()) / size if size > 0 else 0.0,
        output_error=told[0],
        change=size,
        output_change=told[1],
        errors=_errors(of_each),
    )
    return _Product(a.reshape(*stack, *a.shape[1:]).to(place), b.reshape(*stack, *b.shape[1:]).to(place), module)


def _is_rounding(delta: Tensor, handle: WeightBase) -> bool:
    """Whether a change is no more than what float32 rounds off the weight: a magnitude that was never trained is a
    change of full rank by its last digit."""
    return handle.dtype != torch.float64 and float(delta.norm()) <= _ROUNDING * float(handle.weight().float().norm())


def _judged(left: Tensor, delta: Tensor, moments: Moments) -> tuple[float, float]:
    """The relative error of the outputs, and what it is relative to."""
    size = output_norm(delta, moments)
    return (output_norm(left, moments) / size if size > 0 else 0.0), size


def _errors(of_each: Sequence[Spectrum]) -> Tensor:
    """The relative error that each rank has: of a stack, that of its worst weight."""
    longest = max(len(one.errors) for one in of_each)
    return torch.stack([nn.functional.pad(one.errors, (0, longest - len(one.errors))) for one in of_each]).amax(0).cpu()


def _match_partners(changes: Sequence[ChangedWeight], products: list[_Product]) -> None:
    """Give the layers that PEFT adapts only together (the projections of an attention) one rank."""
    place = {name: number for number, change in enumerate(changes) for name in change.names}
    for number, change in enumerate(changes):
        partner = change.handle.peft_partner(change.name)
        if partner is not None and partner in place:
            both = (number, place[partner])
            most = max(products[one].rank for one in both)
            for one in both:
                products[one] = products[one].of_rank(most)


def _converted(changes: Sequence[ChangedWeight], products: Sequence[_Product]) -> Mapping[str, Successor]:
    """By the name of each module that is converted, what takes the place of its adapter."""
    kind = method_class("lora")
    made: dict[str, Successor] = {}
    for change, product in zip(changes, products, strict=True):
        beside = change.bias is not None
        options = lora.Options(
            rank=product.rank,
            alpha=float(product.rank),
            bias=beside,
            added_bias=beside and change.handle.stored_bias is None,
        )
        with torch.inference_mode(False):  # tensors of that mode could never be trained
            adapter: Any = kind(change.handle, options)
        with torch.no_grad():
            adapter.A.copy_(product.a)
            adapter.B.copy_(product.b)
            if change.bias is not None:
                adapter.bias.copy_(change.bias)
        for name, handle in zip(change.names, change.handles, strict=True):
            made[name] = Successor(handle, "lora", adapter)
    return made
