"""YAML text, read strictly and written so that it reads back equal.

PyYAML follows YAML 1.1, in which ``1e-5`` is text, and it lets the second of two equal keys win in silence. Both have
spoiled training runs, so here ``1e-5`` is a number and a repeated key is an error with its line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from typing import Any

import yaml

from trimtab.errors import ConfigError

_FLOAT = "tag:yaml.org,2002:float"
_EXPONENT = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+\Z")


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key '{key.value}' appears twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Knows the same numbers as the loader, so that the text ``"1e-5"`` is written with its quotes."""


_Loader.add_implicit_resolver(_FLOAT, _EXPONENT, list("-+.0123456789"))
_Dumper.add_implicit_resolver(_FLOAT, _EXPONENT, list("-+.0123456789"))


def parse_yaml(text: str, place: str) -> Any:
    """The value of one YAML document; ``place`` says in errors where the text came from.

    Raises:
        ConfigError: the text is not YAML, or a mapping repeats a key; names the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        hint = ' A text that starts with * needs quotes: "*.q_proj".' if "alias" in str(error) else ""
        raise ConfigError(f"{place}{line}: {error.problem or error}.{hint}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date such as 2024-13-45
        raise ConfigError(f"{place}: {error}") from error


def write_yaml(value: Any) -> str:
    """``value`` as YAML text, keys in their own order; ``parse_yaml`` gives the same value back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def show(value: object) -> str:
    """``value`` as the writer of the YAML would know it, in at most sixty characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
