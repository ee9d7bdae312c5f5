"""What the time of a step is spent on: every operation that an adapter adds to SmolLM2's blocks, by itself, and the
bound that their sum implies.

    python benchmarks/parts.py                                        bfloat16 and float32, 1,024 tokens
    python benchmarks/parts.py --tokens 128 1024 4096 --rank 64
    python benchmarks/parts.py --kinds int8 nf4 --save parts-quantised       over quantised blocks

Each operation of the seven projections of one block runs alone, on tensors of its own, the operations taking turns;
the table gives the sums of medians over the seven projections and their share of a step (forward and backward) of the
frozen block. A step of LoRA is the frozen step and the six thin products at least; DoRA adds the norm, the ratio and
its gradient. MoRA multiplies the input with its square, chunk by chunk onto the outputs that each feeds, and takes the
gradient back the same way; the input's gradient goes through the square or through the weight with the update added,
whichever costs less. The bound of a method is 1 and the shares of its operations: what a step over the
frozen floor costs if everything between the operations is free. (A compiler that fuses them can go below it;
operations in a row cannot.)
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor

import quantised
from common import alternate, show, write_results
from step import blocks, stepper
from trimtab.methods import mora
from trimtab.ops.square import Square

SHAPES = {
    "q_proj": (576, 576),
    "k_proj": (192, 576),
    "v_proj": (192, 576),
    "o_proj": (576, 576),
    "gate_proj": (1536, 576),
    "up_proj": (1536, 576),
    "down_proj": (576, 1536),
}
FROZEN = ("x W'", "dy W")
LORA = ("x A'", "y += (x A') B'", "dy B", "dx += (dy B) A", "dA", "dB")
DORA = ("norm: W A'", "y *= c", "sum of dy y", "W *= c")
MORA = ("y += x N'", "dM")
MORA_BACK = ("dx += dy N", "W + dV")  # one of them
PARTS = (*FROZEN, *LORA, *DORA, *MORA, *MORA_BACK)


def square_operations(
    x: Tensor, y: Tensor, dx: Tensor, dy: Tensor, w: Tensor, rank: int
) -> dict[str, Callable[[], object]]:
    """MoRA's part of `operations`; ``N`` is the square, turned for the chunk that it meets."""
    out_features, in_features = w.shape
    side = mora.side(out_features, in_features, mora.Options(rank=rank))
    square = Square(in_features, out_features, side, turn=True)
    matrix, width = torch.randn(side, side) * 1e-3, min(square.groups * side, out_features)
    laid, pairs = torch.zeros_like(y[:, :width]), []
    for chunk, columns in enumerate(square.columns()):
        group, turned = chunk % square.groups, torch.randn(side, columns.stop - columns.start, dtype=x.dtype) * 1e-3
        rows = slice(group * side, min((group + 1) * side, width))
        pairs.append((columns, rows, turned[: rows.stop - rows.start]))

    def forward() -> None:
        target = y if width == out_features else laid.zero_()
        for columns, rows, part in pairs:
            target[:, rows].addmm_(x[:, columns], part.t())
        if width < out_features:
            for piece in y.split(width, 1):
                piece.add_(laid[:, : piece.shape[1]])

    def back() -> None:
        for columns, rows, part in pairs:
            dx[:, columns].addmm_(dy[:, rows], part)

    def gradient() -> None:
        if width < out_features:
            first, *others = dy.split(width, 1)
            total = first.clone()
            for piece in others:
                total[:, : piece.shape[1]].add_(piece)
        for columns, rows, _ in pairs:
            dy[:, rows].t().mm(x[:, columns])

    return {
        "y += x N'": forward,
        "dM": gradient,
        "dx += dy N": back,
        "W + dV": lambda: square.fold(w, None, (matrix,)),
    }


def operations(shape: tuple[int, int], tokens: int, rank: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Each operation of a step of one adapted projection ``[out, in]``, by its name."""
    out_features, in_features = shape
    draw = partial(torch.randn, dtype=dtype)
    x, y, dy, dx = (draw(tokens, width) for width in (in_features, out_features, out_features, in_features))
    w, a, b = draw(out_features, in_features), draw(rank, in_features) * 1e-3, draw(out_features, rank) * 1e-3
    inner, back, ratio = draw(tokens, rank), draw(tokens, rank), draw(out_features) * 1e-3
    return {
        "x W'": lambda: x.mm(w.t()),
        "dy W": lambda: dy.mm(w),
        "x A'": lambda: x.mm(a.t()),
        "y += (x A') B'": lambda: y.addmm_(inner, b.t()),
        "dy B": lambda: dy.mm(b),
        "dx += (dy B) A": lambda: dx.addmm_(back, a),
        "dA": lambda: back.t().mm(x),
        "dB": lambda: inner.t().mm(dy),
        "norm: W A'": lambda: w.mm(a.t()),
        "y *= c": lambda: torch.addcmul(y, y, ratio, out=y),
        "sum of dy y": lambda: (dy * y).sum(0),
        "W *= c": lambda: torch.addcmul(w, w, ratio.unsqueeze(1)),
        **square_operations(x, y, dx, dy, w, rank),
    }


@torch.no_grad()
def measure(tokens: int, rank: int, dtype: torch.dtype, kind: str, repeats: int) -> dict[str, float]:
    """Seconds of each operation, summed over the projections of one block, and of the step of a frozen block that is
    stored as ``kind``."""
    works = {
        f"{name} {operation}": work
        for name, shape in SHAPES.items()
        for operation, work in operations(shape, tokens, rank, dtype).items()
    }
    seconds = {work: statistics.median(times) for work, times in alternate(works, repeats).items()}
    found = {part: sum(seconds[f"{name} {part}"] for name in SHAPES) for part in PARTS}
    with torch.enable_grad():
        block = blocks(dtype, "sdpa", 1) if kind == "none" else quantised.blocks(kind, "smollm2-135m", 1, dtype)
        step = stepper(block, tokens)
        found["frozen step"] = statistics.median(alternate({"step": step}, repeats)["step"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--kinds", nargs="+", default=["none"], choices=quantised.KINDS)
    parser.add_argument("--save", default="parts", metavar="NAME", help="results go to results/NAME.json")
    said = parser.parse_args()

    found = []
    for kind, dtype in product(said.kinds, said.dtypes):
        for tokens in said.tokens:
            seconds = measure(tokens, said.rank, getattr(torch, dtype), kind, said.repeats)
            share = {part: time / seconds["frozen step"] for part, time in seconds.items()}
            lora = 1 + sum(share[part] for part in LORA)
            bounds = {
                "lora": lora,
                "dora": lora + sum(share[part] for part in DORA),
                "mora": 1 + sum(share[part] for part in MORA) + min(share[part] for part in MORA_BACK),
            }
            rows = [[part, f"{seconds[part] * 1e3:.2f}", f"{share[part]:.3f}"] for part in ("frozen step", *PARTS)]
            rows += [[f"bound of {method}", "", f"{bound:.3f}"] for method, bound in bounds.items()]
            stored = "" if kind == "none" else f"{kind}, "
            show(
                f"{stored}{dtype}, {tokens} tokens, rank {said.rank}: one block of SmolLM2, medians of {said.repeats}",
                ["part", "ms", "/ frozen step"],
                rows,
            )
            found.append({"kind": kind, "dtype": dtype, "tokens": tokens, "seconds": seconds, "bound": bounds})
    write_results(said.save, {"rank": said.rank, "repeats": said.repeats}, found)


if __name__ == "__main__":
    main()
