"""SmolLM2-135M at work after training: bare, with its adapter beside it, and merged.

    python benchmarks/inference.py                        bfloat16 and float32, a minute or two each
    python benchmarks/inference.py --new-tokens 128

decode: one row, token by token with a cache, seconds per token. prefill: 512 tokens of one row at once, logits of the
last one. "serving" is inside ``trimtab.for_inference``, which takes the caller's word that nothing trains. All arms
live in one process and take turns; the table gives medians and the ratio of each to the bare model in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch

from common import alternate, show_over, write_results
from step import adapt, disturb

METHODS = ("lora", "dora", "mora")
ARMS = ("bare", *METHODS, *(f"{method} serving" for method in METHODS), "dora merged", "peft lora", "peft dora")
UNTIL_THE_END = contextlib.ExitStack()


def adapted(model: Any, arm: str, rank: int) -> Any:
    """A copy of ``model`` as ``arm`` serves it."""
    import trimtab

    model = copy.deepcopy(model)
    if arm != "bare":
        model = adapt(model, arm.removesuffix(" merged").removesuffix(" serving"), rank)
        disturb(model)
    if arm.endswith("merged"):
        trimtab.merge(model)
    if arm.endswith("serving"):
        UNTIL_THE_END.enter_context(trimtab.for_inference(model))
    return model.eval()


def decoder(model: Any, new_tokens: int) -> Callable[[], None]:
    """A function that writes ``new_tokens`` tokens after a prompt of 16."""
    from trimtab.models.earlier_tokens import cache_of, with_cache

    prompt = torch.arange(100, 116).unsqueeze(0)

    @torch.inference_mode()
    def run() -> None:
        cache = cache_of(model(input_ids=prompt, use_cache=True))
        token = prompt[:, -1:]
        for _ in range(new_tokens):
            out = model(input_ids=token, use_cache=True, **with_cache(model, cache))
            cache, token = cache_of(out), out.logits[:, -1:].argmax(-1)

    return run


def prefill(model: Any, tokens: int) -> Callable[[], None]:
    """A function that reads ``tokens`` tokens at once."""
    prompt = torch.arange(tokens).unsqueeze(0)

    @torch.inference_mode()
    def run() -> None:
        model(input_ids=prompt, use_cache=False, logits_to_keep=1)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    said = parser.parse_args()

    from trimtab.models.load import load_model
    from trimtab.models.locate import locate

    found = []
    for dtype in said.dtypes:
        bare = load_model(locate("smollm2-135m"), getattr(torch, dtype)).requires_grad_(False)
        models = {arm: adapted(bare, arm, said.rank) for arm in ARMS}
        works = {
            "decode": {arm: decoder(model, said.new_tokens) for arm, model in models.items()},
            "prefill": {arm: prefill(model, said.prompt) for arm, model in models.items()},
        }
        seconds = {work: alternate(steps, said.repeats) for work, steps in works.items()}
        ratios = show_over(
            f"{dtype}, rank {said.rank}, medians of {said.repeats}; ms for one token of decoding and for a prefill of "
            f"{said.prompt}",
            seconds,
            "bare",
            per={"decode": said.new_tokens},
            digits=1,
        )
        found.append({"dtype": dtype, "seconds": seconds, "ratio": ratios})
    what = {"rank": said.rank, "new_tokens": said.new_tokens, "prompt": said.prompt, "repeats": said.repeats}
    write_results("inference", what, found)


if __name__ == "__main__":
    with UNTIL_THE_END:
        main()
