"""What an adapter asks of a GPU, counted without one: launches, bytes to and from memory, and tensors that are kept, of
the seven linear layers of a Llama-8B block, forward and backward.

    python benchmarks/traffic.py                          at 1,024, 4,096 and 16,384 tokens
    python benchmarks/traffic.py --tokens 2048 --rank 64

The layers run on tensors without numbers. Every operation of torch is a launch that reads its arguments and writes its
results; one of ours is one launch, or two where sums are finished by a second. "roof" is the time that bytes and
products would take at the rates of an H200 (4.0 TB/s, 790 TFLOP/s), over that of the frozen layers: a bound, and no
measurement. "norms" is what the norms take once per optimiser step, in launches.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import show, write_results
from trimtab.ops import kernels
from trimtab.ops.frozen_linear import frozen_linear
from trimtab.ops.kernels import plain
from trimtab.ops.low_rank import LowRank, squared_norms
from trimtab.ops.square import Square

plain._CACHED = 1 << 62  # the tensors stand for those of a GPU, where no pass is cut for a processor's caches
LAYERS = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
BANDWIDTH, RATE = 4.0e12, 790e12
FREE = {"view", "t", "detach", "transpose", "slice", "unsqueeze", "_unsafe_view", "reshape", "alias", "as_strided"} | {
    *("expand", "split", "empty", "empty_strided", "empty_like", "new_empty", "unflatten", "select", "lift_fresh"),
    *("split_with_sizes", "permute", "_reshape_alias", "squeeze", "device"),
}
LAUNCHES = {"backward_pass": 2, "squared_norms": 2}


class Counted(TorchDispatchMode):
    """Counts what is launched, and the bytes and products of it."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = self.seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in FREE and any(isinstance(one, Tensor) for one in args):
            read = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
            written = [one for one in tree_leaves(given) if isinstance(one, Tensor)]
            written = written or [args[0]]  # ours that change their first argument
            moved = sum(one.numel() * one.element_size() for one in (*read, *written))
            work = 2 * read[-2].shape[0] * read[-1].numel() if name in ("mm", "addmm", "addmm_") else 0
            if name == "backward_pass" and len(given[4]):  # what is written for the second launch, and read there
                (tokens, rank), (out, _) = given[3].shape, given[4].shape
                moved += 8 * rank * (tokens * math.ceil(out / 128) + out * math.ceil(tokens / 256))
            self.launches += LAUNCHES.get(name, 1)
            self.bytes += moved
            self.seconds += max(moved / BANDWIDTH, work / RATE)
        return given


def parts(method: str, out: int, features: int, rank: int) -> tuple[dict[str, Any], Callable[[Tensor], Tensor] | None]:
    """What a layer is called with beside its weight, and how its norm is computed."""
    norm = {"magnitude": torch.empty(out, requires_grad=True), "norm": torch.empty(out)}
    if method == "frozen":
        return {}, None
    if method.startswith("mora"):
        side = 2 * round(((out + features) * rank) ** 0.5 / 2)
        square, matrix = Square(features, out, side, turn=True), torch.empty(side, side, requires_grad=True)
        given = {"update": square, "tensors": (matrix,)}
        return given | norm, lambda weight: square.squared_norms(weight, torch.empty(out), matrix)
    a, b = torch.empty(rank, features, requires_grad=True), torch.empty(out, rank, requires_grad=True)
    given = {"update": LowRank(2.0), "tensors": (a, b)}
    if method == "lora":
        return given, None
    return given | norm, lambda weight: squared_norms(weight, torch.empty(out), a, b, scale=2.0, axis="output")


def block(method: str, kind: str, tokens: int, rank: int) -> dict[str, float]:
    counted, norms, kept = Counted(), Counted(), 0
    with kernels.using(kind), FakeTensorMode():
        for out, features in LAYERS:
            half = {"dtype": torch.bfloat16}
            x, weight = torch.empty(tokens, features, **half, requires_grad=True), torch.empty(out, features, **half)
            given, norm = parts(method, out, features, rank)
            grad = torch.empty(tokens, out, **half)
            sizes: dict[int, int] = {}

            def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
                sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
                return tensor

            if norm is not None:
                with norms, torch.no_grad():
                    norm(weight).sqrt()
            with counted, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                y = frozen_linear(x, weight, compute="factored", **given)
                y.backward(grad)
            for free in (x, y, weight):
                sizes.pop(free.untyped_storage()._cdata, None)
            kept += sum(sizes.values())
    return {
        "launches": counted.launches,
        "norms": norms.launches,
        "gigabytes": counted.bytes / 1e9,
        "seconds": counted.seconds,
        "kept_mib": kept / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    rows, found = [], []
    for tokens in options.tokens:
        frozen = block("frozen", "plain", tokens, options.rank)
        for method, kind in (
            *(("frozen", "plain"), ("lora", "plain"), ("lora", "triton"), ("dora", "plain"), ("dora", "triton")),
            ("mora + magnitude", "triton"),
        ):
            one = block(method, kind, tokens, options.rank)
            found.append({"tokens": tokens, "method": method, "kernels": kind, **one})
            rows.append(
                [
                    f"{tokens:,}",
                    method,
                    kind,
                    f"{one['launches']:.0f}",
                    f"{one['norms']:.0f}",
                    f"{one['gigabytes']:.2f}",
                    f"{one['seconds'] / frozen['seconds']:.2f}",
                    f"{one['kept_mib']:.0f}",
                ]
            )
    columns = ["tokens", "method", "kernels", "launches", "norms", "GB", "roof", "kept MiB"]
    show("a Llama-8B block's linear layers, forward and backward, counted for a GPU", columns, rows)
    write_results("traffic", {"rank": options.rank, "dtype": "bfloat16"}, found)


if __name__ == "__main__":
    main()
