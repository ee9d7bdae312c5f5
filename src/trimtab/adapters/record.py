"""What an adapter on disk says of one module, and how it names it; what every format is read into."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trimtab.methods import Options


@dataclass(frozen=True)
class StoredAdapter:
    """The adapter of one module. Where the format has them: ``shape``, which is ``(out, in)`` of the weight that the
    adapter was made for, and ``base``, that weight itself."""

    method: str
    options: Options
    tensors: dict[str, Tensor]
    shape: tuple[int, ...] | None = None
    base: Tensor | None = None


def name_on_disk(name: str) -> str:
    """The name of a module without what ``torch.compile`` put around it or around a block above it."""
    return name.replace("_orig_mod.", "")
