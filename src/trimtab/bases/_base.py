"""What every kind of frozen weight can do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trimtab.ops.decomposition import Axis, squared_norms


class Base:
    """A handle on one frozen module. It owns no tensor: what the module holds is read through it each time."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @staticmethod
    def knows(module: nn.Module) -> bool:
        """Whether ``module`` is of this kind."""
        raise NotImplementedError

    @property
    def parameter(self) -> nn.Parameter:
        """The stored weight. Two modules with the same one are tied."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        raise NotImplementedError

    def weight(self) -> Tensor:
        """The dense weight ``[out, in]`` in the base's dtype; a view, not a copy, where it is stored dense."""
        raise NotImplementedError

    def as_stored(self, weight: Tensor) -> Tensor:
        """``weight [out, in]`` laid out as the module stores its own."""
        raise NotImplementedError

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Replace the stored weight by ``weight [out, in]``, rounded to the base's dtype, in place."""
        self.parameter.copy_(self.as_stored(weight))

    def untie(self) -> None:
        """Give the module a weight of its own, equal to the one that it shared."""
        self.module.weight = nn.Parameter(self.parameter.detach().clone(), requires_grad=self.parameter.requires_grad)

    @property
    def bias(self) -> Tensor | None:
        """``[out]``, or None."""
        return self.module.bias  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the base multiplies."""
        return self.parameter.dtype

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return self.parameter.device

    def squared_norms(self, axis: Axis) -> Tensor:
        """Squared norms of the rows ``[out]`` or columns ``[in]``, in float64."""
        with torch.no_grad():
            return squared_norms(self.weight(), axis)
