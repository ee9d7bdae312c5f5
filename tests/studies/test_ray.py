"""Studies on a real Ray of two workers: the same results, a worker that is killed, a study that is stopped.

Ray takes some ten seconds to start and each run is a process, so these are long tests; test_on_ray.py has the quick
ones.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tiny_runs import rows, write_model, write_rows
from trimtab.files import read_json

pytest.importorskip("ray", reason="Ray is not installed: pip install 'trimtab[ray]'")
pytestmark = [pytest.mark.full, pytest.mark.timeout(1200)]

LORA = {"match": "all-linear", "method": "lora", "rank": 2, "alpha": 4}
TIMED = ("seconds", "memory", "created", "machines", "tokens_per_second")


@pytest.fixture
def study(tmp_path: Path, model_folder: Path) -> Path:
    """A study of two arms, one of which cannot be, and two seeds."""
    write_rows(tmp_path / "train.jsonl", rows(24))
    write_rows(tmp_path / "test.jsonl", rows(21))
    said = {
        "base": {
            "model": str(model_folder),
            "data": {"train": "train.jsonl", "test": {"harbour": "test.jsonl"}, "validation": None},
            "train": {"max_steps": 40, "batch_size": 4, "learning_rate": 1e-2, "precision": "float32"},
            "evaluation": {"before": False},
        },
        "arms": {"lora": {"plan": [LORA]}, "broken": {"plan": [{**LORA, "match": "*.x_proj"}]}},
        "reference": "lora",
        "seeds": [0, 1],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(said, sort_keys=False))
    return tmp_path / "study.yaml"


@contextmanager
def trimtab(*words: str | Path) -> Iterator[subprocess.Popen[str]]:
    """The command line in a process of its own, where one thread a run gives the same sums everywhere."""
    command = [sys.executable, "-m", "trimtab", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def lines_until(process: subprocess.Popen[str], pattern: str) -> str:
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if re.search(pattern, line):
            return said
    raise AssertionError(said)


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Those of Ray that do a run now."""
    found = []
    for one in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if "do_run" in " ".join(one.cmdline()):
                found.append(one)
    return found


def untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: untimed(item) for key, item in value.items() if not any(word in key for word in TIMED)}
    return [untimed(item) for item in value] if isinstance(value, list) else value


def results(folder: Path) -> Any:
    found = untimed(read_json(folder / "results.json"))
    for failed in found["failed"]:
        failed["reason"] = failed["reason"].replace(str(folder), "FOLDER")
    return found


def test_a_study_on_ray_whose_worker_is_killed_has_the_results_of_one_without(study: Path, tmp_path: Path) -> None:
    with trimtab("compare", study, "--on", "ray", "--out", tmp_path / "there") as process:
        said = lines_until(process, r"\] lora, seed 0, on ")
        deadline = time.monotonic() + 60
        while not (doing := workers(process)) and time.monotonic() < deadline:
            time.sleep(0.1)
        doing[0].kill()
        assert process.stdout is not None
        said += process.stdout.read()
        assert process.wait(60) == 1, said  # of the broken arm
    assert said.count("its worker was lost (its process ended); it is begun again") == 1, said
    assert said.count("broken, seed 0: failed:") == 1, said  # and not tried again
    assert not re.search(r"raylet|gcs|Traceback|WARNING", said), said
    with trimtab("compare", study, "--out", tmp_path / "here") as process:
        alone, _ = process.communicate(timeout=600)
        assert process.returncode == 1, alone
    assert results(tmp_path / "there") == results(tmp_path / "here")
    cells = {path.relative_to(tmp_path / "here") for path in (tmp_path / "here" / "cells").rglob("cell.json")}
    assert {path.relative_to(tmp_path / "there") for path in (tmp_path / "there").rglob("cell.json")} == cells
    for cell in cells:
        assert untimed(read_json(tmp_path / "there" / cell)) == untimed(read_json(tmp_path / "here" / cell))
    # What was done there is done here, too.
    with trimtab("compare", study, "--only", "lora", "--out", tmp_path / "there") as process:
        again, _ = process.communicate(timeout=600)
        assert (process.returncode, "[1/" in again) == (0, False), again


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_study_that_is_stopped_leaves_no_process_and_goes_on(study: Path, number: int, code: int) -> None:
    with trimtab(
        "compare", study, "train.max_steps=100000", "train.epochs=100000", "--only", "lora", "--on", "ray"
    ) as process:
        said = lines_until(process, r"\[1/2\] lora, seed \d, on ")
        below = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        assert process.stdout is not None
        said += process.stdout.read()
        assert process.wait(60) == code, said
    assert "interrupted; every run that is done is kept. The same command goes on" in said
    _, alive = psutil.wait_procs(below, timeout=20)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE], alive
    assert not list((study.parent / "study").rglob("cell.json"))


def test_when_the_command_is_killed_its_ray_goes_too(study: Path) -> None:
    with trimtab(
        "compare", study, "train.max_steps=100000", "train.epochs=100000", "--only", "lora", "--on", "ray"
    ) as process:
        lines_until(process, r"\[1/2\] lora, seed \d, on ")
        below = psutil.Process(process.pid).children(recursive=True)
        # Two helpers of Ray's look but once in a while whether it is still there.
        below = [one for one in below if not one.name().endswith("Agent")]
        process.kill()
    _, alive = psutil.wait_procs(below, timeout=60)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE], alive


def test_a_search_on_ray_finds_what_one_here_finds(study: Path, tmp_path: Path) -> None:
    base = yaml.safe_load(study.read_text())["base"]
    base["data"] |= {"validation": "test.jsonl"}
    base["train"] |= {"metric": "loss"}
    base["model"] = str(write_model(tmp_path / "deep", num_hidden_layers=4))
    said = {"base": base, "budget": "lora:2", "trials": 4, "at_once": 2, "prune": None}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(said, sort_keys=False))
    found = {}
    for name, on in (("there", ["--on", "ray"]), ("here", [])):
        with trimtab("explore", tmp_path / "search.yaml", f"output={tmp_path / name}", *on) as process:
            words, _ = process.communicate(timeout=900)
            assert process.returncode == 0, words
        found[name] = untimed(read_json(tmp_path / name / "explore.json"))
    assert found["there"] == found["here"]
