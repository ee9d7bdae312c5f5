"""What launchers say through the environment, without any of them."""

from __future__ import annotations

import pytest

from trimtab import launching
from trimtab.errors import EndedElsewhere, RunError

TWO = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(launching.time, "sleep", found.append)
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    return found


def test_the_first_process_tells_at_once_what_is_for_one(monkeypatch: pytest.MonkeyPatch, waited: list[float]) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RunError, match="this is for one process, and 2 were started"):
        launching.require_one("this")
    assert not waited


def test_another_waits_for_it_since_its_own_end_would_end_all(
    monkeypatch: pytest.MonkeyPatch, waited: list[float]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(EndedElsewhere):
        launching.require_one("this")
    assert waited == [launching.GRACE]
