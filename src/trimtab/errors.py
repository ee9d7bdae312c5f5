"""Every error that a user can meet, in one tree.

    TrimtabError            anything of ours; the command line prints it without a traceback and exits with 1
    ├── ConfigError         a key or a value in a YAML file or an override
    ├── PlanError           a rule that matches nothing, or that cannot be applied to what it matches
    ├── SurgeryError        attach, detach or merge asked of a model in the wrong state
    ├── AdapterError        an adapter on disk that cannot be read, or that belongs to another model
    ├── DataError           a data file or a row of one
    ├── ModelError          a model that cannot be found, read, or held in memory
    ├── RunError            a run folder that is missing, taken, or cannot be resumed; a run that went wrong
    └── Interrupted         a run was stopped by the user; the command line exits with 130

A message names the place, what was expected, what came, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TrimtabError(Exception):
    """Base of every error that trimtab raises on purpose."""


class ConfigError(TrimtabError):
    """A key or a value in a configuration is not what it should be."""


class PlanError(TrimtabError):
    """A plan cannot be applied to this model."""


class SurgeryError(TrimtabError):
    """The model is not in the state that the operation needs."""


class AdapterError(TrimtabError):
    """An adapter on disk is unreadable, incomplete, or made for another model."""


class DataError(TrimtabError):
    """A data file or one of its rows cannot be used."""


class ModelError(TrimtabError):
    """A model cannot be found, read, or held in memory."""


class RunError(TrimtabError):
    """A run folder is missing, taken, or cannot be resumed, or a run went wrong."""


class Interrupted(TrimtabError):  # noqa: N818 -- not a mistake of anybody's
    """A run was stopped by the user; the message says how to go on."""


def nearest(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The entries of ``known`` that look most like ``word``, best first; possibly none."""
    return difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence such as ``" Did you mean 'rank'?"``, or an empty string where nothing is near."""
    found = nearest(word, known, count=1)
    return f" Did you mean '{found[0]}'?" if found else ""
