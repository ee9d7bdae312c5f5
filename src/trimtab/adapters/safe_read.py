"""Reads files that somebody else wrote. One that is damaged, or made to do harm, raises AdapterError.

No file can make this code run anything: descriptions are parsed as JSON, tensors are read from safetensors, and
pickles are never opened.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from trimtab.errors import AdapterError, PlanError, machine_refusal
from trimtab.reading import check_safetensors, once, panics, read_text

_LONGEST_NAME = 512
_LARGEST_INTEGER = 2**53  # JSON guarantees no more, and sizes are multiplied, so they must have a limit
# Integers and flags are what some modules count while they train.
_DTYPES = ("F64", "F32", "BF16", "F16", "I64", "I32", "BOOL")


def read_description(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises AdapterError for everything that ``parse_description`` refuses."""
    try:
        return parse_description(read_text(path))
    except (OSError, ValueError) as error:
        raise AdapterError(machine_refusal(error, path) or f"{path}: not readable as JSON ({error})") from None


def parse_description(text: str) -> dict[str, Any]:
    """Parse ``text`` as a JSON object, strictly.

    Raises ValueError for text that is not JSON, for a value other than an object, for a key that is twice in one object
    (another reader might take the other value), and for NaN, infinity and integers beyond 2**53.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=once, parse_constant=_finite, parse_float=_finite, parse_int=_integer
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


def _integer(text: str) -> int:
    value = int(text) if len(text) < 20 else _LARGEST_INTEGER + 1
    if abs(value) > _LARGEST_INTEGER:
        raise ValueError(f"{text[:20]} is too large a number")
    return value


@contextmanager
def damage_in(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a malformed description raises into an AdapterError, which calls ``path`` a damaged ``what``."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, PlanError) as error:
        text = shown(" ".join(str(error).split()), 400)
        raise AdapterError(f"{path}: a damaged {what} ({type(error).__name__}: {text})") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of a safetensors file. It is opened once, so that both are from the same file.

    Raises AdapterError if it is missing or damaged, or if a tensor is of another dtype than these.
    """
    if not path.is_file():
        raise AdapterError(f"{path}: missing; the adapter is incomplete")
    try:
        check_safetensors(path)
        with panics(), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if len(name) > _LONGEST_NAME:
                    raise AdapterError(f"{path}: a tensor's name is {len(name)} characters long: {shown(name)}")
                if (dtype := file.get_slice(name).get_dtype()) not in _DTYPES:
                    raise AdapterError(f"{path}: {shown(name)} is {dtype}; expected one of {', '.join(_DTYPES)}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(machine_refusal(error, path) or f"{path}: a damaged safetensors file ({error})") from None
    return tensors, header


def shown(name: object, most: int = 120) -> str:
    """A ``name`` from a file for a message, shortened and without control characters."""
    text = str(name)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= most else f"{text[:most]}..."
