"""Chosen rows of a table of tokens trained, beside the frozen table.

    W'[rows] = V        V [n, width] starts at W[rows]; all other rows of W stay as they are

Nothing of the table's size is made: an embedding looks up its frozen rows, and those that are trained take their place;
an output head multiplies with both, and the trained logits take the place of the frozen ones. So the gradient is that
of V alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.bases.table import TableBase
from trimtab.errors import PlanError
from trimtab.methods import _method
from trimtab.ops.read_weight import read_weight
from trimtab.ops.spread import whole


class RowsMethod(_method.Method):
    """``weight [n, width]``: the trained rows, in the order of their numbers.

    Raises PlanError for a row that the table does not have.
    """

    sits_on = "table"
    trains_base = True
    options: Any
    rows: Tensor

    def __init__(self, base: TableBase, options: Any) -> None:
        super().__init__(base, options)
        tokens = base.shape[0]
        if (last := options.rows[-1]) >= tokens:
            raise PlanError(
                f"rows: there is no row {last}: the table has {tokens}, numbered from 0. Resize the model first "
                f"(model.resize_token_embeddings({last + 1}), or model.add_tokens in a run's configuration)"
            )
        self.register_buffer("rows", torch.tensor(options.rows, device=base.device), persistent=False)
        self.weight = nn.Parameter(whole(base.parameter).detach()[list(options.rows)].to(self.dtype, copy=True))
        base.of_rows(self.weight, options.rows, self.rows)  # says if it cannot

    def copies(self, base: TableBase) -> dict[str, nn.Parameter]:
        return {"weight": base.parameter}

    def __contains__(self, name: str) -> bool:
        return name == "weight"

    def tensor(self, name: str, base: TableBase) -> Tensor:
        """The whole table ``[tokens, width]`` with the trained rows, differentiable in these."""
        own, mine = base.parameter, self.weight
        return read_weight(
            lambda: own.index_copy(0, self.rows, mine.to(own.dtype)), (mine,), of=(own.shape, own.dtype, own.device)
        )

    def merged(self, name: str, own: Tensor) -> Tensor:
        return whole(own).index_copy(0, self.rows, self.weight.detach().to(own.dtype))

    def forward(self, base: TableBase, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What the table gives, with the trained rows in place of its own."""
        output: Tensor = base.module(*args, **kwargs)
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        mine = base.of_rows(self.weight.to(base.dtype), self.options.rows, self.rows)
        if not base.looks_up:
            return output.index_copy(-1, self.rows, mine.forward(x).to(output.dtype))
        place = torch.searchsorted(self.rows, x).clamp_(max=len(self.rows) - 1)
        return torch.where((self.rows[place] == x).unsqueeze(-1), mine.forward(place), output)

    @torch.no_grad()
    def effective_weight(self, base: TableBase, dtype: torch.dtype | None = None) -> Tensor:
        """The whole table ``[tokens, width]`` with the trained rows."""
        work = dtype or _method.full_dtype(base)
        return whole(base.parameter).to(work).index_copy(0, self.rows, self.weight.to(work))
