"""Methods put around those of another library's class."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any


def wrap_methods(kind: Any, wrappers: Mapping[str, Callable[..., Any]], *, mark: str) -> None:
    """Put around each method of the class ``kind`` what its wrapper makes of it, unless it bears the attribute
    ``mark``, which the wrapped one gets: a subclass inherits what is marked."""
    for name, wrapper in wrappers.items():
        method = getattr(kind, name)
        if not hasattr(method, mark):
            wrapped = functools.wraps(method)(wrapper(method))
            setattr(wrapped, mark, method)
            setattr(kind, name, wrapped)
