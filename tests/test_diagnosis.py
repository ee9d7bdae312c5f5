"""``trimtab doctor``: what is seen, what is said to help, and what is said not to work."""

from __future__ import annotations

import json
from importlib import metadata
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from trimtab import diagnosis
from trimtab.cli.app import app


def seen(**arguments: Any) -> dict[str, Any]:
    answer = CliRunner().invoke(app, ["doctor", "--json"], **arguments)
    assert answer.exit_code == 0, answer.output
    result: dict[str, Any] = json.loads(answer.stdout)
    return result


def without(monkeypatch: pytest.MonkeyPatch, package: str, version: str | None = None) -> None:
    real = diagnosis._installed
    monkeypatch.setattr(diagnosis, "_installed", lambda name: version if name == package else real(name))


def test_machine_packages_and_settings_are_said() -> None:
    sections = seen()["sections"]
    assert sections["machine"].keys() >= {"processor", "memory", "bfloat16"}
    assert sections["packages"]["torch"] == metadata.version("torch")
    assert sections["settings"]["threads of torch"] == str(torch.get_num_threads())


def test_a_missing_extra_is_named_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "bitsandbytes")
    told = seen()
    assert told["broken"] == []
    assert "pip install 'trimtab[quantised]'" in told["sections"]["packages"]["bitsandbytes"]


def test_every_extra_for_users_has_a_use() -> None:
    extras = set(metadata.metadata("trimtab").get_all("Provides-Extra") or [])
    assert extras - {"dev", "docs"} == set(diagnosis.USES)


@pytest.mark.parametrize("version", [None, "0.1"])
def test_a_needed_package_that_is_missing_or_old_is_an_error(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    without(monkeypatch, "accelerate", version)
    answer = CliRunner().invoke(app, ["doctor"])
    assert answer.exit_code == 1
    assert "does not work: accelerate" in answer.output
    assert "pip install 'accelerate>=" in answer.output


def test_little_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_MEMORY_GIB", "1.5")
    assert any("1.5 GiB of memory are free" in advice for advice in seen()["advice"])


def test_too_few_threads_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 0)
    assert any("OMP_NUM_THREADS" in advice for advice in seen()["advice"])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    assert not any("OMP_NUM_THREADS" in advice for advice in seen()["advice"])


def test_a_machine_with_nothing_amiss_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "diagnose", lambda: diagnosis.Diagnosis({"machine": {"processor": "one"}}))
    assert "nothing is amiss" in CliRunner().invoke(app, ["doctor"]).output
