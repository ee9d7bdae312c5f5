"""The methods. One file is one method, and the file's name is the method's name in a configuration.

A method file defines one class derived from ``WeightMethod`` or ``BlockMethod``, and its options, a frozen pydantic
model with documented fields. Putting such a file into this folder is all it takes: the names below are read from the
folder, and so is the contract suite.
"""

from __future__ import annotations

from functools import cache

from trimtab import listing
from trimtab.bases import Kind
from trimtab.errors import PlanError, did_you_mean
from trimtab.methods._method import NO_MEMORY, Method, Options, RateGroup

__all__ = ["NO_MEMORY", "Method", "Options", "RateGroup", "method_class", "names", "options_class"]


@cache
def names(sits_on: Kind | None = None) -> list[str]:
    """The names of all methods, sorted; or of those that sit on one kind of base."""
    return [name for name in listing.names(__path__) if sits_on is None or method_class(name).sits_on == sits_on]


@cache
def method_class(name: str) -> type[Method]:
    """The module class of the method called ``name``. Raises PlanError for an unknown name."""
    if name not in names():
        raise PlanError(f"unknown method '{name}': expected one of {', '.join(names())}.{did_you_mean(name, names())}")
    return listing.class_in(__name__, name, Method)


def options_class(name: str) -> type[Options]:
    """The options of the method called ``name``. Raises PlanError for an unknown name."""
    return method_class(name).options_type
