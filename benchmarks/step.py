"""One training step of SmolLM2's blocks under every method, against what the frozen blocks themselves cost.

    python benchmarks/step.py                                         bfloat16 and float32, 1,024 tokens
    python benchmarks/step.py --tokens 128 512 1024 2048 4096 8192    all lengths; an hour
    python benchmarks/step.py --dtypes bfloat16 --compile             the compiled arms, too

A step is forward and backward through the 30 blocks (no embedding, no vocabulary product, no loss, no optimiser), in
rows of 256 tokens, with all seven projections adapted. The arms are

    frozen              the bare blocks; the gradient is carried through them to their input: the floor
    full                the same, and every weight of the seven projections gets its gradient
    lora/dora/mora      ours
    dense dora          the formula written plainly: build W' = m (W + s B A) / ||W + s B A||, then one linear layer
    peft lora/dora      PEFT's own
    ... compiled        the same with every block under torch.compile
    ... no passes       the same, wrong: the passes over [tokens, out] are left out. What it saves is more than any
                        kernels for these passes can

All arms live in one process and take turns (A B C A B C ...); the table gives the medians of their seconds and the
ratio of each to the frozen floor in the same run. Trained tensors change between two steps, as an optimiser would
change them, so that nothing can be kept from the step before. Memory is measured apart, one process for each arm:
the rise of resident memory over what the process held before its first step.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import alternate, child, peak_rise_gib, ratio, show, write_results

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ARMS = ("frozen", "full", "lora", "dora", "mora", "dense dora", "peft lora", "peft dora")
COMPILED = ("frozen compiled", "lora compiled", "dora compiled", "mora compiled")
NO_PASSES = ("lora no passes", "dora no passes")


class DenseDora(nn.Module):
    """DoRA as its formula reads: the honest rival. ``B A`` is multiplied out, nothing is kept from step to step."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.A = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
        self.B = nn.Parameter(torch.zeros(layer.out_features, rank))
        self.m = nn.Parameter(layer.weight.detach().float().norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight
        total = weight + (2.0 * self.B @ self.A).to(weight.dtype)
        norm = total.detach().norm(dim=1, dtype=torch.float32)
        return F.linear(x, total * (self.m / norm).to(weight.dtype).unsqueeze(1), self.layer.bias)


def blocks(dtype: torch.dtype, attention: str, layers: int) -> nn.Module:
    """The blocks of SmolLM2-135M: a model from input embeddings to last hidden states."""
    from trimtab.models.load import load_model
    from trimtab.models.locate import locate

    model: Any = load_model(locate("smollm2-135m"), dtype, attention)
    del model.model.layers[layers:]
    model.model.norm = nn.Identity()
    model.model.config.use_cache = False
    body: nn.Module = model.model.requires_grad_(False).train()
    return body


def with_peft(model: nn.Module, arm: str, rank: int, targets: Sequence[str], dtype: torch.dtype) -> nn.Module:
    """``model``, whose weights are ``dtype``, with PEFT's LoRA or DoRA on ``targets``."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, use_dora=arm == "peft dora", target_modules=list(targets))
    # PEFT's tensors take the base's dtype here, which is its fastest way: in float32 it would cast every input.
    return inject_adapter_in_model(config, model).to(dtype)


def adapt(model: nn.Module, arm: str, rank: int) -> nn.Module:
    """``model`` as ``arm`` trains it. Raises KeyError for an unknown arm."""
    import trimtab

    method, compiled = arm.removesuffix(" compiled").removesuffix(" no passes"), arm.endswith(" compiled")
    if method in ("lora", "dora", "mora"):
        options = {} if method == "mora" else {"alpha": 2 * rank}
        trimtab.attach(model, trimtab.Plan([trimtab.Rule(match="all-linear", method=method, rank=rank, **options)]))
    elif method == "dense dora":
        for module in list(model.modules()):
            for name in TARGETS:
                if hasattr(module, name):
                    setattr(module, name, DenseDora(getattr(module, name), rank))
    elif method.startswith("peft"):
        model = with_peft(model, method, rank, TARGETS, model.dtype)  # type: ignore[arg-type]
    elif method == "full":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.split(".")[-2] in TARGETS)
    elif method != "frozen":
        raise KeyError(arm)
    if compiled:
        for block in model.layers:  # type: ignore[union-attr]
            block.compile()
    return model


@torch.no_grad()
def disturb(model: nn.Module) -> None:
    """Change every trained tensor a little, as an optimiser would."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.empty_like(parameter).uniform_(-1e-4, 1e-4))


class NoPasses:
    """A set of kernels that takes no time, and gives nothing."""

    def forward(self, product: Tensor, **_: Any) -> Tensor:
        return product

    def backward(self, grad: Tensor, *, thin: Any, witness: Tensor | None, **_: Any) -> Any:
        from trimtab.ops.kernels.contract import BackwardPass

        total = None if witness is None else torch.empty(grad.shape[1])
        return BackwardPass(grad, None, total, torch.zeros_like(thin.inner), torch.zeros_like(thin.b))


def without_passes(step: Callable[[], None]) -> Callable[[], None]:
    """``step`` without the passes over ``[tokens, out]`` that its adapters add."""
    from trimtab.ops import frozen_linear

    def other() -> None:
        with mock.patch.object(frozen_linear, "kernels_for", return_value=NoPasses()):
            step()

    return other


def stepper(model: Any, tokens: int) -> Callable[[], None]:
    """A function that takes one step of ``model`` on ``tokens`` tokens."""
    generator = torch.Generator().manual_seed(0)
    rows, length = max(1, tokens // 256), min(256, tokens)
    x = torch.randn(rows, length, model.config.hidden_size, generator=generator).to(model.dtype).requires_grad_()
    upstream = torch.randn(x.shape, generator=generator).to(model.dtype)

    def step() -> None:
        model(inputs_embeds=x).last_hidden_state.backward(upstream)
        x.grad = None
        for parameter in model.parameters():
            parameter.grad = None

    return step


def memory(arm: str, dtype: str, tokens: int, said: argparse.Namespace) -> float:
    """GiB by which four steps raise the resident memory of this process at its highest."""
    model = adapt(blocks(getattr(torch, dtype), said.attention, said.layers), arm, said.rank)
    step = stepper(model, tokens)

    def work() -> None:
        for _ in range(4):
            disturb(model)
            step()

    return peak_rise_gib(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS + COMPILED + NO_PASSES, metavar="ARM")
    parser.add_argument("--compile", action="store_true", help="the compiled arms, too")
    parser.add_argument("--memory", action="store_true", help="peak memory, too: one more process for each arm")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"])
    parser.add_argument("--save", default="step", metavar="NAME", help="results go to results/NAME.json")
    parser.add_argument("--child", nargs=3, metavar=("ARM", "DTYPE", "TOKENS"), help=argparse.SUPPRESS)
    said = parser.parse_args()
    settings = ["--rank", str(said.rank), "--layers", str(said.layers), "--attention", said.attention]
    if said.child:
        arm, dtype, tokens = said.child
        print(json.dumps(memory(arm, dtype, int(tokens), said)))
        return

    arms = [*dict.fromkeys(["frozen", *said.arms, *(COMPILED if said.compile else ())])]
    found = []
    for dtype in said.dtypes:
        models = {
            arm: adapt(blocks(getattr(torch, dtype), said.attention, said.layers), arm, said.rank) for arm in arms
        }
        for tokens in said.tokens:
            torch.compiler.reset()
            steps = {arm: stepper(model, tokens) for arm, model in models.items()}
            steps |= {arm: without_passes(step) for arm, step in steps.items() if arm in NO_PASSES}
            seconds = alternate(steps, said.repeats, lambda arm: disturb(models[arm]))  # noqa: B023
            rise = {arm: child(__file__, "--child", arm, dtype, str(tokens), *settings) for arm in arms if said.memory}
            show(
                f"{dtype}, {tokens} tokens, rank {said.rank}, {said.layers} blocks, {said.attention} attention, "
                f"medians of {said.repeats}",
                ["arm", "seconds", "/ frozen", *(["peak rise, GiB"] if said.memory else [])],
                [
                    [
                        arm,
                        f"{statistics.median(seconds[arm]):.3f}",
                        f"{ratio(seconds, arm, 'frozen'):.3f}",
                        *([f"{rise[arm]:.2f}"] if said.memory else []),
                    ]
                    for arm in arms
                ],
            )
            found.append(
                {
                    "dtype": dtype,
                    "tokens": tokens,
                    "seconds": seconds,
                    "ratio": {arm: ratio(seconds, arm, "frozen") for arm in arms},
                    "peak_rise_gib": rise,
                }
            )
            what = {key: getattr(said, key) for key in ("rank", "layers", "repeats", "attention")}
            write_results(said.save, what, found)


if __name__ == "__main__":
    main()
