"""What every kind of frozen module can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from trimtab.ops.decomposition import Axis, squared_norms

Kind = Literal["weight", "block"]
"""What a method can sit on: a layer that is one matrix product, or a block of several modules around which one hidden
state comes in and goes out."""


class Base:
    """A handle on one frozen module. It owns no tensor: what the module holds is read through it each time.

    A block has ``shape``, ``identity``, ``dtype``, ``device``, ``input`` and ``changed``; a weight has all but the last
    two.
    """

    kind: ClassVar[Kind] = "weight"

    stored_dense: ClassVar[bool] = True
    """Whether the weight lies in memory as it multiplies. Else it is computed at every look, and never kept."""

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
    def identity(self) -> object:
        """What an adapter belongs to: modules with the same one share an adapter."""
        return self.parameter

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        raise NotImplementedError

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight ``[out, in]``: a view in the base's own dtype where it is stored dense; else a new tensor
        in ``dtype`` (None: the base's)."""
        raise NotImplementedError

    def again(self, dtype: torch.dtype) -> Callable[[], Tensor] | None:
        """How the backward pass gets ``weight(dtype)`` once more, as a new tensor of its own; None where the tensor
        itself may be kept for it."""
        return None

    def dtype_for(self, x: Tensor) -> torch.dtype:
        """The dtype in which ``x`` is multiplied."""
        return self.dtype

    def as_dense(self, dtype: torch.dtype) -> nn.Module:
        """A module with a dense weight that does what this one does: this one, if its weight is stored dense."""
        return self.module

    def as_stored(self, weight: Tensor) -> Tensor:
        """``weight [out, in]`` laid out as the module stores its own."""
        raise NotImplementedError

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Replace the stored weight by ``weight [out, in]``, rounded to what the base stores, in place."""
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

    def input(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The hidden state ``[..., in]`` among the arguments of a call of the block; None if there is none."""
        raise NotImplementedError

    def changed(self, output: Any, change: Callable[[Tensor], Tensor]) -> Any:
        """The block's ``output`` with ``change`` applied to the hidden state ``[..., out]`` in it. Raises SurgeryError
        if there is none."""
        raise NotImplementedError
