"""What may be set anew when a run is resumed: how it is evaluated and reported, and more steps of the same training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trimtab.config.run import RunConfig
from trimtab.config.yaml_text import show
from trimtab.errors import RunError

# Each with all that is below it. None of these changes what is trained.
_FREE = (
    *("output", "evaluation", "data.test", "report_to", "device"),
    *("train.log_every", "train.save_every", "train.keep_checkpoints", "train.tensorboard", "train.sharding"),
    *("model.attention", "model.liger", "train.padding_free", "train.tf32"),  # another device may have others
)
_ALL_SETS = ("evaluation.limit", "evaluation.max_new_tokens")
_LONGER = ("train.epochs", "train.max_steps")
_ROWS = ("data.train", "data.validation")


@dataclass(frozen=True)
class Changes:
    """How a resumed run differs from what it began with.

    Attributes:
        longer: it is to be trained for more steps than before.
        moved: its training or validation rows lie elsewhere; whether they are the same is seen when they are read.
        measured_anew: the test sets whose results no longer say what the settings say.
    """

    longer: bool = False
    moved: bool = False
    measured_anew: frozenset[str] = frozenset()


def changes(place: str, before: RunConfig, now: RunConfig, resume_command: str) -> Changes:
    """What ``now`` changes of the run at ``place``, which began as ``before``.

    Raises RunError if it may not; the message has each key with its old and its new value.
    """
    found = {key: (old, new) for key, old, new in _differences(_plain(before), _plain(now))}
    moved = {key for key in _ROWS if key in found and _same_but_paths(*found[key])}
    for key in moved:
        del found[key]
    refused = {
        key: values for key, values in found.items() if not _is_free(key) and not (key in _LONGER and _is_more(*values))
    }
    if refused:
        said = "; ".join(f"{key} was {show(old)}, now {show(new)}" for key, (old, new) in sorted(refused.items()))
        raise RunError(
            f"{place}: the run began with other settings: {said}. Resume it with its own: {resume_command}\n"
            "Evaluation and reports may be set anew at a resume, and train.epochs and train.max_steps may grow; for "
            "anything else, begin another run"
        )
    sets = {key.split(".")[2] for key in found if key.startswith("data.test.")}
    if any(key in found for key in _ALL_SETS):
        sets |= set(now.data.test)
    longer = any(key in found for key in _LONGER)
    return Changes(longer=longer, moved=bool(moved), measured_anew=frozenset(sets))


def _plain(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE)


def _is_more(old: Any, new: Any) -> bool:
    """Whether a number of epochs or steps grows; None is no limit."""
    return old is not None and (new is None or new > old)


def _same_but_paths(before: Any, now: Any) -> bool:
    """Whether two lists of sources, as plain values, say the same but for the paths."""
    return isinstance(before, list) and isinstance(now, list) and [*map(_rest, before)] == [*map(_rest, now)]


def _rest(source: Any) -> dict[str, Any]:
    return {key: value for key, value in source.items() if key != "path"} if isinstance(source, dict) else {}


def differences(before: Any, now: Any) -> list[str]:
    """The dotted keys in which two nested mappings differ."""
    return [key for key, _, _ in _differences(before, now)]


def _differences(before: Any, now: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            yield from _differences(before.get(key), now.get(key), f"{place}.{key}" if place else str(key))
    elif before != now:
        yield place, before, now
