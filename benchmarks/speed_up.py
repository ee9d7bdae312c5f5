"""A training step of a PEFT model, as PEFT computes it and with ``trimtab.speed_up``.

    python benchmarks/speed_up.py                             SmolLM2-135M in bfloat16, DoRA and LoRA, 1,024 tokens
    python benchmarks/speed_up.py --layers 8 --repeats 5      a quarter of its blocks: half a minute an arm
    python benchmarks/speed_up.py --dropout 0.05

A step is all of it: forward, loss, backward, AdamW, in rows of 256 tokens, with all seven projections of each block
adapted. The model has the shape of SmolLM2-135M and drawn weights; PEFT's tensors are float32, as `get_peft_model`
makes them on a base in half precision, or bfloat16 (`autocast_adapter_dtype=False`), which is its quicker way and
rounds what is trained. The two of a pair are copies of one model, which take turns in one process (A B A B ...); the
table gives the medians of their seconds and the ratio. They begin with the same numbers: how far apart their losses are
after all the steps is printed, too.

A third one takes its turns with them: the same model without adapters, which carries the gradient back to its input
and trains nothing. That is what both have in common, and no kernels for adapters can bring the ratio below its share.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch

from common import alternate, ratio, show, write_results
from quantised import SHAPES

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def frozen_model(said: argparse.Namespace) -> Any:
    """The model without adapters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, num_hidden_layers=said.layers, tie_word_embeddings=True, **SHAPES["smollm2-135m"]
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(torch.bfloat16).requires_grad_(False).train()


def peft_model(method: str, adapter: str, said: argparse.Namespace) -> Any:
    """PEFT's model, with its adapter's tensors in the dtype ``adapter``."""
    from peft import LoraConfig, get_peft_model

    base = frozen_model(said)
    options = {"use_dora": method == "dora", "lora_dropout": said.dropout, "target_modules": TARGETS}
    made = LoraConfig(r=said.rank, lora_alpha=2 * said.rank, **options)
    return get_peft_model(base, made, autocast_adapter_dtype=adapter == "float32").train()


def stepper(model: Any, tokens: int, losses: list[float]) -> Callable[[], None]:
    """A function that takes one training step of ``model`` and adds its loss to ``losses``."""
    trained = [one for one in model.parameters() if one.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-3) if trained else None
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 49152, (max(1, tokens // 256), min(256, tokens)), generator=draw)

    def step() -> None:
        embedded = model.get_input_embeddings()(ids)
        if optimiser is None:
            embedded.requires_grad_()  # so that the gradient goes through all blocks, as adapters in the first one ask
        loss = model(inputs_embeds=embedded, labels=ids).loss
        loss.backward()
        if optimiser is not None:
            optimiser.step()
            optimiser.zero_grad()
        losses.append(float(loss.detach()))

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["dora", "lora"], choices=["dora", "lora"])
    parser.add_argument("--adapters", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--save", default="speed_up", metavar="NAME", help="results go to results/NAME.json")
    said = parser.parse_args()
    import trimtab

    found, rows = [], []
    for method in said.methods:
        for adapter in said.adapters:
            plain = peft_model(method, adapter, said)
            quick = copy.deepcopy(plain)
            report = trimtab.speed_up(quick)
            losses: dict[str, list[float]] = {"frozen": [], "PEFT": [], "sped up": []}
            models = {"frozen": frozen_model(said), "PEFT": plain, "sped up": quick}
            steps = {arm: stepper(model, said.tokens, losses[arm]) for arm, model in models.items()}
            seconds = alternate(steps, said.repeats)
            one = {"method": method, "adapter": adapter, "layers": len(report.layers), "seconds": seconds}
            one |= {"ratio": ratio(seconds, "sped up", "PEFT"), "losses": losses}
            one |= {"floor": ratio(seconds, "frozen", "PEFT")}
            found.append(one)
            medians = [f"{statistics.median(seconds[arm]):.2f}" for arm in steps]
            ends = [f"{losses[arm][-1]:.3f}" for arm in ("PEFT", "sped up")]
            ratios = [f"{one['ratio']:.3f}", f"{one['floor']:.3f}"]
            rows.append([f"{method}, its tensors in {adapter}", *medians, *ratios, *ends])
            what = {key: getattr(said, key) for key in ("tokens", "rank", "dropout", "layers", "repeats")}
            write_results(said.save, {**what, "threads": torch.get_num_threads()}, found)
    show(
        f"bfloat16, {said.tokens} tokens, rank {said.rank}, dropout {said.dropout}, {said.layers} blocks, medians of "
        f"{said.repeats} steps, {torch.get_num_threads()} threads",
        ["a training step of", "frozen, s", "PEFT, s", "sped up, s", "ratio", "its floor", "last loss", "sped up"],
        rows,
    )


if __name__ == "__main__":
    main()
