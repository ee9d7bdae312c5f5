"""What is looked at in a model's folder before transformers reads it, since a model may come from anybody.

transformers would build a million layers where ``config.json`` says so, open a file outside of the folder, wait for a
pipe, and hand a text to a tokenizer that makes a thousand million letters of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from trimtab.errors import ModelError
from trimtab.reading import MIB, check_files, check_safetensors, once, read_text

# By the name of a setting, wherever it stands in config.json: the least and the most that it may be.
_LIMITS = [
    (re.compile(r"num_hidden_layers|num_layers|n_layers?"), 1, 10_000),
    (re.compile(r"(num|n)_\w*(layers?|heads?|experts?|blocks?)"), 0, 10_000),
    (re.compile(r"hidden_size|d_model|n_embd|intermediate_size|vocab_size"), 1, 2**40),
    (re.compile(r"num_labels"), 0, 1_000_000),
]
_MOST_GROWTH = 10_000  # letters that a tokenizer's replacements may make of one
_MOST_TOKENIZER = 512 * MIB


def check_config(folder: Path) -> None:
    """Raise ModelError if something in ``folder`` is no file, or if its ``config.json`` is not JSON or has numbers that
    no model has."""
    _check_files(folder)
    if not (folder / "config.json").exists():
        return  # a tokenizer by itself
    check_settings(_json(folder / "config.json"), folder / "config.json")


def check_settings(settings: dict[str, Any], place: Path) -> None:
    """Raise ModelError if a model's settings, from the file ``place``, have numbers that no model has."""
    for name, value in _settings(settings):
        if value != value:
            raise ModelError(f"{place}: '{name}' is not a number (NaN)")
        limits = next(((least, most) for pattern, least, most in _LIMITS if pattern.fullmatch(name)), None)
        if limits is not None and isinstance(value, (int, float)) and not limits[0] <= value <= limits[1]:
            raise ModelError(f"{place}: '{name}' is {str(value)[:30]}; expected {limits[0]} to {limits[1]:,}")


def check_weights(folder: Path, *, all_are_here: bool) -> None:
    """Raise ModelError if a file of the weights is no file, holds a tensor twice, or lies outside of ``folder``; where
    ``all_are_here``, also if there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if all_are_here and not files:
        if pickled := sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]):
            raise ModelError(
                f"{folder}: its weights are pickled ({pickled[0].name}), and unpickling can run any code, so only "
                f"*.safetensors are read. If you trust the file, convert it once with transformers: "
                f"AutoModelForCausalLM.from_pretrained(FOLDER, use_safetensors=False).save_pretrained(NEW_FOLDER)"
            )
        raise ModelError(f"{folder}: a configuration without weights: expected *.safetensors beside config.json.")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        parts = _json(index).get("weight_map")
        for part in set(map(str, parts.values())) if isinstance(parts, dict) else ():
            if PurePosixPath(part).is_absolute() or ".." in Path(part).parts or "\\" in part or "\0" in part:
                raise ModelError(f"{index}: names a file outside of its folder: '{part[:200]}'")
    for file in files:
        try:
            check_safetensors(file)
        except (OSError, ValueError) as error:
            raise ModelError(f"{file}: a damaged safetensors file ({_said(error)})") from error


def check_tokenizer(folder: Path) -> None:
    """Raise ModelError as ``check_config`` does, or if the tokenizer makes long texts of short ones."""
    check_config(folder)  # which is read for a tokenizer, too
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    growth = _growth(_json(file, _MOST_TOKENIZER).get("normalizer"))
    if growth > _MOST_GROWTH:
        raise ModelError(f"{file}: its normalizer makes more than {_MOST_GROWTH:,} letters of one")


def _check_files(folder: Path) -> None:
    try:
        check_files(folder)
    except OSError as error:
        raise ModelError(f"{error.filename}: {error.strerror}") from error


def _json(file: Path, most: int = 64 * MIB) -> dict[str, Any]:
    try:
        value = json.loads(read_text(file, most), object_pairs_hook=once)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read as JSON ({_said(error)})") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file}: expected an object, got {type(value).__name__}")
    return value


def _said(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error))[:300]


def _settings(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value with the name that it stands under."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _settings(one, str(key))
    elif isinstance(value, list):
        for one in value:
            yield from _settings(one, name)
    else:
        yield name, value


def _growth(normalizer: Any) -> float:
    """Of how many letters, at most, one letter is replaced by a normalizer and those within it."""
    if not isinstance(normalizer, dict):
        return 1.0
    growth = 1.0
    parts = normalizer.get("normalizers")
    for part in parts if isinstance(parts, list) else ():
        growth = min(growth * _growth(part), 1e30)
    content, pattern = normalizer.get("content"), normalizer.get("pattern")
    if isinstance(content, str):
        text = pattern.get("String") if isinstance(pattern, dict) else None
        # A regular expression, and an empty text, can match nothing, before and after each letter.
        longest = len(content) / len(text) if isinstance(text, str) and text else 1.0 + len(content)
        growth *= max(1.0, longest)
    return growth
