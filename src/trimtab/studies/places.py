"""Where the runs of a study are done: here, one after another, or elsewhere, several at once.

    with place("ray") as on:        # see `trimtab.studies.on_ray`
        for number, failure in on.bring(errands): ...

Whoever wants a cell lets its run be brought first, and then calls `trimtab.studies.cell.run_cell`, which finds the run
finished in the cell's folder, or does it now. So a study is the same files wherever its runs were done, and one that
was begun in one place goes on in another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

from trimtab.config.run import RunConfig
from trimtab.errors import TrimtabError
from trimtab.runs.events import Listener


class Errand(Listener):
    """A run to be done for a cell, and who hears of it: as any run's listener, and of its whereabouts.

    Attributes:
        config: the cell's, whose ``output`` is the cell's folder.
        keep: as `trimtab.studies.cell.run_cell` has it.
    """

    def __init__(self, config: RunConfig, keep: Literal["results", "adapters"] = "results") -> None:
        self.config = config
        self.keep = keep

    def began(self, where: str) -> None:
        """It is being done at ``where``, a machine's name; an empty one for here."""

    def told(self, words: str) -> None:
        """What became of it on the way: its worker was lost, and it is begun again."""


Outcome = tuple[int, TrimtabError | None]
"""Which of the errands, and why its run could not be done; None where it is home, or is done here when it is asked
for."""


class Place(Protocol):
    """Where runs are done."""

    @property
    def several(self) -> bool:
        """Whether runs are done at once."""
        ...

    def bring(self, errands: Sequence[Errand]) -> Iterator[Outcome]:
        """Have the runs of ``errands`` done; gives each when it is over.

        Raises RunError where the place itself is gone.
        """
        ...


class Here:
    """This machine: a run is done when its cell is asked for, so there is nothing to be brought."""

    several = False

    def bring(self, errands: Sequence[Errand]) -> Iterator[Outcome]:
        for number, errand in enumerate(errands):
            errand.began("")
            yield number, None


HERE: Place = Here()
