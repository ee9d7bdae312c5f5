"""Which device a run takes, and what is said where it is not there."""

from __future__ import annotations

import pytest
import torch

from accelerator import DEVICE, MEMORY, NAME, accelerator
from trimtab import machine
from trimtab.diagnosis import diagnose
from trimtab.errors import ModelError


def test_an_accelerator_is_taken_unless_something_else_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with accelerator():
        assert machine.devices() == ["cpu", f"{NAME}:0"]
        assert machine.device().type == NAME
        assert machine.device("cpu").type == "cpu"
        assert machine.device(f"{NAME}:0") == DEVICE
        monkeypatch.setenv("TRIMTAB_DEVICE", "cpu")
        assert machine.device().type == "cpu"
        assert machine.device(NAME).type == NAME, "what a run says goes before the variable"


@pytest.mark.parametrize("asked", [f"{NAME}:1", "cuda", "cuda:0", "gpu", "meta", "mps"])
def test_a_device_that_is_not_here_is_refused_with_those_that_are(asked: str) -> None:
    with accelerator(), pytest.raises(ModelError, match=rf"one of cpu, {NAME}:0, which are here, got '{asked}'"):
        machine.device(asked)


def test_a_variable_that_asks_for_what_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_DEVICE", "cuda:7")
    with pytest.raises(ModelError, match=r"TRIMTAB_DEVICE: expected .* got 'cuda:7'.*finds no GPU"):
        machine.device()
    found = diagnose()
    assert any("TRIMTAB_DEVICE" in sentence for sentence in found.broken)
    assert found.sections["settings"]["models are put on"] == "cpu"


def test_memory_is_that_of_the_device() -> None:
    with accelerator():
        # What torch's allocator holds beyond its tensors is free for the next one.
        assert machine.available_memory(DEVICE) == MEMORY // 2 + MEMORY // 16
        with pytest.raises(ModelError, match=r"needs about 100.00 GiB, and 4.50 GiB of memory are free on Fake GPU"):
            machine.check_fits("Training it", 100 * machine.GIB, DEVICE)
        assert machine.describe_machine(DEVICE)["device"] == "Fake GPU"
    assert "device" not in machine.describe_machine()
    assert machine.peak_device_memory_gib("cpu") is None


def test_a_device_that_tells_nothing_of_its_memory_is_used_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = torch.utils.backend_registration._DummyBackendModule()
    monkeypatch.setattr(machine, "_module", lambda device: bare)
    assert machine.describe_device(DEVICE) == {"device": str(DEVICE)}
    assert machine.available_memory(DEVICE) == pytest.approx(machine.available_memory(), rel=0.2)
    assert machine.device_memory_gib(DEVICE) is None


def test_the_doctor_names_each_device() -> None:
    with accelerator():
        seen = diagnose().sections
    assert seen["machine"][f"accelerator {NAME}:0"] == "Fake GPU, 8.0 GiB, 4.5 free"
    assert seen["settings"]["models are put on"] == NAME
