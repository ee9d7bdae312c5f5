"""What adapters beside the weights cost at inference, where it hurts most: one row, few tokens.

    python benchmarks/latency.py                     16 of SmolLM2-135M's blocks, bfloat16 and float32; some minutes
    python benchmarks/latency.py --layers 30 --repeats 51

LoRA's case against adapter blocks (arXiv 2106.09685, section 3 and table 1): they are worked through one after the
other, and at batch 1 there is nothing to hide that behind, while a low-rank update is folded into the weight. A call
goes through the blocks (no embedding, no vocabulary product): 1 token after 64 that are cached, as in decoding, and 16
and 128 tokens at once. The arms are

    base            the bare blocks
    serial B        an adapter block with a bottleneck of B behind each attention and each MLP (Houlsby)
    parallel B      one beside each MLP
    lora            rank 16 on all seven projections, beside the weights
    lora merged     the same, folded in

The adapters' tensors have the model's dtype, so that no arm pays for a cast. All arms live in one process and take
turns (A B C A B C ...); the table gives medians in milliseconds and the ratio of each to the base in the same run.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from common import alternate, show_over, write_results
from step import blocks, disturb

CACHED = 64
"""Tokens in the cache when one more is decoded."""
PROMPTS = (16, 128)


def arms(bottlenecks: list[int], rank: int) -> dict[str, dict[str, Any] | None]:
    """Arm -> the rule that makes it; None: the bare blocks."""
    lora = {"match": "all-linear", "method": "lora", "rank": rank}
    found: dict[str, dict[str, Any] | None] = {"base": None}
    for size in bottlenecks:
        found[f"serial {size}"] = {"match": ["*.self_attn", "*.mlp"], "method": "serial", "bottleneck": size}
    for size in bottlenecks:
        found[f"parallel {size}"] = {"match": "*.mlp", "method": "parallel", "bottleneck": size}
    return {**found, "lora": lora, "lora merged": lora}


def served(model: Any, arm: str, rule: dict[str, Any] | None) -> Any:
    """A copy of ``model`` as ``arm`` serves it."""
    import trimtab

    model = copy.deepcopy(model)
    if rule is not None:
        trimtab.attach(model, trimtab.Rule(**rule, dtype=str(model.dtype).removeprefix("torch.")))
        disturb(model)
    if arm.endswith("merged"):
        trimtab.merge(model)
    return model.eval()


def decoder(model: Any) -> Callable[[], None]:
    """A function that puts one token through, after ``CACHED`` that it has seen already."""
    from trimtab.models.earlier_tokens import cache_of, with_cache

    hidden = torch.randn(1, CACHED + 1, model.config.hidden_size, dtype=model.dtype)
    with torch.inference_mode():
        cache: Any = cache_of(model(inputs_embeds=hidden[:, :CACHED], use_cache=True))
    earlier = with_cache(model, cache)

    @torch.inference_mode()
    def run() -> None:
        model(inputs_embeds=hidden[:, CACHED:], use_cache=True, **earlier)
        cache.crop(-1)

    return run


@torch.inference_mode()
def prefill(model: Any, hidden: torch.Tensor) -> None:
    """Put ``hidden [1, tokens, width]`` through at once."""
    model(inputs_embeds=hidden, use_cache=False)


def works(models: dict[str, Any]) -> dict[str, dict[str, Callable[[], None]]]:
    """Kind of call -> arm -> a function that makes it."""
    found: dict[str, dict[str, Callable[[], None]]] = {"decode": {arm: decoder(model) for arm, model in models.items()}}
    for tokens in PROMPTS:
        base = models["base"]
        hidden = torch.randn(1, tokens, base.config.hidden_size, dtype=base.dtype)
        found[f"{tokens} tokens"] = {arm: partial(prefill, model, hidden) for arm, model in models.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--layers", type=int, default=16, help="how many of SmolLM2's 30 blocks")
    parser.add_argument("--bottlenecks", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=21)
    said = parser.parse_args()

    rules = arms(said.bottlenecks, said.rank)
    found = []
    for dtype in said.dtypes:
        bare = blocks(getattr(torch, dtype), "sdpa", said.layers)
        models = {arm: served(bare, arm, rule) for arm, rule in rules.items()}
        seconds = {kind: alternate(calls, said.repeats) for kind, calls in works(models).items()}
        ratios = show_over(
            f"{dtype}, {said.layers} blocks, one row, medians of {said.repeats}; milliseconds, and over the base",
            seconds,
            "base",
        )
        found.append({"dtype": dtype, "seconds": seconds, "ratio": ratios})
    what = {"layers": said.layers, "rank": said.rank, "cached": CACHED, "repeats": said.repeats}
    write_results("latency", what, found)


if __name__ == "__main__":
    main()
