"""What a task has to say of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from trimtab.config.run import RunConfig
from trimtab.data.rows import EncodedRow
from trimtab.models.causal_head import Head
from trimtab.runs.events import Listener
from trimtab.tasks._inputs import Inputs


class Task(ABC):
    """What a model is asked for. The name of a task is that of its file."""

    model_class: ClassVar[str]
    """The class of transformers that makes such a model of a folder."""
    metrics: ClassVar[tuple[str, ...]]
    """The metrics by which a step can be chosen as the best, by name."""
    trained_beside: ClassVar[tuple[str, ...]] = ()
    """Names of modules that are trained whole beside the adapter, such as a new head."""

    @abstractmethod
    def read(self, config: RunConfig, tokenizer: Any, listener: Listener, max_length: int) -> Inputs:
        """The rows that ``config`` names, in the forms that the task takes, checked, cut and encoded."""

    @abstractmethod
    def collator(self, tokenizer: Any, *, prompts: bool = False) -> Callable[[Sequence[EncodedRow]], dict[str, Tensor]]:
        """What makes a batch of rows; with ``prompts``, of their prompts' tokens too, for a loss that counts them."""

    @abstractmethod
    def head(self, model: Any) -> Head:
        """The model as training and evaluation run it. Made once; adapters may come onto the model later."""

    @abstractmethod
    def loss(
        self, head: Head, batch: Mapping[str, Tensor], *, count: int | Tensor | None = None, prompt_weight: float = 0.0
    ) -> Tensor:
        """The training loss of ``batch``: a sum over what carries loss, divided by ``count`` (None: by its number)."""
