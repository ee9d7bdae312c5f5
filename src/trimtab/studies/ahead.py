"""Runs of a search that depend on no other, done ahead and at once where there are machines for that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from trimtab.config.run import RunConfig
from trimtab.runs.events import Listener
from trimtab.studies.cell import finished_cell, run_cell
from trimtab.studies.places import Errand, Place


class _Ahead(Errand):
    """A run of many: a line where it begins, and what becomes of it."""

    def __init__(self, config: RunConfig, keep: Literal["results", "adapters"], listener: Listener) -> None:
        super().__init__(config, keep)
        self._listener = listener
        self.name = "/".join(config.output.parts[-2:])

    def began(self, where: str) -> None:
        self._listener.note(f"{self.name}: on {where}" if where else self.name)

    def told(self, words: str) -> None:
        self._listener.note(f"{self.name}: {words}")


def bring(
    on: Place, configs: Sequence[RunConfig], listener: Listener, keep: Literal["results", "adapters"] = "results"
) -> None:
    """Do the cells of ``configs`` that are not done, if ``on`` does several at once. Whoever asks for one of them then
    finds it done; one that failed fails when it is asked for."""
    missing = [_Ahead(config, keep, listener) for config in configs if finished_cell(config) is None]
    if not on.several or len(missing) < 2:
        return
    listener.stage(f"{len(missing)} runs at once, as far as there is room for them")
    for number, failure in on.bring(missing):
        errand = missing[number]
        if failure is None:
            run_cell(errand.config, keep=keep)
        else:
            errand.told(f"failed: {failure}")
