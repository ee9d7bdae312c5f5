"""What is computed once for all passes of one step of the optimiser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from trimtab.surgery.contexts import for_inference


class Steady:
    """Between two steps of the optimiser no trained tensor of ``model`` changes. So its norms are computed once for the
    passes of all small batches of a step, and for those that checkpointing repeats; where a step has one pass
    (``repeats`` is False), that is left out."""

    def __init__(self, model: nn.Module, *, repeats: bool = True) -> None:
        self._model, self._repeats = model, repeats
        self._held: ExitStack | None = None

    @contextmanager
    def small_batch(self, *, is_last: bool) -> Iterator[None]:
        """The passes of one small batch, of which ``is_last`` is followed by the optimiser's step."""
        if self._held is None and self._repeats:
            self._held = ExitStack()
            self._held.enter_context(for_inference(self._model))
        try:
            yield
        except BaseException:
            self.end()
            raise
        if is_last:
            self.end()

    def end(self) -> None:
        """Trained tensors may change again."""
        if self._held is not None:
            self._held.close()
            self._held = None
