"""A table of rows, one for each token: an embedding, or an output head. Chosen rows of it are trained.

Both hold ``weight [tokens, width]``, and may hold the same one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from trimtab.bases import _base
from trimtab.errors import PlanError


class TableBase(_base.ModuleBase):
    """An ``nn.Embedding`` or an ``nn.Linear``, or one derived from it, with an ordinary weight."""

    kind = "table"

    @staticmethod
    def knows(module: nn.Module) -> bool:
        return isinstance(module, (nn.Embedding, nn.Linear)) and _base.is_plain(module._parameters.get("weight"))

    @property
    def parameter(self) -> nn.Parameter:
        """``[tokens, width]``."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def shared(self) -> tuple[object, ...]:
        return (self.parameter,)

    @property
    def shape(self) -> tuple[int, int]:
        tokens, width = self.parameter.shape
        return tokens, width

    def tensors(self) -> dict[str, Tensor]:
        return dict(_base.own_parameters(self.module))

    def call(self, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        raise NotImplementedError("a table is called with some of its rows: see `of_rows`")

    def hang(self, name: str, parameter: nn.Parameter) -> None:
        self.module._parameters[name] = parameter

    @property
    def looks_up(self) -> bool:
        """Whether the table is called with numbers of rows, and not with states that each row is multiplied with."""
        return isinstance(self.module, nn.Embedding)

    def of_rows(self, weight: Tensor, numbers: Sequence[int], rows: Tensor) -> Any:
        """The table with no more than the rows of these ``numbers`` (``rows [n]``), which hold ``weight [n, width]``:
        what it looks up, or multiplies with, is computed as the module itself computes it."""
        small: Any = copy.copy(self.module)
        small._parameters = {"weight": weight}
        if self.looks_up:
            if small.max_norm is not None:
                raise PlanError(
                    f"this embedding has max_norm={small.max_norm}: each pass shortens rows of the frozen table itself"
                )
            small.padding_idx = numbers.index(small.padding_idx) if small.padding_idx in numbers else None
            small.num_embeddings, small.sparse = len(numbers), False
        else:
            bias = self.module._parameters.get("bias")
            small._parameters["bias"] = None if bias is None else bias[rows]
            small.out_features = len(numbers)
        return small
