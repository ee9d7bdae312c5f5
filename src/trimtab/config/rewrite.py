"""Writes other settings into the text of a run's YAML, whose comments and order stay."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from trimtab.config.read import config_text, load_config, parse_override, set_dotted, to_yaml
from trimtab.config.yaml_text import parse_yaml, write_yaml
from trimtab.errors import ConfigError
from trimtab.reading import read_bytes

_WITH_PATHS = ("model", "data", "adapter", "output")
"""Sections in which a path of the command line is not one of the file: they start from different folders."""


def with_settings(file: Path, settings: Sequence[str], *, beside: Path) -> str:
    """The text of ``file`` with each ``key.sub=value``, for a file ``beside``, which may lie in another folder.

    Where `edited` gives none, or paths could change with the folder, the whole configuration is written anew, without
    comments.
    """
    wanted = load_config(file, settings)
    same = file.resolve().parent == beside.resolve().parent
    text = edited(file, settings) if same else None
    return to_yaml(wanted, beside.resolve().parent) if text is None else text


def edited(file: Path, settings: Sequence[str]) -> str | None:
    """The text of ``file`` in which each ``key.sub=value`` is put in its place, and nothing else is another. None where
    there is no such place, as where a value is an alias."""
    said = [parse_override(setting) for setting in settings]
    if any(keys[0] in _WITH_PATHS for keys, _ in said):
        return None
    text = config_text(file)
    wanted = parse_yaml(text, str(file))
    with suppress(ConfigError, yaml.YAMLError):
        for keys, value in said:
            text = _put(text, keys, value)
            set_dotted(wanted, keys, value)
        if parse_yaml(text, str(file)) == wanted:
            windows = os.linesep == "\n" and b"\r\n" in read_bytes(file)
            return text.replace("\n", "\r\n") if windows else text
    return None


def _put(text: str, keys: Sequence[str], value: Any) -> str:
    """``text`` with ``value`` in place of what ``keys`` lead to, or put in where it was not said."""
    node: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    line = 0
    for depth, key in enumerate(keys):
        if isinstance(node, yaml.SequenceNode) and key.isdecimal() and int(key) < len(node.value):
            node = node.value[int(key)]
            line = node.start_mark.line + 1
            continue
        entries = node.value if isinstance(node, yaml.MappingNode) else []
        entry = next(((name, held) for name, held in entries if name.value == key), None)
        if entry is None:
            return _put_in(text, node, line, keys[depth:], value)
        line, node = entry[0].end_mark.line + 1, entry[1]
    start, end = node.start_mark.index, node.end_mark.index
    return text[:start] + " " * (text[start - 1] == ":") + _shown(value) + text[end:]


def _put_in(text: str, node: Any, line: int, keys: Sequence[str], value: Any) -> str:
    """``text`` with a new entry in the mapping ``node``, whose own key stands on the line before ``line``."""
    start, end = node.start_mark.index, node.end_mark.index
    for key in reversed(keys[1:]):
        value = {key: value}
    entry = f"{keys[0]}: {_shown(value)}"
    if not isinstance(node, yaml.MappingNode):  # an empty section
        return f"{text[:start].rstrip(' ')}\n  {entry}{text[end:]}"
    if node.flow_style:
        start = text.index("{", start) + 1
        return f"{text[:start]}{entry}{', ' if node.value else ''}{text[start:]}"
    if line == 0:  # the file's own mapping: a section at its end
        entry = entry if len(keys) == 1 else f"{keys[0]}:\n  {keys[1]}: {_shown(value[keys[1]])}"
        return f"{text[:end].rstrip()}\n{entry}\n{text[end:]}"
    first = node.value[0][0].start_mark
    lines = text.splitlines(keepends=True)
    return "".join([*lines[:line], f"{' ' * first.column}{entry}\n", *lines[line:]])


def _shown(value: Any) -> str:
    """``value`` as it stands on a line of YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_shown(held)}" for key, held in value.items()) + "}"
    return write_yaml({"value": value}).split(":", 1)[1].strip()
