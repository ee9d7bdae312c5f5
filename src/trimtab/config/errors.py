"""Pydantic's problems with a configuration, as sentences for the person who wrote it."""

from __future__ import annotations

import re
from typing import Any, get_args

from pydantic import BaseModel

from trimtab.config.yaml_text import show
from trimtab.errors import did_you_mean

_EXPECTED = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "string_too_short": "text",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "literal_error": "{expected}",
    "greater_than": "more than {gt:.12g}",
    "greater_than_equal": "at least {ge:.12g}",
    "less_than": "less than {lt:.12g}",
    "less_than_equal": "at most {le:.12g}",
}


def explain(schema: type[BaseModel], keys: tuple[str, ...], problem: Any) -> str:
    """One pydantic problem as a sentence: the key, what was expected, what came."""
    kind, context, value = problem["type"], problem.get("ctx", {}), problem["input"]
    message: str = problem["msg"].removeprefix("Value error, ")
    if not keys:  # a condition over several keys, which names them itself
        return message
    dotted = ".".join(keys)
    if kind == "extra_forbidden":
        return f"{dotted}: unknown key.{_suggest(schema, keys)}"
    if kind == "missing":
        return f"{dotted}: missing. {_described(schema, keys)}".rstrip()
    if kind in _EXPECTED:
        message = "expected " + _EXPECTED[kind].format(**context)
    if not message.startswith("expected"):
        # A validator that looks into a value names the place in it, such as ".0.weight: expected ...".
        return f"{dotted}{message}" if message.startswith(".") else f"{dotted}: {message}"
    hint = ""
    if kind == "literal_error":
        hint = did_you_mean(str(value), re.findall(r"'([^']+)'", context["expected"]))
    elif kind == "string_type" and not isinstance(value, list | dict | None):
        hint = " To mean it as text, put it in quotes."
    return f"{dotted}: {message}, got {show(value)}.{hint}"


def _described(schema: type[BaseModel], keys: tuple[str, ...]) -> str:
    field = _section(schema, keys[:-1]).model_fields.get(keys[-1])
    return field.description or "" if field is not None else ""


def _section(schema: type[BaseModel], keys: tuple[str, ...]) -> type[BaseModel]:
    """The section that ``keys`` lead to; the name of an entry in a mapping of sections is passed over."""
    for key in keys:
        field = schema.model_fields.get(key)
        schema = (field is not None and _model(field.annotation)) or schema
    return schema


def _model(annotation: Any) -> type[BaseModel] | None:
    """The model of a field, also of one that may be null; None for a plain value."""
    models = (kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type))
    return next((kind for kind in models if issubclass(kind, BaseModel)), None)


def _sections(schema: type[BaseModel], place: str = "") -> dict[str, list[str]]:
    """Dotted name of each section ("" for the whole) -> its keys."""
    sections = {place: list(schema.model_fields)}
    for name, field in schema.model_fields.items():
        if (model := _model(field.annotation)) is not None:
            sections |= _sections(model, f"{place}.{name}".lstrip("."))
    return sections


def _suggest(schema: type[BaseModel], keys: tuple[str, ...]) -> str:
    """The nearest known key: in the same section, or the same name in another."""
    sections, name = _sections(schema), keys[-1]
    here = ".".join(keys[:-1])
    elsewhere = [f"{section}.{name}".lstrip(".") for section, known in sections.items() if name in known]
    if elsewhere:
        return f" Did you mean '{elsewhere[0]}'?"
    known = sections.get(here, [])
    return did_you_mean(name, known) or (f" Known here: {', '.join(known)}." if known else "")
