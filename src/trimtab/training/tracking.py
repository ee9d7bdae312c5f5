"""Trackers that the user asked for by ``report_to``: transformers' own callbacks, told what run this is.

A run does not depend on them. One that cannot begin is an error before training; one that fails later, as a network
does, is told of once and left alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trimtab.config.read import to_mapping
from trimtab.config.run import RunConfig
from trimtab.errors import RunError
from trimtab.runs.folder import RunFolder

Tell = Callable[[str], None]


def trackers(config: RunConfig, tell: Tell) -> list[TrainerCallback]:
    """A callback for each tracker of ``report_to``; TensorBoard's files go into the run's folder.

    Raises RunError, which says what to install, for one that is not there, ``train.tensorboard``'s among them.
    """
    if config.train.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise RunError(
            "train.tensorboard: TensorBoard is not installed; pip install 'trimtab[tensorboard]', or turn it off"
        )
    if not config.report_to:
        return []
    from transformers.integrations import get_reporting_integration_callbacks

    found: list[TrainerCallback] = []
    for name in config.report_to:
        try:
            (kind,) = get_reporting_integration_callbacks([name])
            callback = kind()
        except (ImportError, RuntimeError, AssertionError) as error:
            raise RunError(
                f"report_to: {name} is not installed ({' '.join(str(error).split())}). Install it, or take it out of "
                "report_to"
            ) from None
        if name == "tensorboard" and callback.logging_dir is None:
            callback.logging_dir = str(RunFolder(config.output).tensorboard)
        found.append(Tracking(name, callback, config, tell))
    return found


class Tracking(TrainerCallback):
    """Passes everything on to a tracker's callback, and keeps its failures to itself."""

    def __init__(self, name: str, callback: TrainerCallback, config: RunConfig, tell: Tell) -> None:
        self._name, self._callback, self._config, self._tell = name, callback, config, tell
        self._failed = False

    def passes(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, given: dict[str, Any]
    ) -> None:
        """Tell the tracker of ``event``; what it makes of the control is left out."""
        if self._failed:
            return
        try:
            getattr(self._callback, event)(_Told.of(args, self._config), state, control, **given)
        except Exception as error:  # it may be of any library, and of any network
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if event == "on_train_begin":
                raise RunError(
                    f"report_to: {self._name} cannot begin ({said}). Set it up, or take it out of report_to"
                ) from error
            self._failed = True
            self._tell(f"report_to: {self._name} has failed and is told nothing more; training goes on ({said})")


def _handler(event: str) -> Callable[..., None]:
    def handle(
        self: Tracking, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        self.passes(event, args, state, control, given)

    return handle


for _event in [name for name in dir(TrainerCallback) if name.startswith("on_")]:
    setattr(Tracking, _event, _handler(_event))


class _Told(TrainingArguments):
    """transformers' settings, which trackers keep, with the run's name and its own settings under ``trimtab.KEY``."""

    said: Mapping[str, Any] = {}

    @classmethod
    def of(cls, args: TrainingArguments, config: RunConfig) -> TrainingArguments:
        told = copy(args)
        told.__class__ = cls
        told.run_name = config.output.name
        told.said = _flat(to_mapping(config), "trimtab")  # type: ignore[attr-defined]
        return told

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), **self.said}  # type: ignore[no-untyped-call]


def _flat(said: Any, place: str) -> dict[str, Any]:
    if isinstance(said, Mapping):
        return {key: value for name, inner in said.items() for key, value in _flat(inner, f"{place}.{name}").items()}
    return {place: said if isinstance(said, (str, int, float, bool)) else str(said)}
