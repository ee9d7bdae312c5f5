"""Reads the weights of a model folder one tensor at a time, so that no more than one has to be in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from trimtab.errors import ModelError, machine_refusal
from trimtab.reading import check_safetensors, panics


class Weights:
    """The tensors in the ``*.safetensors`` of ``folder``, by name. Reading one maps its file and copies nothing else.

    Raises ModelError if there are none, or if a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with _open(file) as reader:
                self._files |= dict.fromkeys(reader.keys(), file)
        if not self._files:
            raise ModelError(f"{folder}: no weights here; expected *.safetensors.")

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __getitem__(self, name: str) -> Tensor:
        with _open(self._files[name]) as reader:
            tensor: Tensor = reader.get_tensor(name)
            return tensor


@contextmanager
def _open(file: Path) -> Iterator[safe_open]:
    try:
        check_safetensors(file)
        with panics(), safe_open(file, framework="pt") as reader:
            yield reader
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(machine_refusal(error, file) or f"{file}: a damaged file ({error}).") from None
