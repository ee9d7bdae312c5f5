"""One adapted projection, forward and backward: our forms against each other, the plain formula, PEFT and the bare
layer.

    python benchmarks/layer.py                                        the default grid, bfloat16 and float32
    python benchmarks/layer.py --dtypes float32 --tokens 1 8192       some of it
    python benchmarks/layer.py --shapes 8192x8192 --ranks 512         others
    python benchmarks/layer.py --fit                                  the weights of trimtab.ops.cost, measured anew

The work is the same for all: the output, the gradient of the input, the gradients of what is trained. "dense" is DoRA
as its formula reads (B A multiplied out, one norm, one linear layer); "folded" and "factored" are our DoRA with its
form overruled, "dora" is the one that the cost model chooses, and "regret" is its time over that of the better one.
Peak memory is what the allocator handed out at its highest during one forward and backward, beyond what was there
before, in units of one output [tokens, out].
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common import alternate, peak_allocation, ratio, show, write_results
from step import DenseDora, with_peft

SHAPES = ["512x512", "192x576", "576x576", "1536x576", "576x1536", "2048x2048", "1024x4096", "4096x4096", "8192x8192"]
RANKS = [4, 16, 64, 512]
TOKENS = [1, 16, 128, 1024, 8192]
ARMS = ("bare", "dense", "lora", "dora", "folded", "factored", "mora", "peft lora", "peft dora")
# A step of this many multiplications is as much as the default grid has patience for.
MOST = 3e10


def layer(arm: str, bare: nn.Linear, rank: int) -> nn.Module:
    """``bare`` as ``arm`` adapts it, its trained tensors away from their start."""
    import trimtab

    holder: nn.Module = nn.Sequential(bare)
    options: dict[str, Any] = {"rank": rank}
    if arm == "dense":
        holder = nn.Sequential(DenseDora(bare, rank))
    elif arm.startswith("peft"):
        holder = with_peft(holder, arm, rank, ["0"], bare.weight.dtype)
    elif arm != "bare":
        if arm in ("folded", "factored"):
            options["compute"] = arm
        method = arm if arm in ("lora", "mora") else "dora"
        trimtab.attach(holder, trimtab.Plan([trimtab.Rule(match="0", method=method, **options)]))
    with torch.no_grad():
        for parameter in holder.parameters():
            if parameter.requires_grad and parameter.dim() == 2:
                parameter.add_(torch.randn_like(parameter) * 1e-3)
    return holder


def stepper(module: nn.Module, x: Tensor, upstream: Tensor) -> Callable[[], None]:
    """Forward and backward of ``module``."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def step() -> None:
        module(x).backward(upstream)
        x.grad = None
        for parameter in trained:
            parameter.grad = None

    return step


def measure(
    shape: tuple[int, int], rank: int, tokens: int, dtype: torch.dtype, arms: list[str], repeats: int
) -> dict[str, Any]:
    """Seconds and peak memory of every arm."""
    torch.manual_seed(0)
    out_features, in_features = shape
    bare = nn.Linear(in_features, out_features, bias=False, dtype=dtype).requires_grad_(False)
    x = torch.randn(tokens, in_features, dtype=dtype, requires_grad=True)
    upstream = torch.randn(tokens, out_features, dtype=dtype)
    steps = {arm: stepper(layer(arm, bare, rank), x, upstream) for arm in arms}
    seconds = alternate(steps, repeats)
    unit = tokens * out_features * dtype.itemsize
    return {"seconds": seconds, "peak": {arm: peak_allocation(step) / unit for arm, step in steps.items()}}


def fit() -> None:
    """Print how many passes over one element, in units of one in-place product with the ratio, each elementary
    operation takes."""
    from trimtab.ops.low_rank import LowRank
    from trimtab.ops.ratio import ratio_of

    sizes = ((512, 512), (1024, 1536), (4096, 2048))
    rows = []
    for dtype, (tokens, features) in itertools.product((torch.float32, torch.bfloat16), sizes):
        values = torch.randn(tokens, features, dtype=dtype)
        ratio_out, ratio_rows = ratio_of(torch.ones(features), torch.ones(features), dtype), torch.ones(tokens)
        works: dict[str, Callable[[], object]] = {
            "ratio in place": partial(ratio_out.times, values, in_place=True),
            "ratio apart": partial(ratio_out.times, values),
        }
        for rank in RANKS:
            low = torch.randn(tokens, rank, dtype=dtype) * 1e-6
            tensors = torch.randn(rank, features), torch.randn(tokens, rank)
            works[f"add r{rank}"] = partial(values.addmm_, low, tensors[0].to(dtype))
            works[f"fold r{rank}"] = partial(LowRank(1.0).fold, values, None, tensors)
            works[f"fold, ratio r{rank}"] = partial(LowRank(1.0).fold, values, ratio_rows, tensors)
        seconds = alternate(works, 15)
        passes = [ratio(seconds, work, "ratio in place") for work in works]
        rows.append([f"{str(dtype)[6:]} {tokens}x{features}", *(f"{one:.2f}" for one in passes)])
    show("passes over one element", ["", *works], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="OUTxIN")
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--fit", action="store_true", help="measure the weights of the cost model, and nothing else")
    parser.add_argument("--every", action="store_true", help="steps of any size, not only those of a second or less")
    said = parser.parse_args()
    if said.fit:
        fit()
        return

    arms = list(dict.fromkeys(["bare", "dense", "dora", *said.arms]))
    found, rows = [], []
    for dtype, text, rank, tokens in itertools.product(said.dtypes, said.shapes, said.ranks, said.tokens):
        out_features, in_features = (int(side) for side in text.split("x"))
        shape = out_features, in_features
        work = 2 * tokens * shape[0] * shape[1] * (1 if dtype == "bfloat16" else 5) + rank * shape[0] * shape[1]
        if rank > min(shape) // 2 or (work > MOST and not said.every):
            continue
        one = measure(shape, rank, tokens, getattr(torch, dtype), arms, said.repeats)
        seconds = one["seconds"]
        forms = [statistics.median(seconds[form]) for form in ("folded", "factored") if form in seconds]
        regret = statistics.median(seconds["dora"]) / min(forms) if forms else None
        where = {"dtype": dtype, "shape": shape, "rank": rank, "tokens": tokens}
        medians = {arm: statistics.median(times) for arm, times in seconds.items()}
        found.append({**where, "seconds": medians, "peak": one["peak"], "regret": regret})
        rows.append(
            [
                f"{dtype[:4]} {text} r{rank} t{tokens}",
                f"{statistics.median(seconds['bare']) * 1e3:.2f}",
                *(f"{ratio(seconds, arm, 'bare'):.2f}" for arm in arms[1:]),
                f"{ratio(seconds, 'dora', 'dense'):.2f}",
                "" if regret is None else f"{regret:.2f}",
                *(f"{one['peak'][arm]:.1f}" for arm in ("dense", "dora")),
            ]
        )
        print("  ".join(rows[-1]), flush=True)
        write_results("layer", {"repeats": said.repeats, "threads": torch.get_num_threads()}, found)
    show(
        f"times over the bare layer's, medians of {said.repeats}; peaks in outputs",
        ["", "bare ms", *arms[1:], "dora/dense", "regret", "peak dense", "peak dora"],
        rows,
    )
    summary = []
    for dtype, tokens in itertools.product(said.dtypes, said.tokens):
        there = [one["seconds"] for one in found if (one["dtype"], one["tokens"]) == (dtype, tokens)]
        ratios = sorted(one["dora"] / one["dense"] for one in there)
        if ratios:
            low = sum(each < 0.8 for each in ratios) / len(ratios)
            numbers = (f"{each:.2f}" for each in (ratios[0], statistics.median(ratios), ratios[-1], low))
            summary.append([f"{dtype}, {tokens} tokens", str(len(ratios)), *numbers])
    show("DoRA over the dense formula", ["", "shapes", "best", "median", "worst", "share below 0.8"], summary)


if __name__ == "__main__":
    main()
