"""The keys and values of earlier tokens, by the name that a model has for them: transformers 5.24 calls ``cache`` what
was ``past_key_values`` before, and warns of the older name."""

from __future__ import annotations

from inspect import signature
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

NAMES = ("cache", "past_key_values")


def cache_argument(model: Any) -> str | None:
    """The argument by which ``model`` says that it takes a cache; None where it says so of none."""
    takes = signature(model.forward).parameters
    return next((name for name in NAMES if name in takes), None)


def cache_name(model: Any) -> str:
    """The argument to hand a cache to ``model`` by. A forward of ``**kwargs`` alone gets transformers' own name."""
    return cache_argument(model) or next(name for name in NAMES if hasattr(BaseModelOutputWithPast, name))


def with_cache(model: Any, cache: Any | None) -> dict[str, Any]:
    """The argument that hands ``cache`` to ``model``; nothing for a cache that is None."""
    return {} if cache is None else {cache_name(model): cache}


def cache_of(output: Any) -> Any | None:
    """The cache that a model gave back; None where it gave none."""
    return next((getattr(output, name) for name in NAMES if hasattr(output, name)), None)
