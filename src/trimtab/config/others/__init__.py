"""Configurations of other tools, read as one of ours. One file is one tool; a new file in this folder is found by
listing it.

What has the same meaning here is carried over. What has not is said, key by key: nothing is left out without a word.
"""

from __future__ import annotations

from pathlib import Path

from trimtab import listing
from trimtab.config.others._other import Carried, OtherConfig
from trimtab.config.read import config_text
from trimtab.config.yaml_text import parse_json, parse_yaml, show
from trimtab.errors import ConfigError

__all__ = ["Carried", "carry_over", "names"]


def names() -> list[str]:
    """The names of the tools whose files are read, sorted."""
    return listing.names(__path__)


def carry_over(file: Path) -> Carried:
    """What ``file``, a YAML or JSON of another tool, says in our words.

    Raises ConfigError if it is missing, cannot be read, is of none of the tools, or asks for a kind of training that
    there is not here.
    """
    parse = parse_json if file.suffix == ".json" else parse_yaml
    raw = parse(config_text(file), str(file))
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: expected keys and values, got {show(raw)}")
    tools = [listing.class_in(__name__, name, OtherConfig)() for name in names()]  # type: ignore[type-abstract]
    fitting = [tool for tool in tools if tool.knows(raw)]
    if not fitting:
        told = "; ".join(f"{tool.label} (by {tool.known_by})" for tool in tools)
        raise ConfigError(f"{file}: not a file of a tool that is known here: {told}")
    carried = Carried(file, fitting[0].label, {key: value for key, value in raw.items() if value is not None})
    try:
        fitting[0].carry(carried)
        carried.finish()
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError, OSError) as error:
        # A text where the tool has a list, and the like. The tool itself would say no more.
        said = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{file}: a value is not of the kind that {fitting[0].label} has there ({type(error).__name__}: {said}); "
            "check the file with the tool that it is for"
        ) from error
    return carried
