"""Several adapters on one model: what a mixed batch, a switch and their memory cost.

    python benchmarks/adapters.py                    SmolLM2-135M, bfloat16, 30 blocks; some minutes
    python benchmarks/adapters.py --layers 8 --repeats 11

A decoding step is 16 rows of one token each, after 64 that are cached. Eight adapters of rank 16 on all seven
projections (three LoRA, three DoRA, one MoRA, and none) have two rows each. The arms are

    one lora              the same batch through one LoRA adapter
    bare                  through none
    8 mixed               through all eight (``trimtab.per_row``)
    8 lora                through eight LoRA adapters
    peft 8 lora           the same with PEFT (``adapter_names``)

    python benchmarks/adapters.py --tokens 64        prompts of 64 tokens in place of a decoding step

All arms live in one process and take turns (A B C A B C ...); the table gives medians and the ratio to one LoRA. Then
come the ratio of eight LoRA adapters to PEFT's, the time of ``set_adapter`` between eight DoRA adapters, and what these
take of memory beside the base, over the bytes of their own tensors: as loaded, and after each was used.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from common import alternate, ratio, show, show_over, write_results
from step import disturb

CACHED, ROWS = 64, 16
MIXED = {
    **{f"lora {number}": "lora" for number in range(3)},
    **{f"dora {number}": "dora" for number in range(3)},
    "mora": "mora",
}
LORAS = {f"lora {number}": "lora" for number in range(8)}


def smollm2(layers: int) -> Any:
    from trimtab.models.load import load_model
    from trimtab.models.locate import locate

    model: Any = load_model(locate("smollm2-135m"), torch.bfloat16, "sdpa")
    del model.model.layers[layers:]
    return model.requires_grad_(False).eval()


def with_adapters(model: Any, methods: dict[str, str], rank: int) -> Any:
    import trimtab

    for name, method in methods.items():
        trimtab.attach(model, trimtab.Rule(match="all-linear", method=method, rank=rank), name=name)
        disturb(model)
    return model


def with_peft(model: Any, methods: dict[str, str], rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    names = iter(methods)
    # PEFT's tensors take the base's dtype here, which is its fastest way: in float32 it would cast every input.
    made: Any = get_peft_model(model, config, adapter_name=next(names), autocast_adapter_dtype=False)
    for name in names:
        made.add_adapter(name, config, autocast_adapter_dtype=False)
    for key, parameter in made.named_parameters():
        if "lora_B" in key:
            torch.nn.init.uniform_(parameter, -1e-4, 1e-4)
    return made.eval()


def pairs(names: list[str | None]) -> list[str | None]:
    """A name for each of the rows, every name for as many, and not side by side."""
    return [names[row % len(names)] for row in range(ROWS)]


def caller(
    model: Any, tokens: int, around: Callable[[], AbstractContextManager[Any]], **more: Any
) -> Callable[[], None]:
    """A function that takes the step of ``model`` in the context of ``around``, which is entered once before."""
    from trimtab.models.earlier_tokens import cache_of, with_cache

    ids = torch.randint(0, 1000, (ROWS, CACHED + tokens), generator=torch.Generator().manual_seed(0))
    context = around()
    context.__enter__()
    with torch.no_grad():
        cache: Any = cache_of(model(input_ids=ids[:, :CACHED], use_cache=True, **more))
    context.__exit__(None, None, None)
    more |= with_cache(model, cache)

    @torch.no_grad()
    def run() -> None:
        model(input_ids=ids[:, CACHED:], use_cache=True, **more)
        cache.crop(-tokens)

    return run


@contextmanager
def mixed(model: Any, names: list[str | None]) -> Iterator[None]:
    import trimtab

    with trimtab.per_row(model, names):
        yield


def steps(said: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each arm's steps."""
    import trimtab

    model = with_adapters(smollm2(said.layers), MIXED, said.rank)
    loras = with_adapters(smollm2(said.layers), LORAS, said.rank)
    peft = with_peft(smollm2(said.layers), LORAS, said.rank)
    mix, eight = pairs([*MIXED, None]), pairs([*LORAS])
    contexts: dict[str, tuple[Any, Callable[[], AbstractContextManager[Any]], dict[str, Any]]] = {
        "one lora": (loras, nullcontext, {}),
        "bare": (loras, lambda: trimtab.disable_adapter(loras), {}),
        "8 mixed": (model, lambda: mixed(model, mix), {}),
        "8 lora": (loras, lambda: mixed(loras, eight), {}),
        "peft 8 lora": (peft, nullcontext, {"adapter_names": eight}),
    }
    runs = {arm: caller(one, said.tokens, around, **more) for arm, (one, around, more) in contexts.items()}
    seconds: dict[str, list[float]] = {arm: [] for arm in runs}
    # Entering a context is no part of a step, so each turn enters its own before the clock starts.
    for number in range(2 + said.repeats):
        for arm, run in runs.items():
            with contexts[arm][1]():
                run()
                began = time.perf_counter()
                run()
                took = time.perf_counter() - began
            if number >= 2:
                seconds[arm].append(took)
    return seconds


def held_bytes() -> int:
    """What all tensors of the process hold, each storage once."""
    gc.collect()
    found = (one for one in gc.get_objects() if issubclass(type(one), torch.Tensor) and one.device.type == "cpu")
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in found}
    return sum(storages.values())


def switching(said: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a switch between eight DoRA adapters, and their memory over the bytes of their own tensors."""
    import trimtab

    model = smollm2(said.layers)
    ids = torch.randint(0, 1000, (1, 8))
    with torch.no_grad():
        model(input_ids=ids)
    names = [f"dora {number}" for number in range(8)]
    before, base = held_bytes(), sum(one.nbytes for one in model.parameters())
    with_adapters(model, dict.fromkeys(names, "dora"), said.rank)
    loaded, own = held_bytes(), sum(one.nbytes for one in model.parameters()) - base
    with torch.no_grad():
        for name in names:
            trimtab.set_adapter(model, name)
            model(input_ids=ids)
    used = held_bytes()
    seconds = alternate({name: partial(trimtab.set_adapter, model, name) for name in names}, said.repeats)
    took = [one for times in seconds.values() for one in times]
    return {
        "own_bytes": own,
        "loaded": (loaded - before) / own,
        "used": (used - before) / own,
        "switch_seconds": statistics.median(took),
        "slowest_seconds": max(took),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=30, help="how many of SmolLM2's 30 blocks")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1, help="of each row in a step")
    parser.add_argument("--repeats", type=int, default=21)
    said = parser.parse_args()

    switched = switching(said)
    seconds = steps(said)
    work = f"{said.tokens} token{'s' if said.tokens > 1 else ''}"
    title = f"bfloat16, {said.layers} blocks, {ROWS} rows after {CACHED} tokens, medians of {said.repeats}"
    show_over(title, {work: seconds}, "one lora", digits=1)
    found = {
        "mixed over one lora": ratio(seconds, "8 mixed", "one lora"),
        "lora over peft": ratio(seconds, "8 lora", "peft 8 lora"),
    }
    rows = [[what, f"{value:.3f}"] for what, value in found.items()]
    rows.append(["a switch, ms", f"{switched['switch_seconds'] * 1e3:.2f}"])
    rows.append(["memory of 8 DoRA over their bytes, loaded", f"{switched['loaded']:.3f}"])
    rows.append(["and after each was used", f"{switched['used']:.3f}"])
    show("ratios", ["what", "value"], rows)
    write_results("adapters", vars(said), {"seconds": seconds, "ratios": found, "switching": switched})


if __name__ == "__main__":
    main()
