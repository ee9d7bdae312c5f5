"""What the machine can do, and what the process has used."""

from __future__ import annotations

import os
import platform
import resource
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

GIB = 1024**3


def best_precision() -> Literal["bfloat16", "float32"]:
    """bfloat16 where the processor multiplies it in hardware, else float32."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if platform.machine() not in ("x86_64", "AMD64"):
        return "float32"
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "float32"


def device() -> torch.device:
    """Where a model is put: an accelerator if there is one, else the processor."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def memory_gib() -> float:
    """Resident memory of this process now."""
    return psutil.Process().memory_info().rss / GIB


def peak_memory_gib() -> float:
    """Largest resident memory of this process so far."""
    with suppress(FileNotFoundError, StopIteration):  # on Linux, where ru_maxrss begins at that of the parent process
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024 / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB


def describe_machine() -> dict[str, Any]:
    """Processor, cores and memory."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = (line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name"))
        name = next(lines, f": {name}").split(":", 1)[1].strip()
    return {
        "processor": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
    }


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = ("trimtab", "torch", "transformers", "accelerate", "safetensors", "datasets")
    return {"python": platform.python_version(), **{package: metadata.version(package) for package in packages}}
