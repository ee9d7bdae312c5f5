"""Fixtures that the tests of training and of the command line share; their conftest files import them.

A cache of their own, a tiny model folder made once, and a maker of configurations that train it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import rows, write_config, write_model, write_rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one block: a quarter of a run's time less, where a second one would show nothing more."""
    return write_model(tmp_path_factory.mktemp("model") / "tiny", num_hidden_layers=1)


@pytest.fixture(scope="session")
def two_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Imported as ``model_folder`` where blocks differ."""
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def make_yaml(tmp_path: Path, model_folder: Path) -> Callable[..., Path]:
    """Write ``NAME.yaml`` for a run over ``count`` rows of ``form``; keywords are sections of it."""

    def make(name: str = "run", *, count: int = 24, form: str = "completion", **sections: Any) -> Path:
        train = write_rows(tmp_path / f"{form}.jsonl", rows(count, form))
        return write_config(tmp_path / f"{name}.yaml", model_folder, train, **sections)

    return make


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells run in this process: quicker, where what a process of their own gives is not what is tested."""
    from trimtab.errors import Interrupted, RunError, TrimtabError
    from trimtab.studies.process import run_here

    def run(config: Any, listener: Any) -> None:
        try:
            run_here(config, listener)
        except Interrupted:
            raise
        except TrimtabError as error:
            raise RunError(str(error)) from None

    monkeypatch.setattr("trimtab.studies.cell.run_apart", run)


@pytest.fixture
def bare_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs as ``make_bare`` leaves them."""
    make_bare(monkeypatch)


def counted_memory(config: Any) -> Any:
    """What the run of ``config`` is estimated to need: what runs that were made bare leave out."""
    from trimtab import tasks
    from trimtab.memory.estimate import estimate_run
    from trimtab.runs.events import Listener

    job, inputs = tasks.inputs_of(tasks.job_of(config), Listener())
    return estimate_run(job, tasks.of(job).sizes(job, inputs))


def make_bare(patch: pytest.MonkeyPatch, *, page: bool = False) -> None:
    """Runs without the estimate of their memory before, and with an empty page (but for ``page``) and no look at PEFT
    after: a quarter of the time, where none is what is tested."""
    from trimtab.files import write_text
    from trimtab.surgery.attach_report import AttachReport

    patch.setattr("trimtab.training.checks.check_run", lambda *_: AttachReport((), (), 0, 0))
    patch.setattr("trimtab.training.work.Work.problem_in_peft", lambda *_: "")
    if not page:
        writes = "trimtab.reports.run.run_page.write_run_page"
        patch.setattr(writes, lambda run, summary=None: write_text(run / "report.html", ""))
