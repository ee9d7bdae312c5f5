"""How much memory a model will take, estimated before it is loaded, and whether the machine has that much."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import psutil
import torch
from torch import nn

from trimtab.errors import ModelError

GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what they are for."""

    weights: int
    adapters: int = 0
    gradients: int = 0
    optimiser: int = 0
    activations: int = 0
    advice: tuple[str, ...] = ()
    """What would make it less."""

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return self.weights + self.adapters + self.gradients + self.optimiser + self.activations

    def __str__(self) -> str:
        parts = ("weights", "adapters", "gradients", "optimiser", "activations")
        named = ", ".join(f"{part} {getattr(self, part) / GIB:.2f}" for part in parts if getattr(self, part))
        return f"{self.total / GIB:.2f} GiB ({named})"


def estimate_memory(
    model: nn.Module,
    dtype: torch.dtype,
    *,
    adapter_parameters: int = 0,
    base_parameters_trained: int = 0,
    batch_size: int = 1,
    length: int = 1,
    labels: int | None = None,
    gradient_checkpointing: bool = False,
    eager_attention: bool = False,
) -> MemoryEstimate:
    """What running ``model``, which may be on the meta device, will take beyond the process as it is.

    Args:
        model: a transformers model; its parameters are counted once each, its sizes are read off its config.
        dtype: of the weights and of the computation.
        adapter_parameters: trained tensors that are added to the model; float32.
        base_parameters_trained: parameters of the model itself that are trained (method ``full``).
        batch_size: rows in a batch.
        length: tokens in the longest row *that the data has*; the cap ``data.max_length`` may be far above it.
        labels: positions of a batch for which logits are computed; None: all of them.
        gradient_checkpointing: whether each block is recomputed in the backward pass.
        eager_attention: whether the matrix of attention scores is kept.

    Counted: the weights; adapters, 4 bytes a parameter; gradients, 4 bytes a trained parameter; Adam's two moments, 8
    bytes; the activations kept for the backward pass, ``12 * hidden + 5 * intermediate`` elements for a token and
    block, which is 1.06 to 1.47 times what LoRA, DoRA and MoRA were measured to keep in Llama and Qwen2 blocks (GPT-2,
    with its dropout masks and the steps of its gelu, keeps 1.2 to 1.9 times it); logits in ``dtype`` and twice in
    float32. Without anything to train: one block's activations, the cache of keys and values, and the logits.

    Not counted: what the process holds already, temporary tensors within one operation, and fragmentation. So it is
    an estimate: it finds what is far too large, not what is a tenth too large.
    """
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden, blocks, vocabulary = config.hidden_size, config.num_hidden_layers, config.vocab_size
    intermediate = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    size, tokens = dtype.itemsize, batch_size * length
    trained = adapter_parameters + base_parameters_trained

    block = tokens * (12 * hidden + 5 * intermediate) * size
    if eager_attention:
        block += tokens * length * config.num_attention_heads * (size + 4)
    if not trained:
        activations = block + tokens * blocks * 2 * hidden * size
    elif gradient_checkpointing:
        activations = block + tokens * blocks * hidden * size
    else:
        activations = block * blocks
    activations += (tokens if labels is None else labels) * vocabulary * (size + 8)

    wishes = [
        (trained and batch_size > 1, "a smaller train.batch_size with more train.gradient_accumulation"),
        (not trained and batch_size > 1, "a smaller evaluation.batch_size"),
        (length > 1, "a smaller data.max_length"),
        (trained and not gradient_checkpointing, "train.gradient_checkpointing=true"),
        (size == 4, "train.precision=bfloat16" if trained else "model.dtype=bfloat16"),
        (True, "a smaller model"),
    ]
    return MemoryEstimate(
        weights=sum(parameter.numel() for parameter in model.parameters()) * size,
        adapters=4 * adapter_parameters,
        gradients=4 * trained,
        optimiser=8 * trained,
        activations=activations,
        advice=tuple(wish for applies, wish in wishes if applies),
    )


def check_fits(estimate: MemoryEstimate, what: str, device: torch.device | str = "cpu") -> None:
    """Refuse ``what`` (such as "Training smollm2-135m") if it needs more than ``device`` has free.

    Raises:
        ModelError: with what is needed, what there is, and what would make it less.
    """
    available = available_memory(device)
    if estimate.total > available:
        advice = f" What would help: {'; '.join(estimate.advice)}." if estimate.advice else ""
        raise ModelError(
            f"{what} needs about {estimate}, and {available / GIB:.2f} GiB of memory are free.{advice} "
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
