"""A tiny model folder, made once, and a maker of configurations that train it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import rows, write_config, write_model, write_rows


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def make_yaml(tmp_path: Path, model_folder: Path) -> Callable[..., Path]:
    """Write ``NAME.yaml`` for a run over ``count`` rows of ``form``; keywords are sections of it."""

    def make(name: str = "run", *, count: int = 24, form: str = "completion", **sections: Any) -> Path:
        train = write_rows(tmp_path / f"{form}.jsonl", rows(count, form))
        return write_config(tmp_path / f"{name}.yaml", model_folder, train, **sections)

    return make


@dataclass(frozen=True)
class Result:
    """What a command line did."""

    code: int
    out: str
    err: str

    def matches(self, pattern: str) -> bool:
        """Whether ``pattern`` is found in what stderr says, line breaks counted as any character."""
        return re.search(pattern, self.err, re.DOTALL) is not None


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Result]:
    """Run ``trimtab WORDS...`` in this process, in the test's own folder; ``stdin`` is what it may read."""
    from trimtab.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*words: str, stdin: str = "") -> Result:
        monkeypatch.setattr("sys.argv", ["trimtab", *map(str, words)])
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return Result(code, said.out, said.err)

    return run
