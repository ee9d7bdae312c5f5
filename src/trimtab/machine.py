"""What the machine can do, how much memory it has left, and what the process has used. Loads torch when asked."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator, MutableMapping, Sequence
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


def best_precision(where: torch.device | None = None) -> Literal["bfloat16", "float32"]:
    """bfloat16 where the device (None: that of ``device()``) multiplies it in hardware, else float32."""
    import torch

    if (where or device()).type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if platform.machine() not in ("x86_64", "AMD64"):
        return "float32"
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "float32"


def devices() -> list[str]:
    """The devices that torch can use here: ``cpu``, and each accelerator by its number."""
    import torch

    first = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if first is not None else 0
    return ["cpu", *(f"{first.type}:{number}" for number in range(count) if first is not None)]


def device(asked: str = "auto") -> torch.device:
    """Where a model is put.

    Args:
        asked: ``auto``, or a device by its name: ``cpu``, ``cuda``, ``cuda:1``, ``mps``. ``auto`` is what the
            environment variable TRIMTAB_DEVICE says, else an accelerator if there is one, else the processor.

    Raises:
        ModelError: what was asked for is not here; the message says what is.
    """
    import torch

    place = "device"
    if asked == "auto":
        asked, place = os.environ.get("TRIMTAB_DEVICE", "auto"), "TRIMTAB_DEVICE"
    here = devices()
    if asked == "auto":
        asked = here[-1].split(":")[0]
    with suppress(RuntimeError):  # no name of a device at all
        wanted = torch.device(asked)
        if wanted.type == "cpu" or f"{wanted.type}:{wanted.index or 0}" in here:
            return wanted
    hint = ""
    if asked.startswith("cuda") and len(here) == 1:
        hint = f" This torch ({torch.__version__}) finds no GPU; `trimtab doctor` says what would help."
    raise ModelError(f"{place}: expected auto or one of {', '.join(here)}, which are here, got '{asked}'.{hint}")


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
    if not str(device).startswith("cpu"):
        module = _module(device)
        if hasattr(module, "mem_get_info"):
            # What torch's allocator holds and no tensor uses is free for the next one.
            held = module.memory_reserved(device) - module.memory_allocated(device)
            return int(module.mem_get_info(device)[0] + held)
        if hasattr(module, "recommended_max_memory"):  # Apple's, whose memory is the machine's
            return int(module.recommended_max_memory() - module.driver_allocated_memory())
    return min(psutil.virtual_memory().available, *_control_group_rooms())


def _module(device: torch.device | str) -> Any:
    """``torch.cuda`` and its like, for an accelerator."""
    import torch

    return torch.get_device_module(device)


def device_memory_gib(device: torch.device | str) -> float | None:
    """What tensors take on ``device`` now; None for the processor, or where torch does not say."""
    count = None if str(device).startswith("cpu") else getattr(_module(device), "memory_allocated", None)
    return count(device) / GIB if count is not None else None


def peak_device_memory_gib(device: torch.device | str) -> float | None:
    """The most that torch has held on ``device`` so far, free blocks of its allocator among it: what has to be there
    for the same run. None for the processor, or where torch does not say."""
    count = None if str(device).startswith("cpu") else getattr(_module(device), "max_memory_reserved", None)
    return count(device) / GIB if count is not None else None


def describe_device(device: torch.device | str) -> dict[str, Any]:
    """The name of an accelerator and its memory, as far as torch says; nothing for the processor."""
    if str(device).startswith("cpu"):
        return {}
    module = _module(device)
    name = module.get_device_name(device) if hasattr(module, "get_device_name") else str(device)
    if not hasattr(module, "mem_get_info"):
        return {"device": name}
    return {"device": name, "device_memory_gib": round(module.mem_get_info(device)[1] / GIB, 1)}


def check_fits(
    what: str,
    needed: int,
    device: torch.device | str = "cpu",
    *,
    parts: str = "",
    advice: Callable[[int], Sequence[str]] = lambda free: (),
) -> None:
    """Refuse ``what`` (such as "Training smollm2-135m") if it needs more than ``device`` has free.

    Args:
        what: begins the message.
        needed: bytes, beyond what the process holds already.
        device: where they are needed.
        parts: what they are for, in words.
        advice: says what would make it fit into so many bytes as there are; asked where it does not.

    Raises:
        ModelError: with what is needed, what there is, and the advice.
    """
    available = available_memory(device)
    if needed > available:
        helps = advice(available)
        told = f" What would help: {'; '.join(helps)}." if helps else ""
        where = "" if str(device).startswith("cpu") else f" on {describe_device(device)['device']} ({device})"
        raise ModelError(
            f"{what} needs about {needed / GIB:.2f} GiB{f' ({parts})' if parts else ''}, and {available / GIB:.2f} GiB "
            f"of memory are free{where}.{told} (TRIMTAB_MEMORY_GIB=N overrules what is taken to be free.)"
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


def describe_machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Processor, cores and memory; and of ``device`` its name and its memory, if it is an accelerator."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = (line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name"))
        name = next(lines, f": {name}").split(":", 1)[1].strip()
    return {
        "processor": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        **describe_device(device),
    }


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = ("trimtab", "torch", "transformers", "accelerate", "safetensors", "datasets")
    return {"python": platform.python_version(), **{package: metadata.version(package) for package in packages}}
