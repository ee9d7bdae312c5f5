"""One scene for all tests of faults: a tiny model, rows, and the works over them."""

from __future__ import annotations

import pytest

from faults.works import Scene


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture(autouse=True)
def _cache_of_the_scene(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(scene.folder / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
