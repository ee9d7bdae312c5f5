"""Launches, and bytes kept for the backward pass, of the linear layers of a Llama-8B block on a device, by method.

    PYTHONPATH=tests python tests/launches.py --tokens 1024 4096 16384 --kernels plain triton

Nothing is computed: tensors are PyTorch's fake ones on the device of ``accelerator``, and every operation that is no
other look at the same memory counts as one launch. A pass of Triton's counts as one, which it is. What is kept is
counted beyond the parameters and each layer's input and output, which a linear layer followed by anything keeps.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import trimtab
from accelerator import DEVICE, accelerator
from trimtab.bases import _base
from trimtab.ops.kernels import using

aten = torch.ops.aten
LLAMA_8B = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)]
"""``(in, out)`` of q, k, v, o, gate, up and down."""
METHODS: dict[str, dict[str, Any] | None] = {
    "frozen": None,
    "lora": {"method": "lora", "rank": 16},
    "dora": {"method": "dora", "rank": 16},
    "mora": {"method": "mora", "rank": 16},
    "mora, magnitude": {"method": "mora", "rank": 16, "magnitude": True},
}
NO_LAUNCH = (
    "empty",
    "empty_strided",
    "empty_like",
    "new_empty",
    "detach",
    "alias",
    "lift_fresh",
    "_local_scalar_dense",
)


class Launches(TorchDispatchMode):
    """Counts operations that a device would be sent."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()
        self.counts = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 0.0
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        makes = any(isinstance(leaf, Tensor) for leaf in tree_leaves(result))
        makes = makes or func._schema.name.startswith("trimtab::")
        if self.counts and makes and not func.is_view and name not in NO_LAUNCH:
            self.counted[name] += 1
        return result


def measure(
    said: dict[str, Any] | None, tokens: int, *, shapes: list[tuple[int, int]] = LLAMA_8B, kernels: str = "plain"
) -> tuple[int, int]:
    """Launches of a forward and a backward pass of these layers in bfloat16, and bytes kept between the two."""
    launches = Launches()
    kept = 0
    with ExitStack() as stack:
        stack.enter_context(accelerator())
        stack.enter_context(patch.object(_base, "is_plain", _is_plain))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(using(kernels))
        stack.enter_context(launches)
        for in_features, out_features in shapes:
            layer = nn.Linear(in_features, out_features, bias=False, device=DEVICE, dtype=torch.bfloat16)
            model = nn.Sequential(layer.requires_grad_(False))
            if said is not None:
                trimtab.attach(model, trimtab.Rule(match="*", **said))
            x = torch.empty(tokens, in_features, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
            held: dict[int, int] = {}

            def pack(tensor: Tensor, held: dict[int, int] = held) -> Tensor:
                storage = tensor.untyped_storage()
                held[storage._cdata] = storage.nbytes()
                return tensor

            model(x)  # the first pass computes what is kept of the frozen weight
            launches.counts = True
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                y = model(x)
            launches.counts = False
            known = [x, y, *model.parameters(), *model.buffers()]
            for tensor in known:
                held.pop(tensor.untyped_storage()._cdata, None)
            kept += sum(held.values())
            upstream = torch.empty_like(y)
            launches.counts = True
            y.backward(upstream)
            launches.counts = False
    return launches.counted.total(), kept


def _is_plain(weight: Any) -> bool:
    return type(weight.data) in (Tensor, FakeTensor) and weight.dtype in _base.DENSE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096, 16384])
    parser.add_argument("--kernels", nargs="+", default=["plain"], choices=["plain", "triton"])
    parser.add_argument("--json", action="store_true")
    said = parser.parse_args()
    for kernels in said.kernels:
        for tokens in said.tokens:
            for name, method in METHODS.items():
                launches, kept = measure(method, tokens, kernels=kernels)
                row = {"kernels": kernels, "tokens": tokens, "method": name, "launches": launches, "kept": kept}
                line = f"{kernels:7} {tokens:6} {name:16} {launches:5} launches {kept / 2**20:8.1f} MiB kept"
                print(json.dumps(row) if said.json else line, flush=True)


if __name__ == "__main__":
    main()
