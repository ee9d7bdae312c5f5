"""What a conversion or a combination of adapters changed: by module, in all, and in the outputs of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

ERRORS = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
"""The errors for which a written report says the rank that each module would need."""


@dataclass(frozen=True)
class ModuleError:
    """One module whose change of the weight, ``dW``, is a product ``B A`` of low rank now.

    Attributes:
        method: what the module had before.
        rank: of the product.
        bound: the first singular value that was left out. Without rows, of dW: no input x has its output moved by more
            than ``bound * ||x||``. With rows, of ``dW`` on their inputs: in no direction of the outputs is the error
            larger in the root of its mean square over the rows.
        error: ``||dW - B A|| / ||dW||``, of the factors as they are stored.
        output_error: ``||(dW - B A) x|| / ||dW x||`` over the rows' inputs x; None where they are not known.
        change: ``||dW||``.
        output_change: the root of the mean ``||dW x||^2`` over the rows' inputs; None as above.
        errors: ``[n + 1]``, the relative error of ranks 0, 1, ..., n: of the outputs where the inputs are known.
    """

    method: str
    rank: int
    bound: float
    error: float
    output_error: float | None
    change: float
    output_change: float | None
    errors: Tensor = field(repr=False, compare=False)

    @property
    def weighed(self) -> bool:
        """Whether the error was weighed by what the rows feed to the module."""
        return self.output_error is not None

    @property
    def judged(self) -> float:
        """The error by which ranks are chosen: of the outputs where the inputs are known, else of the weight."""
        return self.error if self.output_error is None else self.output_error

    def rank_for(self, error: float) -> int:
        """The lowest rank whose relative error is at most ``error``."""
        return rank_for(self.errors, error)


def rank_for(errors: Tensor, error: float) -> int:
    """The first rank at which ``errors [n + 1]``, which fall, are at most ``error``."""
    return int((errors > error).sum())


@dataclass(frozen=True)
class OutputError:
    """How far the outputs of the model are from those before, over the rows.

    Attributes:
        kl: the mean KL divergence (nats) of the distributions after from those before, ``KL(before || after)``; None
            for outputs of one number, which form no distribution.
        agreement: the share of outputs whose largest entry is the same; None as above.
        difference: ``||after - before|| / ||before||``.
        count: how many output vectors were compared: one for each token that is not padding, or for each row.
    """

    kl: float | None
    agreement: float | None
    difference: float
    count: int

    def __str__(self) -> str:
        said = f"outputs differ by {self.difference:.1e} of their norm"
        if self.kl is None or self.agreement is None:
            return f"{said} ({self.count:,} compared)"
        return (
            f"KL {self.kl:.2e} nats, the likeliest output is the same in {100 * self.agreement:.1f} %, {said} "
            f"({self.count:,} compared)"
        )


@dataclass(frozen=True)
class ConversionReport:
    """What ``trimtab.convert_to_lora`` did.

    Attributes:
        modules: those that have a plain LoRA now, by name.
        kept: those that no LoRA can express and that stay as they were, by name, each with the reason.
        logits: how far the model's outputs moved on the rows; None without rows.
    """

    modules: Mapping[str, ModuleError]
    kept: Mapping[str, str]
    logits: OutputError | None = None

    @property
    def error(self) -> float:
        """``||dW - B A|| / ||dW||`` over all modules together."""
        return _together([(one.error, one.change) for one in self.modules.values()])

    @property
    def output_error(self) -> float | None:
        """``||(dW - B A) x|| / ||dW x||`` over all modules together, as far as rows reached them; None without rows."""
        known = [
            (one.output_error, one.output_change)
            for one in self.modules.values()
            if one.output_error is not None and one.output_change is not None
        ]
        return _together(known) if known else None

    @property
    def worst(self) -> str:
        """The name of the module with the largest error, of its outputs where the rows reached it."""
        return max(self.modules, key=lambda name: self.modules[name].judged)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each module."""
        return {name: one.rank for name, one in self.modules.items()}

    def rank_for(self, error: float) -> dict[str, int]:
        """The rank that each module would need for a relative error of at most ``error``."""
        return {name: one.rank_for(error) for name, one in self.modules.items()}

    def plain(self) -> dict[str, Any]:
        """The report as plain values, for a file."""
        logits = None if self.logits is None else vars(self.logits)
        modules = {
            name: {
                "method": one.method,
                "rank": one.rank,
                "bound": one.bound,
                "error": one.error,
                "output_error": one.output_error,
                "rank_for_error": {str(error): one.rank_for(error) for error in ERRORS},
            }
            for name, one in self.modules.items()
        }
        said = {"error": self.error, "output_error": self.output_error, "worst": self.worst, "logits": logits}
        return {**said, "kept": dict(self.kept), "modules": modules}


@dataclass(frozen=True)
class CombinedModule:
    """One module of a combined adapter.

    Attributes:
        method: what it has there.
        rank: None where it has none.
        error: how far its change is from the combined one, relative to that: rounding, or what the rank leaves out.
        change: the size of the combined change.
    """

    method: str
    rank: int | None
    error: float
    change: float


@dataclass(frozen=True)
class CombinationReport:
    """What ``trimtab.combine`` made.

    Attributes:
        name: of the new adapter.
        how: it was combined.
        modules: by name.
    """

    name: str
    how: str
    modules: Mapping[str, CombinedModule]

    @property
    def error(self) -> float:
        """The relative error of all changes together: of the order of 1e-7, rounding, where the sum is exact."""
        return _together([(one.error, one.change) for one in self.modules.values()])

    @property
    def rank(self) -> int:
        """The largest rank of a module; 0 where none has one."""
        return max((one.rank or 0 for one in self.modules.values()), default=0)

    @property
    def worst(self) -> str:
        """The name of the module with the largest error."""
        return max(self.modules, key=lambda name: self.modules[name].error)

    def plain(self) -> dict[str, Any]:
        """The report as plain values, for a file."""
        said = {"how": self.how, "rank": self.rank, "error": self.error, "worst": self.worst}
        return {**said, "modules": {name: vars(one) for name, one in self.modules.items()}}


def _together(parts: list[tuple[float, float]]) -> float:
    """The relative error of all changes, of which each has one and a size."""
    size = math.fsum(change**2 for _, change in parts)
    return math.sqrt(math.fsum((error * change) ** 2 for error, change in parts) / size) if size > 0 else 0.0
