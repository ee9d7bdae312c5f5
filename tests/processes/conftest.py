"""The fixtures of tests with several processes: two of them do the work of all tests, one piece after the other."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from run_fixtures import bare_runs, make_bare, own_cache
from stopped_runs import interrupt
from trimtab.config.read import load_config
from two_processes import both, library, train

__all__ = ["bare_runs", "own_cache"]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from two_runs import write_models  # it depends on --all, which is not known yet when this file is read

    folder = tmp_path_factory.mktemp("two")
    write_models(folder)
    return folder


@pytest.fixture(scope="session")
def told(root: Path) -> dict[str, list[Any]]:
    """What two processes say that have done all pieces of work."""
    from two_runs import RUNS, yaml_of

    def run(name: str, place: str, how: Mapping[str, Any] = {}, **said: Any) -> Callable[[int], Any]:
        return partial(train, yaml=str(yaml_of(root, name, place, **said)), **how)

    _interrupted_alone(root)
    works = {how: partial(library, root=str(root), how=how) for how in ("ddp", "fsdp", "late", "tp")}
    works |= {f"{name}-{sharding}": run(name, f"{name}-{sharding}", sharding=sharding) for name, sharding in RUNS}
    works |= {
        "odd": run("chosen", "odd", batch_size=5),
        "auto": run("chosen", "auto", learning_rate="auto", sharding="full"),
        "stopped": run("chosen", "stopped", {"told_to_end": 4}),
        "resumed": run("chosen", "resumed", {"resume": True}),
        "refused": run("chosen", "chosen-none"),
        "fails": run("chosen", "fails", {"fails": 1}),
        "deepspeed": run("chosen", "deepspeed", {"launcher": {"ACCELERATE_USE_DEEPSPEED": "true"}}),
    }
    return both(works, root)


def _interrupted_alone(root: Path) -> None:
    """Leave a run in the folder ``resumed`` that one process has begun."""
    from two_runs import yaml_of

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            make_bare(patch)
            interrupt(load_config(yaml_of(root, "chosen", "resumed")), step=4)
    finally:
        signal.signal(signal.SIGINT, before)
