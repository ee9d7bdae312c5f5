"""What an adapter on disk says of one module; what every layout is read into."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trimtab.methods import Options


@dataclass(frozen=True)
class Stored:
    """The adapter of one module. ``shape``: ``(out, in)`` of the weight that it was made for, where the layout says
    so."""

    method: str
    options: Options
    tensors: dict[str, Tensor]
    shape: tuple[int, ...] | None = None
