"""Two processes that do the same at once: one does it, and the other one says why it does not."""

from __future__ import annotations

import re

import pytest

import sampling
from faults.trials import Trials
from faults.works import Scene


@pytest.mark.parametrize("kind", ["run", pytest.param("study", marks=pytest.mark.full)])
@pytest.mark.timeout(1200)
def test_one_of_two_processes_does_the_work(kind: str, scene: Scene) -> None:
    trials = Trials(scene.work(kind))
    for _ in range(8 if sampling.everything else 1):
        codes, said = trials.begin_twice()
        assert sorted(codes) == [0, 1], said
        assert re.search("another process.* is at work here", said), said
        assert "Traceback" not in said
        assert trials.finish("two processes") is None


@pytest.mark.timeout(1200)
def test_two_processes_that_save_into_one_folder_leave_one_whole_adapter(scene: Scene) -> None:
    trials = Trials(scene.work("save"))
    for _ in range(8 if sampling.everything else 1):
        codes, said = trials.begin_twice()
        assert 0 in codes, said
        assert "Traceback" not in said
        assert trials.finish("two processes") is None
