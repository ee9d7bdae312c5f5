"""What every format of adapters is read into: the adapter of one module, under the module's name on disk."""

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
    """The name of a module as it was before ``torch.compile`` wrapped it or a block around it."""
    return name.replace("_orig_mod.", "")
