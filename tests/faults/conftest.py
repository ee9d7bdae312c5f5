"""One scene for all tests of faults: a tiny model, rows, and the works over them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from faults.works import Scene


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield Scene(tmp_path_factory.mktemp("scene"))
