"""Processes that read other rows, as from disks of their own, do not train together."""

from __future__ import annotations

from typing import Any

import pytest

from trimtab.errors import RunError
from trimtab.processes import Processes, being
from trimtab.runs.records import RowsDigest
from trimtab.training.work import require_same_rows

ROWS = RowsDigest(train="a", validation="b", test={"asked": "c"})


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"train": "x"}, "data.train: process 1 reads other rows"),
        ({"validation": None}, "data.validation: process 1 reads other rows"),
        ({"test": {"asked": "x"}}, "data.test: process 1 reads other rows"),
    ],
)
def test_other_rows_are_refused_in_all_processes(other: dict[str, Any], said: str) -> None:
    class Two(Processes):
        def gathered(self, value: Any) -> list[Any]:
            return [ROWS, ROWS.updated(**other)]

    for rank in (0, 1):
        with being(Two(rank, 2)), pytest.raises(RunError, match=said):
            require_same_rows(ROWS)


def test_the_same_rows_are_none_to_speak_of() -> None:
    require_same_rows(ROWS)
