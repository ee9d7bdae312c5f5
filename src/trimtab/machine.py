"""What the machine can do, how much memory it has left, and what the process has used. Loads torch when asked."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

import psutil

from trimtab.errors import ModelError

if TYPE_CHECKING:
    import torch

GIB = 2**30

PRODUCTS_KEPT = 64
"""Compiled products that torch keeps. A step makes 15 to 40 for batches of one width, which all blocks share; if fewer
were kept, each block would compile its own anew."""


def best_precision() -> Literal["bfloat16", "float32"]:
    """bfloat16 where the processor multiplies it in hardware, else float32."""
    import torch

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if platform.machine() not in ("x86_64", "AMD64"):
        return "float32"
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "float32"


def device() -> torch.device:
    """Where a model is put: an accelerator if there is one, else the processor."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def keep_few_products(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let torch and oneDNN keep no more than ``PRODUCTS_KEPT`` compiled products each, unless the user says otherwise.

    In bfloat16 on a processor torch compiles a product for every new shape and keeps 1,024 in each of two places, so a
    run whose batches have many widths grows by gigabytes. Both variables are read once, at the first such product: the
    command line and the processes of a study set them when they start. A program of one's own calls this function, or
    sets the variables, before it computes anything.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        environment.setdefault(name, str(PRODUCTS_KEPT))


def memory_gib() -> float:
    """Resident memory of this process now."""
    return psutil.Process().memory_info().rss / GIB


def peak_memory_gib() -> float:
    """Largest resident memory of this process so far."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / GIB
    with suppress(FileNotFoundError, StopIteration):  # on Linux, where ru_maxrss begins at that of the parent process
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024 / GIB
    import resource  # which Windows does not have

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB


def available_memory(device: torch.device | str = "cpu") -> int:
    """Bytes free on ``device``; on the processor, what the machine and the process's control groups leave.

    The environment variable TRIMTAB_MEMORY_GIB overrules it.
    """
    if own := os.environ.get("TRIMTAB_MEMORY_GIB"):
        try:
            return int(float(own) * GIB)
        except (ValueError, OverflowError):
            raise ModelError(f"TRIMTAB_MEMORY_GIB: expected a number of GiB, got '{own}'.") from None
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, *_control_group_rooms())


def check_fits(
    what: str, needed: int, device: torch.device | str = "cpu", *, parts: str = "", advice: Sequence[str] = ()
) -> None:
    """Refuse ``what`` (such as "Training smollm2-135m") if it needs more than ``device`` has free.

    Args:
        what: begins the message.
        needed: bytes, beyond what the process holds already.
        device: where they are needed.
        parts: what they are for, in words.
        advice: what would make it less.

    Raises:
        ModelError: with what is needed, what there is, and the advice.
    """
    available = available_memory(device)
    if needed > available:
        told = f" What would help: {'; '.join(advice)}." if advice else ""
        raise ModelError(
            f"{what} needs about {needed / GIB:.2f} GiB{f' ({parts})' if parts else ''}, and {available / GIB:.2f} GiB "
            f"of memory are free.{told} (TRIMTAB_MEMORY_GIB=N overrules what is taken to be free.)"
        )


def _control_group_rooms(
    membership: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """What each control group that this process is in may still take; both versions of the interface."""
    for line in membership.read_text().splitlines() if membership.is_file() else ():
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            root, limit_file, usage_file, cache_key = mount, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit_file, usage_file = mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache_key = "total_inactive_file"
        else:
            continue
        # A limit on any group above holds, too. Inside a container the name may be the host's, but the root is ours.
        path = PurePosixPath(name)
        for group in (path, *path.parents):
            folder = root / str(group).lstrip("/")
            try:
                limit = int((folder / limit_file).read_text())
                used = int((folder / usage_file).read_text())
                cache = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines()).get(cache_key, 0)
            except (OSError, ValueError):  # no such group here, or "max": no limit
                continue
            yield max(0, limit - used + int(cache))


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
