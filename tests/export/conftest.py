"""Finished runs to hand over, trained in this process: on a folder, and on a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import Result, cli
from run_fixtures import bare_runs, make_bare, make_yaml, own_cache, two_blocks as model_folder
from tiny_gguf import write_gguf
from tiny_runs import rows, write_config, write_rows
from trimtab.config.read import load_config
from trimtab.training.run import finetune

__all__ = ["Result", "bare_runs", "cli", "make_yaml", "model_folder", "own_cache"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Callable[..., Path]:
    """A run on the tiny folder, or on a tiny GGUF file, by its name and plan; each is trained once."""
    root = tmp_path_factory.mktemp("runs")
    gguf = root / "tiny.gguf"
    write_gguf(gguf)
    test = write_rows(root / "kind.jsonl", rows(6))
    made: dict[str, Path] = {}

    def make(name: str, plan: list[dict[str, Any]], *, on_gguf: bool = False, **sections: Any) -> Path:
        if name not in made:
            train = write_rows(root / "train.jsonl", rows(24))
            data = {"test": {"kind": str(test)}, **sections.pop("data", {})}
            file = root / f"{name}.yaml"
            write_config(file, gguf if on_gguf else model_folder, train, plan=plan, data=data, **sections)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("TRIMTAB_CACHE", str(root / "cache"))
                make_bare(patch)
                made[name] = finetune(load_config(file)).path
        return made[name]

    return make
