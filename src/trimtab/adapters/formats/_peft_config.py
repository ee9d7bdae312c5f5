"""The method and the options of each module from a PEFT configuration, with its patterns over names."""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import regex
from torch import Tensor

from trimtab import methods
from trimtab.adapters.formats._peft_names import parameters, target_of
from trimtab.adapters.record import B_BIAS
from trimtab.adapters.safe_read import shown
from trimtab.errors import TrimtabWarning

# A pattern can be made to take hours. Honest ones are short, and all of a configuration take next to no time.
_SECONDS_FOR_PATTERNS = 10.0
_LONGEST_PATTERN = 1000
# A part that is repeated n times is compiled n times, and repeats of repeats multiply.
_LONGEST_WRITTEN_OUT = 100_000
_REPEAT = re.compile(r"\{(\d*)(?:,(\d*))?\}")


def options(config: dict[str, Any], modules: dict[str, dict[str, Tensor]]) -> dict[str, tuple[str, methods.Options]]:
    """``place -> (method, options)`` from PEFT's configuration and the tensors at each place.

    Raises KeyError, TypeError and ValueError (with pydantic's) for a configuration that is damaged.
    """
    method = "dora" if config.get("use_dora") else "lora"
    rank, ranks = config["r"], values(config.get("rank_pattern") or {})
    alpha, alphas = config["lora_alpha"], values(config.get("alpha_pattern") or {})
    common: dict[str, Any] = {
        "rank_stabilised": bool(config.get("use_rslora")),
        "dropout": float(config.get("lora_dropout") or 0.0),
    }
    kind = methods.options_class(method)
    found = {}
    undecided: dict[str, list[Any]] = {}
    for place, own in modules.items():
        name = target_of(place)
        said = list(alphas(name)) or [alpha]
        if any(one != said[0] for one in said):
            undecided[name] = said
        numbers: dict[str, Any] = {
            "rank": _rank(list(ranks(name)), rank, own.get("A")),
            "alpha": said[0],
            "bias": B_BIAS in own or "bias" in own,
        }
        numbers |= {"added_bias": True} if B_BIAS in own else {}
        found[place] = method, kind(**numbers, **common)
    if undecided:
        name, said = next(iter(undecided.items()))
        warnings.warn(
            f"alpha_pattern has several values for {len(undecided)} modules, such as {shown(said)} for {shown(name)}. "
            f"As in PEFT, the first is taken, {shown(said[0])}; but PEFT sorts patterns when it saves them, so that "
            "the adapter may have been trained with another. A pattern for each module says it for certain",
            TrimtabWarning,
            stacklevel=2,
        )
    return found


def options_on_parameters(
    config: dict[str, Any], places: Iterable[str]
) -> dict[str, dict[str, tuple[str, methods.Options]]]:
    """``place -> parameter -> (method, options)`` for the parameters that ``target_parameters`` may mean there. PEFT's
    patterns match the names of parameters then. Raises what ``options`` does."""
    targets = [str(target) for target in list[Any](config.get("target_parameters") or [])]
    names = {place: parameters(place, targets) for place in places}
    found = options(config, {full: {} for own in names.values() for full in own.values()})
    return {place: {parameter: found[full] for parameter, full in own.items()} for place, own in names.items()}


def _rank(said: list[Any], default: Any, a: Tensor | None) -> Any:
    """The rank of the first pattern that matches; or, if that is not the rank of ``A [rank, ...]``, of another one that
    is.

    PEFT sorts the patterns when it saves them, so that where several match one module, the first may have come later
    when the adapter was made.
    """
    first, *more = said or [default]
    return next((rank for rank in more if a is not None and rank == len(a) != first), first)


def exactly(name: str) -> str:
    """A pattern for ``name`` alone. Without the ``^``, PEFT would also match longer names that end in it."""
    return f"^{re.escape(name)}"


def values(patterns: dict[str, Any]) -> Callable[[str], Iterator[Any]]:
    """A function from a module's name to its values in ``patterns``, of which the first one decides.

    As in PEFT, each key is a regular expression that matches the end of a name. This function and what it returns raise
    ValueError for a key that is no regular expression, or that takes too long.
    """
    if all(key == exactly(re.sub(r"\\(.)", r"\1", key[1:])) for key in patterns):  # whole names, as we write them
        return lambda name: iter([patterns[key]] if (key := exactly(name)) in patterns else [])
    end = time.monotonic() + _SECONDS_FOR_PATTERNS
    compiled = []
    for key, value in patterns.items():
        if len(key) > _LONGEST_PATTERN or len(key) * _repeats(key) > _LONGEST_WRITTEN_OUT:
            raise ValueError(f"the pattern {shown(key)} is too long, or counts repeats that make it so")
        if time.monotonic() > end:
            raise _too_slow(key)
        try:
            re.compile(pattern := rf"(.*\.)?({key})$")  # PEFT uses re; the language of regex is wider
            compiled.append((key, regex.compile(pattern), value))
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{shown(key)} is not a regular expression ({error})") from None

    def decide(name: str) -> Iterator[Any]:
        for key, expression, value in compiled:
            try:
                if expression.match(name, timeout=max(end - time.monotonic(), 0.001)):
                    yield value
            except TimeoutError:
                raise _too_slow(key) from None

    return decide


def _too_slow(key: str) -> ValueError:
    return ValueError(f"the pattern {shown(key)} takes more than {_SECONDS_FOR_PATTERNS} seconds")


def _repeats(key: str) -> int:
    """The product of all counts in ``key``, such as 6 for ``\\d{2}(a{1,3})``: as much as they make where they nest."""
    bare = re.sub(r"\\.", "", key)
    counts = (max(int(least or 0), int(most or 0)) for least, most in _REPEAT.findall(bare))
    return math.prod(max(count, 1) for count in counts)
