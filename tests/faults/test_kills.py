"""Wherever a work is killed, what is begun again ends as if nothing had happened: every file, bit for bit.

A sample of the places is tried here, spread over the kinds of work; ``pytest --all`` tries every one, as does
``python tests/faults/campaign.py``, which counts them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import sampling
from faults.trials import Place, Trials, Work
from faults.works import Scene

SAMPLE = {"run": 3, "study": 2, "merge": 3, "merge over another": 4, "save": 3, "save over another": 4, "init": 1}
"""How many places of each kind are tried without ``--all``: 20."""


@pytest.mark.parametrize("kind", SAMPLE)
@pytest.mark.timeout(7200)
def test_what_is_killed_and_begun_again_ends_as_if_it_was_not(kind: str, scene: Scene) -> None:
    trials = Trials(scene.work(kind))
    failures = [said for place in chosen(trials.places, SAMPLE[kind]) if (said := trials.kill(place)) is not None]
    assert not failures, "\n".join(failures)


def chosen(places: list[Place], count: int) -> list[Place]:
    """``count`` of the places, at even distances from the middle of the first part on; all with ``--all``."""
    if sampling.everything:
        return places
    return [places[(2 * number + 1) * len(places) // (2 * count)] for number in range(count)]


def test_a_place_that_leaves_something_else_is_noticed(tmp_path: Path, scene: Scene) -> None:
    """The harness itself: a work that does not write its files in one step fails at some place."""
    folder = tmp_path / "out"

    def begin() -> int:
        folder.mkdir(exist_ok=True)
        for name in ("one", "two"):
            if not (folder / name).exists():
                (folder / name).write_text(name)
        return 0

    trials = Trials(Work("careless", folder, begin, begin))
    assert [str(place) for place in trials.places] == [
        "careless, before change 1 (mkdir .)",
        "careless, before change 2 (write one)",
        "careless, in change 2 (write one)",
        "careless, before change 3 (write two)",
        "careless, in change 3 (write two)",
    ]
    assert [trials.kill(place) for place in trials.places] == [
        *(None, None, "careless, in change 2 (write one): one differs"),
        *(None, "careless, in change 3 (write two): two differs"),
    ]
