"""What the tensors of a computation hold, counted while it runs without computing anything.

    with FakeTensorMode(), Ledger() as ledger:
        with ledger.labelled("weights"):
            weight = torch.empty(4096, 4096)

PyTorch's fake tensors have shapes and no values. Every operation on them, autograd's own included, passes through the
ledger, which notes each new storage and when it is freed. So what is kept for the backward pass, and what exists for a
moment only, is counted as the code makes and drops it, whatever the architecture and the method.

PyTorch's own ``torch.distributed._tools.MemTracker`` does not serve here. Its peak is one sum, not one for each turn of
a block, so all 30 blocks of SmolLM2-135M would have to be traced (12 s; three take 1.7 s). It knows no weight that is
stored packed, and code that looks at a value fails under it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Label = tuple[str, int | None]
"""What a storage is for, and the number of the block that it belongs to, or None."""

OTHER = "activations"


class Ledger(TorchDispatchMode):
    """Counts bytes by label, each storage from the operation that makes it until it is freed.

    Args:
        answers: for operations whose result depends on values, which fake tensors do not have: what they give.

    Attributes:
        held: bytes at this moment, by label.
        peak: the same at the moment since ``mark`` when the sum was largest.
    """

    def __init__(self, answers: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held: Counter[Label] = Counter()
        self.peak: Counter[Label] = Counter()
        self._answers = answers
        self._label: Label = (OTHER, None)
        self._sum = self._highest = 0
        self._storages: dict[int, tuple[weakref.ref[Any], int, Label]] = {}

    def mark(self) -> None:
        """Look for the peak anew from this moment on."""
        self._highest, self.peak = self._sum, self.held.copy()

    @contextmanager
    def labelled(self, kind: str, block: int | None = None) -> Iterator[None]:
        """While open, what is made belongs to ``kind`` and ``block``."""
        before, self._label = self._label, (kind, block)
        try:
            yield
        finally:
            self._label = before

    def within(self, block: int | None) -> None:
        """From now on, what is made belongs to ``block``."""
        self._label = (self._label[0], block)

    def relabel(self, tensor: Tensor, kind: str, block: int | None) -> None:
        """Count the storage of ``tensor`` under another label."""
        key = tensor.untyped_storage()._cdata
        storage, size, before = self._storages[key]
        self.held[before] -= size
        self.held[kind, block] += size
        self._storages[key] = (storage, size, (kind, block))

    def resize(self, tensor: Tensor, size: int) -> None:
        """Count the storage of ``tensor`` as ``size`` bytes, as if it were stored in another way."""
        key = tensor.untyped_storage()._cdata
        storage, before, label = self._storages[key]
        self.held[label] += size - before
        self._sum += size - before
        self._storages[key] = (storage, size, label)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = self._answers.get(func)
        result = func(*args, **(kwargs or {})) if answer is None else answer(*args)
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, Tensor):
                self._note(part)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()
        self._storages[key] = (weakref.ref(storage, lambda _: self._drop(key)), size, self._label)
        self.held[self._label] += size
        self._sum += size
        if self._sum > self._highest:
            self._highest, self.peak = self._sum, self.held.copy()

    def _drop(self, key: int) -> None:
        _, size, label = self._storages.pop(key)
        self.held[label] -= size
        self._sum -= size
