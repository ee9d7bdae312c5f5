"""An adapter of mlx-lm, for Apple's MLX: LoRA, and DoRA as it is.

``adapters.safetensors`` holds, for each module by its name in transformers, ``lora_a`` ``[in, rank]``, ``lora_b``
``[rank, out]`` and with DoRA ``m`` ``[out]``; ``adapter_config.json`` one rank and one scale for all (mlx-lm 0.32,
``tuner/lora.py``, ``tuner/dora.py``, ``tuner/utils.py``). So scales go into ``lora_b``, and smaller ranks are filled up
with zeros, both of which change nothing. mlx-lm puts an adapter of zeros onto a module that only other layers have.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from trimtab.errors import SurgeryError
from trimtab.export._card import base_of, loaded_as
from trimtab.export._export_format import ExportFormat, Written
from trimtab.export._older_names import save_tokenizer
from trimtab.export._plain_lora import Factors, Plain, make_plain, plain_factors
from trimtab.export._subject import Subject
from trimtab.files import write_json, write_tensors
from trimtab.surgery.names import entries, known_adapter

_TENSORS = "adapters.safetensors"
_IN_A_LAYER = re.compile(r"(?:.*\.)?layers\.\d+\.(.+)")


class MlxAdapter(ExportFormat):
    """``adapters.safetensors`` and ``adapter_config.json``."""

    summary = "an adapter of mlx-lm: adapters.safetensors and adapter_config.json"
    takes = frozenset({"rank", "error"})
    marks = (_TENSORS,)
    library = "mlx"
    relation = "adapter"

    def check(self, subject: Subject) -> None:
        subject.require_causal("mlx-lm")

    def fill(self, subject: Subject, folder: Path) -> Written:
        model = subject.model
        dora = _is_dora(model)
        plain = Plain([]) if dora else make_plain(subject)
        factors = _dora_factors(model) if dora else plain_factors(model, "an adapter of mlx-lm")
        keys = sorted({_key(one.module) for one in factors})
        rank = max(one.rank for one in factors)
        tensors = {}
        for one in factors:
            tensors[f"{one.module}.lora_a"] = _filled(one.A.float(), rank).T.contiguous()
            tensors[f"{one.module}.lora_b"] = _filled(one.scale * one.B.float().T, rank).contiguous()
            if dora:
                tensors[f"{one.module}.m"] = one.adapter.magnitude.detach().float().clone()
        write_tensors(folder / _TENSORS, tensors, {"format": "mlx"})
        base = base_of(subject.source)
        parameters = {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": keys}
        layers = int(model.config.get_text_config().num_hidden_layers)
        kind = {"fine_tune_type": "dora" if dora else "lora", "num_layers": layers, "lora_parameters": parameters}
        write_json(folder / "adapter_config.json", {"model": base, **kind})
        save_tokenizer(subject.tokenizer, folder)
        _read_back(folder / _TENSORS, factors, dora=dora)
        method = "DoRA" if dora else "LoRA"
        done = [*plain.done, f"wrote {method} of rank {rank} for {len(factors)} modules"]
        return Written(done, plain.notes, _USE.replace("BASE", loaded_as(subject.source)))


_USE = """
```text
mlx_lm.generate --model BASE --adapter-path THIS_FOLDER --prompt "..."
mlx_lm.fuse --model BASE --adapter-path THIS_FOLDER --save-path fused
```
"""


def _entries(model: Any) -> dict[str, Any]:
    return dict(entries(model, known_adapter(model, None, "export")))


def _is_dora(model: Any) -> bool:
    """Whether every adapter is DoRA as mlx-lm computes it: a magnitude for each output, over no row of zeros."""
    return all(
        one.method == "dora"
        and one.adapter.options.magnitude_axis == "output"
        and not one.adapter.zero_rows
        and one.adapter.bias is None
        and one.adapter.A.ndim == 2
        and _IN_A_LAYER.fullmatch(name) is not None
        for name, one in _entries(model).items()
    )


def _dora_factors(model: Any) -> list[Factors]:
    return [Factors(name, one.adapter, one.handle) for name, one in _entries(model).items()]


def _key(module: str) -> str:
    """The name inside its layer, by which mlx-lm knows what is adapted."""
    found = _IN_A_LAYER.fullmatch(module)
    if found is None:
        raise SurgeryError(
            f"{module}: mlx-lm adapts what is inside the layers; `trimtab export RUN OUT --to merged` holds this, and "
            "MLX reads that folder"
        )
    return found[1]


def _filled(tensor: Tensor, rank: int) -> Tensor:
    """``tensor`` ``[its rank, ...]`` with rows of zeros up to ``rank``."""
    return torch.nn.functional.pad(tensor, (0, 0, 0, rank - tensor.shape[0]))


@torch.no_grad()
def _read_back(file: Path, factors: list[Factors], *, dora: bool) -> None:
    """Put what the file says into the adapters, so that it is what is compared with the run."""
    with safe_open(file, "pt") as held:
        for one in factors:
            one.adapter.A.copy_(held.get_tensor(f"{one.module}.lora_a").T[: one.rank])
            one.adapter.B.copy_(held.get_tensor(f"{one.module}.lora_b").T[:, : one.rank] / one.scale)
            if dora:
                one.adapter.magnitude.copy_(held.get_tensor(f"{one.module}.m"))
