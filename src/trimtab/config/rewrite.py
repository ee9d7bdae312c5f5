"""Writes other settings into the text of a run's YAML, whose comments and order stay."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trimtab.config.read import config_text, load_config, parse_override, to_yaml
from trimtab.config.yaml_text import parse_yaml, write_yaml
from trimtab.errors import ConfigError


def with_settings(file: Path, settings: Sequence[str], *, beside: Path) -> str:
    """The text of ``file`` with each ``key.sub=value``, for a file ``beside``, which may lie in another folder.

    Where a setting stands on a line of its own, or its section does, that line alone is changed. Where it cannot be
    found so, or paths could change with the folder, the whole configuration is written anew, without comments.
    """
    wanted = load_config(file, settings)
    said = [parse_override(setting) for setting in settings]
    if file.resolve().parent == beside.resolve().parent and all(keys[0] == "train" for keys, _ in said):
        text = config_text(file)
        for keys, value in said:
            text = _set_line(text, keys, value)
        with suppress(ConfigError):
            found = parse_yaml(text, str(file))
            if all(_at(found, keys) == value for keys, value in said):
                return text
    return to_yaml(wanted, beside.resolve().parent)


def _set_line(text: str, keys: Sequence[str], value: Any) -> str:
    """``text`` with the value of a setting in a block section replaced, or put in as the section's first line."""
    if len(keys) != 2:
        return text
    section, key = map(re.escape, keys)
    shown = write_yaml({"value": value}).split(":", 1)[1].strip()
    found = re.search(rf"(?m)^{section}:[ \t]*(#.*)?\n((?:[ \t]+.*\n|[ \t]*\n|[ \t]*#.*\n)*)", f"{text}\n")
    if found is None:
        if re.search(rf"(?m)^{section}:", text):  # in one line, or a text of its own
            return re.sub(rf"(?m)^({section}:.*?\b{key}:[ \t]*)[^,}}\s]+", rf"\g<1>{shown}", text, count=1)
        return f"{text.rstrip()}\n{keys[0]}:\n  {keys[1]}: {shown}\n"
    block, start = found[2], found.start(2)
    line = re.search(rf"(?m)^([ \t]+){key}:[ \t]*([^#\n]*?)([ \t]*#.*)?$", block)
    if line is None:
        first = re.search(r"(?m)^([ \t]+)\S", block)
        indent = first[1] if first else "  "
        return f"{text[:start]}{indent}{keys[1]}: {shown}\n{text[start:]}"
    return text[: start + line.start(2)] + shown + text[start + line.end(2) :]


def _at(said: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        said = said.get(key) if isinstance(said, dict) else None
    return said
