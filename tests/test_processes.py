"""What a process makes of it when another one ends, without any other process."""

from __future__ import annotations

import json

import pytest
import torch.distributed

from trimtab import processes
from trimtab.errors import EndedElsewhere, RunError, Terminated
from trimtab.processes import Processes

BROKEN = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer"


@pytest.fixture
def group() -> Processes:
    return Processes(rank=0, size=2, store=torch.distributed.HashStore())


def _end(*_: object) -> None:
    raise Terminated


def test_one_that_is_killed_is_told_of_though_its_launcher_ends_the_rest(
    group: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes.time, "sleep", _end)  # the SIGTERM comes while this one waits for a word
    said = group.reason(RuntimeError(BROKEN))
    assert isinstance(said, RunError)
    assert "ended without a word" in str(said)


def test_a_signal_that_comes_with_a_broken_connection_is_the_launchers(
    group: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes.time, "sleep", _end)
    stop = Terminated()
    stop.__context__ = RuntimeError(BROKEN)
    assert isinstance(group.reason(stop), RunError)


def test_a_signal_by_itself_stays_one(group: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.time, "sleep", lambda _: None)
    stop = Terminated()
    assert group.reason(stop) is stop


def test_what_ended_another_process_is_told_in_place_of_the_connection_that_broke(group: Processes) -> None:
    group.store.set("ending", json.dumps({"rank": 1, "code": 1, "stopped": False, "said": "no room"}))
    said = group.reason(RuntimeError(BROKEN))
    assert isinstance(said, EndedElsewhere)
    assert "process 1 of 2 has ended the run: no room" in str(said)
