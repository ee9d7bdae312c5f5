"""Training steps on quantised blocks, against the frozen quantised blocks, and what quantising saves in memory.

    python benchmarks/quantised.py                        8 random blocks of SmolLM2-135M's shape, 1,024 tokens
    python benchmarks/quantised.py --layers 30 --memory 3 as many as the model has, and peak memory
    python benchmarks/quantised.py --compile              with the blocks compiled, too
    python benchmarks/quantised.py --shape llama-3.1-8b --layers 1 --save quantised-8b    blocks of that model's shape
    python benchmarks/quantised.py --dtype float32 --save quantised-float32    as a run computes without bfloat16
    python benchmarks/quantised.py --primitives           what dequantising one weight costs

A step is forward and backward through the blocks in bfloat16 or float32 (no embedding, no vocabulary product, no loss,
no optimiser). For each kind (none, int8, nf4) the arms are

    frozen          the bare blocks; a quantised weight is dequantised once in each pass and multiplied with: the floor
    bitsandbytes    the same through bitsandbytes' own layers, as they train (its repacking for AVX512-BF16 is off,
                    since it destroys the weight for training)
    lora/dora/mora  ours on all seven projections
    ... compiled    the same with every block under torch.compile

All arms of a kind take turns in one process (A B C A B C ...). Memory is measured apart, in processes that hold one arm
each: the rise of resident memory from before the blocks are made to the highest point of four steps, the median over
processes. What a kind saves is given as a share of what its weights shrank by. (Of 8 blocks that is a few dozen MiB,
which the allocator's holes blur: take more blocks.)
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common import alternate, child, peak_rise_gib, ratio, show, write_results
from step import COMPILED, TARGETS, adapt, disturb, stepper

KINDS = ("none", "int8", "nf4")
ARMS = ("frozen", "bitsandbytes", "lora", "dora", "mora")
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
GIB = 1024**3


def blocks(kind: str, shape: str, layers: int, dtype: torch.dtype) -> Any:
    """Random blocks of a model's shape in ``dtype``, quantised one weight at a time."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaModel, LlamaRotaryEmbedding

    from trimtab import bases

    config = LlamaConfig(vocab_size=8, num_hidden_layers=layers, use_cache=False, **SHAPES[shape])
    with torch.device("meta"):
        model: Any = LlamaModel(config)
        model = model.to(dtype)
    model.rotary_emb, model.norm = LlamaRotaryEmbedding(config), nn.Identity()
    for module in list(model.modules()):
        for name, inner in list(module._modules.items()):
            if name in TARGETS and isinstance(inner, nn.Linear):
                dense = nn.Linear(inner.in_features, inner.out_features, bias=False, dtype=dtype)
                base = bases.find(dense)
                assert base is not None
                module._modules[name] = dense if kind == "none" else bases.quantise(base, kind)
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                module._parameters[name] = nn.Parameter(torch.ones(parameter.shape, dtype=dtype))
    return model.requires_grad_(False).train()


def arm_of(arm: str, kind: str, said: argparse.Namespace) -> Any:
    """The blocks as ``arm`` runs them."""
    model = blocks(kind, said.shape, said.layers, getattr(torch, said.dtype))
    if arm != "bitsandbytes":
        return adapt(model, arm, said.rank)
    for module in model.modules():
        theirs = next((base for base in type(module).__mro__ if base.__module__ == "bitsandbytes.nn.modules"), None)
        if theirs is not None:
            module.__class__ = theirs
            module.support_avx512bf16_for_cpu = False
    return model


def memory(arm: str, kind: str, said: argparse.Namespace) -> dict[str, float]:
    """GiB of the weights, and by which making the blocks and four steps raise this process's resident memory."""
    import trimtab.models.load  # noqa: F401 -- what any run imports is not what is measured
    from trimtab import bases

    if kind != "none":  # nor is bitsandbytes itself
        base = bases.find(nn.Linear(64, 64))
        assert base is not None
        bases.quantise(base, kind)
    held: list[Any] = []

    def work() -> None:
        held.append(arm_of(arm, kind, said))
        step = stepper(held[0], said.tokens)
        for _ in range(4):
            disturb(held[0])
            step()

    rise = peak_rise_gib(work)
    frozen = [parameter for parameter in held[0].parameters() if not parameter.requires_grad]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in frozen)
    return {"rise": rise, "weights": weights / GIB}


def primitives(repeats: int) -> dict[str, list[float]]:
    """Seconds for one weight of 1,536 x 576: to dequantise it, and to multiply 1,024 tokens with it."""
    from bitsandbytes import functional

    from trimtab import bases

    dense = nn.Linear(576, 1536, bias=False, dtype=torch.bfloat16)
    base = bases.find(dense)
    assert base is not None
    handles: dict[str, Any] = {kind: bases.find(bases.quantise(base, kind)) for kind in ("int8", "nf4", "torchao_int8")}
    x = torch.randn(1024, 576, dtype=torch.bfloat16)
    stored: Tensor
    stored, scales = handles["int8"].module.weight.data, handles["int8"].module.weight.SCB / 127
    packed, state = functional.quantize_4bit(dense.weight.data, quant_type="nf4", compress_statistics=True)

    def in_one_go() -> Tensor:
        return stored.to(torch.bfloat16).mul_(scales.unsqueeze(1))

    arms: dict[str, Callable[[], Tensor]] = {f"{kind}: ours": handle.weight for kind, handle in handles.items()}
    arms["int8: as bitsandbytes does"] = in_one_go
    arms["nf4: bitsandbytes.functional"] = lambda: functional.dequantize_4bit(packed, state)
    arms["product with 1,024 tokens"] = lambda: dense(x)
    with torch.no_grad():
        return alternate(arms, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS + COMPILED, metavar="ARM")
    parser.add_argument("--compile", action="store_true", help="the compiled arms, too")
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--memory", type=int, default=0, metavar="N", help="peak memory, too: N more processes for each arm"
    )
    parser.add_argument("--primitives", action="store_true", help="only what dequantising one weight costs")
    parser.add_argument("--save", default="quantised", metavar="NAME", help="results go to results/NAME.json")
    parser.add_argument("--child", nargs=2, metavar=("ARM", "KIND"), help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.child:
        arm, kind = said.child
        print(json.dumps(memory(arm, kind, said)))
        return
    if said.primitives:
        seconds = primitives(said.repeats)
        rows = [[arm, f"{1000 * statistics.median(taken):.3f}"] for arm, taken in seconds.items()]
        show(f"one weight of 1,536 x 576 in bfloat16, medians of {said.repeats}", ["", "milliseconds"], rows)
        write_results("quantised_primitives", {"repeats": said.repeats}, seconds)
        return

    settings = ["--tokens", str(said.tokens), "--layers", str(said.layers), "--rank", str(said.rank)]
    settings += ["--shape", said.shape, "--dtype", said.dtype]
    wanted = dict.fromkeys(["frozen", *said.arms, *(COMPILED if said.compile else ())])
    found: dict[str, Any] = {}
    for kind in said.kinds:
        arms = [arm for arm in wanted if kind != "none" or arm != "bitsandbytes"]
        models = {arm: arm_of(arm, kind, said) for arm in arms}
        torch.compiler.reset()
        steps = {arm: stepper(model, said.tokens) for arm, model in models.items()}
        seconds = alternate(steps, said.repeats, lambda arm: disturb(models[arm]))  # noqa: B023
        models.clear()
        steps.clear()
        peaks = {
            arm: _median([child(__file__, "--child", arm, kind, *settings) for _ in range(said.memory)])
            for arm in arms
            if said.memory
        }
        found[kind] = {"seconds": seconds, "memory": peaks}
        found[kind]["ratio"] = {arm: ratio(seconds, arm, "frozen") for arm in arms}
        rows = []
        for arm in arms:
            row = [arm, f"{statistics.median(seconds[arm]):.3f}", f"{ratio(seconds, arm, 'frozen'):.3f}"]
            row.append(f"{ratio(seconds, arm, 'lora'):.3f}" if "lora" in arms else "-")
            if said.memory:
                row += [f"{1024 * peaks[arm]['rise']:.0f}", f"{1024 * peaks[arm]['weights']:.0f}"]
                full = found.get("none", {}).get("memory", {}).get(arm)
                row.append(f"{_saved(full, peaks[arm]):.2f}" if full and kind != "none" else "-")
            rows.append(row)
        columns = ["arm", "seconds", "/ frozen", "/ lora"]
        columns += ["peak rise, MiB", "weights, MiB", "saved / shrunk"] if said.memory else []
        size = f"{said.tokens} tokens, rank {said.rank}, {said.layers} blocks of {said.shape}"
        show(f"{kind}, {said.dtype}, {size}, medians of {said.repeats}", columns, rows)
        what = {key: getattr(said, key) for key in ("shape", "dtype", "tokens", "layers", "rank", "repeats", "memory")}
        write_results(said.save, what, found)


def _median(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def _saved(full: dict[str, float], small: dict[str, float]) -> float:
    """By how much the peak fell, as a share of what the weights shrank by."""
    return (full["rise"] - small["rise"]) / (full["weights"] - small["weights"])


if __name__ == "__main__":
    main()
