"""How much memory a model or a run will take, and whether the machine has that much."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath

import psutil
import torch

from trimtab.errors import ModelError

GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what they are for, at the moment when their sum is largest."""

    weights: int
    adapters: int = 0
    gradients: int = 0
    optimiser: int = 0
    activations: int = 0
    """What is kept for the backward pass, and the temporary tensors of that moment."""
    fragmentation: int = 0
    """What the allocator holds free between tensors, where the next one does not fit."""
    files: int = 0
    """Pages of weight files from which a model is being converted. They count as the process's memory, but the system
    takes them back where it needs them."""
    process: int = 0
    """What the process holds besides tensors: Python, libraries, tokenizer, rows."""
    moment: str = "loading"
    """When that is: ``loading``, ``evaluating`` or ``training``."""

    @property
    def total(self) -> int:
        """All of it, in bytes: the largest resident memory that the process will have."""
        return self.needed + self.files + self.process

    @property
    def needed(self) -> int:
        """What the process will need beyond what it holds already, in bytes."""
        tensors = self.weights + self.adapters + self.gradients + self.optimiser + self.activations
        return tensors + self.fragmentation

    def parts(self) -> dict[str, int]:
        """Bytes by name, without the parts that are nothing."""
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "moment"}
        return {name: size for name, size in named.items() if size}

    def __str__(self) -> str:
        named = (f"{name} {size / GIB:.2f}" for name, size in self.parts().items() if name not in ("files", "process"))
        return f"{self.needed / GIB:.2f} GiB ({', '.join(named)})"


def stored_bytes(shape: Sequence[int], dtype: torch.dtype, quantisation: str = "none") -> int:
    """Bytes of the weight of a linear layer as it is stored.

    ``int8``: a byte for each weight, and a float32 scale for each row. ``nf4``: half a byte for each, a byte of scale
    for each 64, and for each 256 of these scales a float32 (double quantisation); then its two tables and an offset.
    Raises KeyError for another name than ``none``, ``int8`` and ``nf4``.
    """
    count = shape[0] * shape[1]
    blocks = -(-count // 64)
    return {
        "none": count * dtype.itemsize,
        "int8": count + 4 * shape[0],
        "nf4": -(-count // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1),
    }[quantisation]


def check_fits(
    estimate: MemoryEstimate, what: str, device: torch.device | str = "cpu", advice: Sequence[str] = ()
) -> None:
    """Refuse ``what`` (such as "Training smollm2-135m") if it needs more than ``device`` has free.

    ``advice``: what would make it less.

    Raises:
        ModelError: with what is needed, what there is, and the advice.
    """
    available = available_memory(device)
    if estimate.needed > available:
        told = f" What would help: {'; '.join(advice)}." if advice else ""
        raise ModelError(
            f"{what} needs about {estimate}, and {available / GIB:.2f} GiB of memory are free.{told} "
            f"(TRIMTAB_MEMORY_GIB=N overrules what is taken to be free.)"
        )


def available_memory(device: torch.device | str = "cpu") -> int:
    """Bytes free on ``device``; on the processor, what the machine and the process's control groups leave.

    The environment variable TRIMTAB_MEMORY_GIB overrules it.
    """
    if own := os.environ.get("TRIMTAB_MEMORY_GIB"):
        try:
            return int(float(own) * GIB)
        except (ValueError, OverflowError):
            raise ModelError(f"TRIMTAB_MEMORY_GIB: expected a number of GiB, got '{own}'.") from None
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, *_control_group_rooms())


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
