"""The average of the adapter over the last part of training (stochastic weight averaging, arXiv 1803.05407).

The steps near the end wander about a good place; their mean lies nearer to it than the last of them. It costs one
copy of the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trimtab.files import write_atomically
from trimtab.surgery.attach import trainable_parameters

FILE = "average.safetensors"


class Averaging(TrainerCallback):
    """Keeps the mean of the trained tensors over the last ``fraction`` of all steps; with 0 it does nothing."""

    def __init__(self, model: nn.Module, fraction: float) -> None:
        self._parameters = trainable_parameters(model)
        self._fraction = fraction
        self._means: dict[str, torch.Tensor] = {}
        self._count = 0

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self._fraction or state.global_step <= round((1 - self._fraction) * state.max_steps):
            return
        if not self._count:
            self._means = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._count += 1
        means = [self._means[name] for name in self._parameters]
        torch._foreach_lerp_(means, list(self._parameters.values()), 1 / self._count)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While open, the model carries the mean (if there is one yet) in place of its latest values."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def keep(self) -> None:
        """Leave the mean on the model for good."""
        self._swap()
        self._means, self._count = {}, 0

    @torch.no_grad()
    def _swap(self) -> None:
        for name, mean in self._means.items():
            latest = self._parameters[name].detach().clone()
            self._parameters[name].copy_(mean)
            mean.copy_(latest)

    def save(self, folder: Path) -> None:
        """Write the mean into a checkpoint."""
        if self._count:
            metadata = {"count": str(self._count)}
            write_atomically(folder / FILE, lambda path: save_file(self._means, path, metadata=metadata))

    def load(self, folder: Path) -> None:
        """Take the mean of a checkpoint, if it has one."""
        if (folder / FILE).is_file():
            with safe_open(folder / FILE, framework="pt") as stored:
                self._count = int(stored.metadata()["count"])
                self._means = {
                    name: stored.get_tensor(name).to(parameter.device) for name, parameter in self._parameters.items()
                }
