"""What a value of a run's YAML may be where its type alone does not say it.

One function a key: it gives the value, or raises a ``ValueError`` that names what was expected.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from trimtab.config.errors import explain
from trimtab.config.yaml_text import show
from trimtab.data import forms
from trimtab.data.rows import Source
from trimtab.data.sources import name_of
from trimtab.errors import did_you_mean, nearest

A_SOURCE = "{path: rows.jsonl, weight: 2}"

Rate = float | Literal["auto"]
"""A learning rate, or that it is to be found."""


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


ATTENTION = ("auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3")


def attention(value: str) -> str:
    """One of ``ATTENTION``, or a kernel of the hub: ``owner/name``."""
    if value not in ATTENTION and not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", value):
        raise ValueError(
            f"expected one of {', '.join(ATTENTION)}, or a kernel of the hub as owner/name."
            f"{did_you_mean(value, ATTENTION)}"
        )
    return value


def class_weights(value: object) -> object:
    """``balanced``, or a mapping of labels to positive numbers."""
    if value is None or value == "balanced":
        return value
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"expected balanced, null, or a mapping of labels to numbers, got {show(value)}")
    weights = {}
    for label, weight in value.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError(f"expected a positive number for '{label}', got {show(weight)}")
        weights[str(label)] = float(weight)
    return weights


def sources(value: object) -> tuple[Source, ...]:
    """Where rows come from: a path, a mapping of `Source`'s keys, or a list of such."""
    items = value if isinstance(value, list | tuple) else [value]
    if not items:
        raise ValueError("expected a path or a hub id, or a list of them")
    return tuple(_source(item, f".{number}" if items is value else "") for number, item in enumerate(items))


def _source(item: object, place: str) -> Source:
    if isinstance(item, Source):
        return item
    said = {"path": item} if isinstance(item, str) and item else item
    if not isinstance(said, Mapping):
        if not place:
            raise ValueError("expected a path or a hub id, or a list of them")
        raise ValueError(f"{place}: expected a path, a hub id, or a mapping such as {A_SOURCE}, got {show(item)}.")
    if isinstance(said.get("weight"), int) and not isinstance(said["weight"], bool):
        said = {**said, "weight": float(said["weight"])}
    try:
        source = Source.model_validate(said)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(f"{place}.{explain(Source, tuple(map(str, problem['loc'])), problem)}") from None
    if source.form is not None:
        _form(source.form, f"{place}.form")
    return source


def _form(name: str, place: str) -> None:
    if name not in (known := ["auto", *forms.names()]):
        raise ValueError(f"{place}: expected one of {', '.join(known)}, got {show(name)}.{did_you_mean(name, known)}")


def _measured(value: object) -> tuple[Source, ...]:
    """Sources of rows that are measured, each once."""
    found = sources(value)
    if any(source.weight != 1 for source in found):
        raise ValueError("expected no weight: rows that are measured count once each")
    return found


def columns(value: object) -> dict[str, str]:
    if isinstance(value, Mapping) and all(isinstance(part, str) and part for pair in value.items() for part in pair):
        return dict(value)
    raise ValueError("expected a mapping of our keys to columns, such as {prompt: question, completion: answer}")


def tokens(value: object) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if isinstance(items, list | tuple) and all(isinstance(item, str) and item.strip() for item in items):
        if len(set(items)) == len(items):
            return tuple(items)
        raise ValueError("expected each token once")
    raise ValueError('expected a list of tokens, each a text such as "<tool>"')


def validation(value: object) -> float | tuple[Source, ...] | None:
    if value is None:
        return None
    if isinstance(value, float) and 0 < value < 1:
        return value
    if isinstance(value, str | list | tuple | Mapping):
        return _measured(value)
    raise ValueError("expected a fraction between 0 and 1, a path or a hub id, a list of them, or null for none")


def test_sets(value: object) -> dict[str, tuple[Source, ...]]:
    if value is None:
        return {}
    if isinstance(value, str | list | tuple) or (isinstance(value, Mapping) and "path" in value):
        found: dict[str, tuple[Source, ...]] = {}
        for source in _measured(value):
            if (name := name_of(source.path)) in found:
                raise ValueError(f"two test sets would be named '{name}'; name them: {{one: ..., other: ...}}")
            found[name] = (source,)
        return found
    if not isinstance(value, Mapping):
        raise ValueError("expected a path, a list of them, a mapping of names to paths, or null for none")
    for name in value:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(f"expected names made of letters, digits, '.', '_' and '-', not '{name}'")
    return {name: _measured_as(name, said) for name, said in value.items()}


def _measured_as(name: str, said: object) -> tuple[Source, ...]:
    try:
        return _measured(said)
    except ValueError as error:
        nested = str(error)
        raise ValueError(
            f".{name}{nested}" if nested.startswith(".") else f".{name}: {nested}, got {show(said)}."
        ) from None


def choices(value: object) -> Literal["auto"] | tuple[str, ...] | None:
    if value is None or value == "auto":
        return value
    if isinstance(value, list | tuple) and all(isinstance(item, str) and item.strip() for item in value):
        if len(value) > 1 and len(set(value)) == len(value):
            return tuple(value)
        raise ValueError("expected two or more different answers")
    hint = ' (YAML reads yes, no and 1 as other than text: write "yes", "no", "1")' if isinstance(value, list) else ""
    raise ValueError(f"expected auto, null, or a list of answers, each a text{hint}")


def learning_rate(value: object) -> Rate:
    if value == "auto" or (isinstance(value, float | int) and not isinstance(value, bool) and 0 < value < math.inf):
        return value if value == "auto" else float(value)
    raise ValueError("expected a number above 0, such as 5e-4, or auto")


def warmup(value: object) -> float | int:
    if (isinstance(value, float) and 0 <= value < 1) or (value == 0 and value is not False) or _is_count(value):
        return value  # type: ignore[return-value]
    raise ValueError("expected a fraction of all steps below 1, or a whole number of steps")


def validate_every(value: object) -> Literal["epoch"] | int | float:
    if value == "epoch" or (isinstance(value, float) and 0 < value < 1) or _is_count(value):
        return value  # type: ignore[return-value]
    raise ValueError("expected epoch, a whole number of steps, or a fraction of all steps below 1")


def save_every(value: object) -> Literal["epoch"] | int:
    if value == "epoch" or _is_count(value):
        return value  # type: ignore[return-value]
    raise ValueError("expected epoch, or a whole number of steps")


def max_length(value: object) -> Literal["auto"] | int:
    if value == "auto" or (_is_count(value) and value != 1):
        return value  # type: ignore[return-value]
    raise ValueError("expected auto, or a whole number of tokens from 2 on")


def rule(value: dict[str, Any]) -> dict[str, Any]:
    for key in ("match", "method"):
        if key not in value:
            close = nearest(key, [other for other in value if other not in ("match", "layers", "method")], count=1)
            raise ValueError(f"the rule has no '{key}'" + (f" (is '{close[0]}' a slip?)" if close else ""))
    match = value["match"]
    patterns = match if isinstance(match, list | tuple) else [match]
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ValueError(f"'match' is expected to be a pattern of module names or a list of them, got {show(match)}")
    if not isinstance(value["method"], str):
        raise ValueError(f"'method' is expected to be the name of a method, got {show(value['method'])}")
    return value


def one_of(known: Callable[[], Sequence[str]]) -> Callable[[str], str]:
    """A validator of names that are only known when a folder is listed; its error is that of a ``Literal``."""

    def check(name: str) -> str:
        names = known()
        if name not in names:
            quoted = [f"'{other}'" for other in names]
            expected = f"{', '.join(quoted[:-1])} or {quoted[-1]}"
            raise PydanticCustomError("literal_error", "expected {expected}", {"expected": expected})
        return name

    return check


def quantisation(name: str) -> str:
    if name == "none":  # without a look at the kinds there are, which takes torch
        return name

    def known() -> list[str]:
        from trimtab import bases

        return ["none", *bases.quantised_names()]

    return one_of(known)(name)


def rules(value: object) -> object:
    if value is None:  # only beside an adapter, which has a plan of its own
        return None
    if isinstance(value, list | tuple) and value:
        return tuple(value)
    raise ValueError("expected a list of rules")


def named(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


def path(value: object) -> Path:
    if isinstance(value, str | Path) and str(value):
        return Path(value)
    raise ValueError("expected a path")


TRACKERS = (
    *("azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "kubeflow", "mlflow", "neptune"),
    *("swanlab", "tensorboard", "trackio", "wandb"),
)
"""As transformers names them, which is not asked here: it takes seconds to import."""


def trackers(value: object) -> tuple[str, ...]:
    items = [] if value in (None, "none") else [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise ValueError("expected the name of a tracker, a list of them, or none")
    for name in items:
        if name not in TRACKERS:
            raise ValueError(f"expected one of {', '.join(TRACKERS)}; got '{name}'.{did_you_mean(name, TRACKERS)}")
    return tuple(dict.fromkeys(items))
