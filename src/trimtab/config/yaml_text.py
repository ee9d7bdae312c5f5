"""YAML text, read strictly and written so that it reads back equal.

PyYAML follows YAML 1.1, in which ``1e-5`` is text, ``010`` is eight, ``1:30`` is ninety and ``2026-11-30`` a date, and
it lets the second of two equal keys win in silence. Such things have spoiled training runs, so here ``1e-5`` is a
number, the other three are texts, and a repeated key is an error with its line. A text that would take
hours or all memory (nested aliases, depth, long numbers) is an error, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from trimtab.errors import ConfigError
from trimtab.reading import BoundsError, once, within

LONGEST, MOST_VALUES, DEEPEST = 2**21, 50_000, 100
"""Letters of a text, values in it with its aliases written out, and how deep they may be nested."""

_SECONDS = 60.0
_LARGEST = 2**64
_UNUSABLE = re.compile("[\0\ud800-\udfff]")  # in no name of a file, and in no text that is written
_MERGE = "tag:yaml.org,2002:merge"
_FLOAT = "tag:yaml.org,2002:float"
_INTEGER = "tag:yaml.org,2002:int"
_DATE = "tag:yaml.org,2002:timestamp"
_WHOLE = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)\Z")
_EXPONENT = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+\Z")


class _Loader(yaml.SafeLoader):
    """Whatever a text says, it is read in bounded time: anchors are counted out before a value is made of them."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        self._values += 1
        if self._depth > DEEPEST:
            raise _problem(f"nested more than {DEEPEST} deep", self.line_mark())
        if self._values > MOST_VALUES:
            raise _problem(f"more than {MOST_VALUES:,} values", self.line_mark())
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def line_mark(self) -> yaml.Mark:
        """Where the reader is."""
        mark: yaml.Mark = self.get_mark()
        return mark

    def construct_document(self, node: yaml.Node) -> Any:
        _measure(node, {})
        return super().construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                # By value, too: yes and true are one key, and so are 1 and 0x1.
                value = key.value if key.tag == _MERGE else self.construct_object(key)
                if value in seen:
                    raise _problem(f"the key '{key.value}' appears twice", key.start_mark)
                seen.add(value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except ValueError as error:  # an impossible date such as 2024-13-45
            raise _problem(str(error), node.start_mark) from None
        except (LookupError, TypeError, AttributeError, OverflowError):
            kind = node.tag.rpartition(":")[2]
            raise _problem(f"{show(node.value)} cannot be read as !!{kind}", node.start_mark) from None

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and (unusable := _UNUSABLE.search(value)):
            raise _problem(f"a text with the character {unusable[0]!a}", node.start_mark)
        return value

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = 2 * _LARGEST if len(node.value) > 100 else super().construct_yaml_int(node)
        if abs(value) > _LARGEST:
            raise _problem(f"{show(node.value)} is too large a number", node.start_mark)
        return int(value)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _problem(said: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, said, mark)


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Of how many values ``node`` comes to, and how deep they are nested, each alias written out. Raises if that is too
    much, or without end; ``known``: what is measured, and None for what is being measured."""
    if isinstance(node, yaml.ScalarNode):
        return 1, 1
    if id(node) not in known:
        known[id(node)] = None
        parts = node.value if isinstance(node, yaml.SequenceNode) else [one for pair in node.value for one in pair]
        sizes = [_measure(part, known) for part in parts]
        known[id(node)] = 1 + sum(count for count, _ in sizes), 1 + max((deep for _, deep in sizes), default=0)
    measured = known[id(node)]
    if measured is None:
        raise _problem("an alias stands within what it stands for, so there is no end", node.start_mark)
    if measured[0] > MOST_VALUES:
        raise _problem(f"with its aliases written out, more than {MOST_VALUES:,} values", node.start_mark)
    if measured[1] > DEEPEST:
        raise _problem(f"nested more than {DEEPEST} deep", node.start_mark)
    return measured


class _Dumper(yaml.SafeDumper):
    """Knows the same numbers as the loader, so that the text ``"1e-5"`` is written with its quotes."""


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in known if tag not in (_INTEGER, _DATE)]
    for letter, known in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INTEGER, _WHOLE, list("-+0123456789"))
_Loader.add_implicit_resolver(_FLOAT, _EXPONENT, list("-+.0123456789"))
_Dumper.add_implicit_resolver(_FLOAT, _EXPONENT, list("-+.0123456789"))


def parse_yaml(text: str, place: str) -> Any:
    """The value of one YAML document; ``place`` says in errors where the text came from.

    Raises:
        ConfigError: the text is not YAML, or a mapping repeats a key; names the line.
    """
    try:
        with _bounded(text):
            return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        hint = (
            ' A text that starts with * needs quotes: "*.q_proj".' if "scanning an alias" in str(error.context) else ""
        )
        raise ConfigError(f"{place}{line}: {error.problem or error}.{hint}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: {error}") from error


def parse_json(text: str, place: str) -> Any:
    """The value of a JSON text, within the bounds of ``parse_yaml``. Raises ConfigError."""
    try:
        with _bounded(text):
            value = json.loads(text, object_pairs_hook=once)
            _measure_value(value, 0)
            return value
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: {error}") from None


def _measure_value(value: Any, depth: int) -> None:
    if depth > DEEPEST:
        raise ValueError(f"nested more than {DEEPEST} deep")
    if isinstance(value, str) and (unusable := _UNUSABLE.search(value)):
        raise ValueError(f"a text with the character {unusable[0]!a}")
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise ValueError("too large a number")
    if isinstance(value, dict | list):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            _measure_value(part, depth + 1)


@contextmanager
def _bounded(text: str) -> Iterator[None]:
    if len(text) > LONGEST:
        raise BoundsError(f"a text of {len(text):,} letters; a configuration has at most {LONGEST:,}")
    with within("reading it", seconds=_SECONDS):
        yield


def write_yaml(value: Any) -> str:
    """``value`` as YAML text, keys in their own order; ``parse_yaml`` gives the same value back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def show(value: object) -> str:
    """``value`` as the writer of the YAML would know it, in at most sixty characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except TypeError:  # keys such as dates
        text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
