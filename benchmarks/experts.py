"""One training step of a small Qwen3-MoE whose experts are adapted, against PEFT's ``target_parameters``.

    python benchmarks/experts.py                                      bfloat16 and float32, 1,024 tokens
    python benchmarks/experts.py --implementations eager grouped_mm batched_mm --tokens 256

The model has random weights: 4 blocks of 32 experts (hidden 512, experts 384 wide, 4 for each token). A step is forward
and backward through the blocks, as in ``step.py``; the adapters, of rank 8, sit on all experts and on nothing else. The
arms live in one process and take turns (A B C A B C ...); the table gives the medians of their seconds and the ratio of
each to the frozen model's. Memory is measured apart, one process for each arm: the rise of resident memory over what
the process held before its first step.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch
from torch import nn

from common import alternate, child, peak_rise_gib, ratio, show, write_results
from step import disturb, stepper

ARMS = ("frozen", "lora", "dora", "peft lora")
SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 128,
}
EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 384,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "intermediate_size": 1024,
}


def made(arm: str, said: argparse.Namespace, dtype: str, implementation: str) -> nn.Module:
    """The blocks, as ``arm`` trains their experts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeModel

    import trimtab

    torch.manual_seed(0)
    model: Any = Qwen3MoeModel(Qwen3MoeConfig(**SIZES, **EXPERTS, num_hidden_layers=said.layers))
    model = model.to(getattr(torch, dtype)).requires_grad_(False).train()
    model.set_experts_implementation(implementation)
    model.config.use_cache = False
    if arm in ("lora", "dora"):
        trimtab.attach(model, trimtab.Rule(match="*.experts", method=arm, rank=said.rank, alpha=2 * said.rank))
    elif arm == "peft lora":
        from peft import LoraConfig, inject_adapter_in_model

        parameters = ["experts.gate_up_proj", "experts.down_proj"]
        config = LoraConfig(r=said.rank, lora_alpha=2 * said.rank, target_modules=[], target_parameters=parameters)
        model = inject_adapter_in_model(config, model)
    blocks: nn.Module = model
    return blocks


def memory(arm: str, said: argparse.Namespace) -> float:
    """GiB by which four steps raise the resident memory of this process at its highest."""
    model = made(arm, said, said.dtypes[0], said.implementations[0])
    step = stepper(model, said.tokens)

    def work() -> None:
        for _ in range(4):
            disturb(model)
            step()

    return peak_rise_gib(work)


def measure(said: argparse.Namespace, dtype: str, implementation: str) -> dict[str, Any]:
    """Seconds of every arm in turn, and the memory of each."""
    models = {arm: made(arm, said, dtype, implementation) for arm in ARMS}
    steps = {arm: stepper(model, said.tokens) for arm, model in models.items()}
    seconds = alternate(steps, said.repeats, lambda arm: disturb(models[arm]))
    same = ["--dtypes", dtype, "--implementations", implementation, "--tokens", str(said.tokens)]
    same += ["--layers", str(said.layers), "--rank", str(said.rank)]
    return {
        "dtype": dtype,
        "implementation": implementation,
        "seconds": {arm: statistics.median(times) for arm, times in seconds.items()},
        "ratio": {arm: ratio(seconds, arm, "frozen") for arm in ARMS},
        "gib": {arm: child(__file__, *same, "--memory", arm) for arm in ARMS},
        "stack_gib": sum(one.nbytes for one in models["frozen"].parameters() if one.dim() == 3) / 1024**3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--implementations", nargs="+", default=["grouped_mm", "eager"])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--name", default="experts")
    parser.add_argument("--memory", choices=ARMS, help=argparse.SUPPRESS)
    said = parser.parse_args()
    torch.set_num_threads(1)
    if said.memory:
        print(json.dumps(memory(said.memory, said)))
        return
    found = []
    for dtype in said.dtypes:
        for implementation in said.implementations:
            one = measure(said, dtype, implementation)
            found.append(one)
            rows = [
                [arm, f"{one['seconds'][arm]:.3f}", f"{one['ratio'][arm]:.3f}", f"{one['gib'][arm]:.3f}"]
                for arm in ARMS
            ]
            title = f"{dtype}, {implementation}, {said.tokens} tokens (all experts: {one['stack_gib']:.2f} GiB)"
            show(title, ["arm", "seconds", "/ frozen", "GiB more"], rows)
    what = {key: value for key, value in vars(said).items() if key not in ("memory", "name")} | SIZES | EXPERTS
    write_results(said.name, what, found)


if __name__ == "__main__":
    main()
