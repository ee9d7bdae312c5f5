"""The count of tokens and seconds."""

from __future__ import annotations

import pytest

from trimtab.training import metrics_log


def test_what_is_paused_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 13.0, 20.0, 120.0, 121.0, 200.0, 201.0, 202.0])
    monkeypatch.setattr(metrics_log.time, "perf_counter", lambda: next(clock))
    count = metrics_log.Throughput()
    count.add(5)
    assert count.so_far() == (5, 3.0)
    with count.paused():  # from 20 to 120
        count.add(2)
    assert count.so_far() == (7, 11.0)
    with pytest.raises(KeyError), count.paused():  # from 200 to 201
        raise KeyError
    assert count.so_far() == (7, 91.0)
