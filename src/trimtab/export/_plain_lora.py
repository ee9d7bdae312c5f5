"""A run's adapter as plain LoRA, for the programs that know no other method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import SurgeryError
from trimtab.export._subject import Subject
from trimtab.surgery.adapted import adapted_modules

RANK = 32
"""Of the LoRA that another method becomes, where nothing is said."""


@dataclass(frozen=True)
class Factors:
    """The update ``scale * B @ A`` of one module: ``A`` ``[rank, in]`` and ``B`` ``[out, rank]``."""

    module: str
    adapter: Any
    handle: Any

    @property
    def A(self) -> Tensor:  # noqa: N802 -- as the paper calls it
        found: Tensor = self.adapter.A.detach()
        return found

    @property
    def B(self) -> Tensor:  # noqa: N802
        found: Tensor = self.adapter.B.detach()
        return found

    @property
    def scale(self) -> float:
        return float(self.adapter.options.scale)

    @property
    def rank(self) -> int:
        return self.A.shape[0]


def is_plain(model: Any) -> bool:
    """Whether every adapter of ``model`` is LoRA without a magnitude."""
    return all(one.method == "lora" and one.adapter.magnitude is None for _, one in adapted_modules(model))


def make_plain(subject: Subject) -> list[str]:
    """Turn the adapter of ``subject.model`` into plain LoRA, if it is something else. Gives what was done, a sentence
    each."""
    if is_plain(subject.model):
        if subject.wishes.rank is not None:
            raise SurgeryError("--rank is for what has to be converted; this run is plain LoRA and keeps its ranks")
        return []
    methods = ", ".join(sorted({one.method for _, one in adapted_modules(subject.model)}))
    raise SurgeryError(
        f"this run is not plain LoRA ({methods}), and what the format holds is; `trimtab export RUN OUT --to merged` "
        "hands it over exactly"
    )


def plain_factors(model: Any, what: str) -> list[Factors]:
    """The factors of every module of ``model``, which is plain LoRA. Raises SurgeryError for what ``what``, the format,
    cannot hold: a trained bias, a layer that is not one matrix, an adapter that two modules share."""
    found = []
    for name, one in adapted_modules(model):
        adapter: Any = one.adapter
        if adapter.bias is not None:
            raise SurgeryError(f"{name}: a trained bias cannot be said in {what}; export --to merged holds it")
        shapes = (adapter.A.ndim, adapter.B.ndim, len(one.handle.shape))
        if shapes != (2, 2, 2) or tuple(one.handle.shape) != (adapter.B.shape[0], adapter.A.shape[1]):
            kind = type(one.base).__name__
            raise SurgeryError(f"{name}: the adapter of a {kind} cannot be said in {what}; export --to merged holds it")
        if not (torch.isfinite(adapter.A).all() and torch.isfinite(adapter.B).all()):
            raise SurgeryError(f"{name}: the adapter holds NaN or infinity, so there is nothing to hand over")
        found.append(Factors(name, adapter, one.handle))
    return found
