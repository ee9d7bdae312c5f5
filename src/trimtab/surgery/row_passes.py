"""Passes of a model over the rows that a user gives: what its layers are fed, and what two states of it answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.bases import WeightBase, second_moments
from trimtab.errors import SurgeryError
from trimtab.ops.truncation import Moments
from trimtab.surgery.conversion_report import OutputError


class Rows:
    """The inputs of a model that a user gives, each the arguments of one call: a mapping (a tokenizer's batch), a
    tensor, or a tuple of tensors. Where there is an ``attention_mask [batch, length]``, padding counts nowhere.

    Raises SurgeryError if there are none, or if one is nothing of the kind.
    """

    def __init__(self, model: nn.Module, rows: Iterable[Any]) -> None:
        if isinstance(rows, (str, bytes, Mapping, Tensor)) or not isinstance(rows, Iterable):
            raise SurgeryError(
                f"rows: expected an iterable of model inputs (such as a list of tokenizer outputs), got "
                f"{type(rows).__name__}"
            )
        self._model, self._rows = model, [_checked(number, row) for number, row in enumerate(rows, 1)]
        if not self._rows:
            raise SurgeryError("rows: there are none; give at least one input of the model, or leave rows out")

    def outputs(self) -> Iterator[tuple[Tensor | None, Callable[[], Any]]]:
        """For each row its mask, and the pass over it."""
        parameter = next((one for one in self._model.parameters() if not one.is_meta), None)
        place = torch.device("cpu") if parameter is None else parameter.device
        for number, (args, kwargs) in enumerate(self._rows, 1):
            mask = kwargs.get("attention_mask")
            moved = tuple(_moved(one, place) for one in args), {key: _moved(one, place) for key, one in kwargs.items()}
            yield mask if isinstance(mask, Tensor) and mask.dim() == 2 else None, self._pass(number, *moved)

    def _pass(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any]:
        def run() -> Any:
            try:
                with torch.compiler.set_stance("force_eager"):  # compiled programs pass by hooks and new modules
                    return self._model(*args, **kwargs)
            except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
                raise SurgeryError(
                    f"rows: the model does not take row {number}: {error}. Nothing was changed"
                ) from error

        return run

    def moments(self, fed: Sequence[tuple[nn.Module, WeightBase]]) -> dict[int, Moments]:
        """By the id of each module in ``fed``: the second moments of what the rows feed to it, the weight of its
        handle. What no row reaches, and whose inputs are not known, has none."""
        gathered: dict[int, tuple[Tensor, int]] = {}
        last: list[Any] = [None, None]  # an input, which several layers read one after the other, and its moments
        mask: Tensor | None = None

        def watch(key: int, base: WeightBase) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                (x,) = args or kwargs.values()
                if last[0] is not x or not base.through.reads_features:
                    last[:] = x, second_moments(base, x, mask)
                if last[1] is not None:
                    total, count = gathered.get(key, (0, 0))
                    gathered[key] = total + last[1][0], count + last[1][1]

            return hook

        hooks = [module.register_forward_pre_hook(watch(id(module), base), with_kwargs=True) for module, base in fed]
        try:
            for mask, run in self.outputs():  # noqa: B007 -- the hooks read it
                run()
                last[:] = None, None
        finally:
            for hook in hooks:
                hook.remove()
        found = {key: Moments(total / max(count, 1), count) for key, (total, count) in gathered.items() if count}
        for module, _ in fed:
            if id(module) in found and not found[id(module)].mean.isfinite().all():
                raise SurgeryError(
                    f"rows: what they feed to a {type(module).__name__} of the model is not finite. Nothing was changed"
                )
        return found

    def compare(self, other: Callable[[], AbstractContextManager[object]]) -> OutputError:
        """The outputs of the model as it is against those inside the context ``other()``."""
        kl, same, apart, size, count, classes = 0.0, 0, 0.0, 0.0, 0, 2
        for mask, run in self.outputs():
            before = _vectors(run(), mask)
            with other():
                after = _vectors(run(), mask)
            count, classes = count + len(before), min(classes, before.shape[-1])
            apart += float((after - before).square().sum())
            size += float(before.square().sum())
            same += int((before.argmax(-1) == after.argmax(-1)).sum())
            said = before.log_softmax(-1)
            kl += float((said.exp() * (said - after.log_softmax(-1))).sum())
        difference = math.sqrt(apart / size) if size > 0 else math.sqrt(apart)
        if not count or classes < 2:
            return OutputError(None, None, difference, count)
        return OutputError(max(0.0, kl / count), same / count, difference, count)


def _checked(number: int, row: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A row as arguments of the model."""
    if isinstance(row, Mapping):
        return (), {str(key): value for key, value in row.items()}
    if isinstance(row, Tensor):
        return (row,), {}
    if isinstance(row, tuple | list) and row and all(isinstance(one, Tensor) for one in row):
        return tuple(row), {}
    raise SurgeryError(
        f"rows: row {number} is a {type(row).__name__}; expected the model's inputs: a mapping such as a tokenizer's "
        "batch (return_tensors='pt'), a tensor, or a tuple of tensors"
    )


def _moved(value: Any, place: torch.device) -> Any:
    return value.to(place) if isinstance(value, Tensor) else value


def _vectors(output: Any, mask: Tensor | None) -> Tensor:
    """The output vectors ``[count, classes]`` in float64, without those of padding."""
    found = getattr(output, "logits", output)
    while not isinstance(found, Tensor):
        inner = list(found.values()) if isinstance(found, Mapping) else list(found) if isinstance(found, tuple) else []
        inner = [one for one in inner if isinstance(one, Tensor | tuple)]
        if not inner:
            raise SurgeryError(f"rows: the model answers with a {type(output).__name__}, in which no tensor was found")
        found = inner[0]
    if mask is not None and found.dim() == 3 and found.shape[:2] == mask.shape:
        return found[mask.to(found.device, torch.bool)].double()
    return found.double().reshape(-1, found.shape[-1]) if found.dim() else found.double().reshape(1, 1)
