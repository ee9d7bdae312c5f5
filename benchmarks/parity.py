"""Parity with PEFT: from the same start through the same steps to the same numbers, and both ways through a folder.

    python benchmarks/parity.py                           tiny random models, a few seconds
    python benchmarks/parity.py --model smollm2-135m      the real one, a few minutes and 4 GB
    python benchmarks/parity.py --dtype float64           the formulas alone: what is left is no rounding
    python benchmarks/parity.py --steps 20 --json parity.json

Everything is float32 (or float64), without dropout. A difference is the largest one over all numbers of a tensor,
divided by the largest of these:

    outputs, gradients, tensors     trimtab against PEFT, before the first and after the last step of AdamW; gradients
                                    are those of A, B and the magnitude, tensors these themselves
    ours -> PEFT                    outputs of PeftModel.from_pretrained(base, folder saved by trimtab)
    PEFT -> ours                    outputs of trimtab.load_adapter(base, folder saved by PEFT)
    merged                          outputs of trimtab.merge against PEFT's merge_and_unload

The two train separately after the start, and AdamW divides a gradient by its size: where a gradient is hardly more than
its rounding, the two go different ways at full speed. So the tensors differ by more with every step, and the outputs,
which do not depend on such numbers, do not; in float64 all of it shrinks by nine digits.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import trimtab
from trimtab.surgery.adapted import adapted_modules

VARIANTS = ("lora", "dora", "lora rs patterns", "dora patterns")
# Our name of a trained tensor -> PEFT's, below the name of its module.
TENSORS = {
    "A": "lora_A.default.weight",
    "B": "lora_B.default.weight",
    "magnitude": "lora_magnitude_vector.default.weight",
}

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """One architecture: how to make a tiny model, and how its linear layers and its list of blocks are called."""

    make: Callable[[], nn.Module]
    linear: tuple[str, ...]
    blocks: str


def _llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )


def _gpt2() -> nn.Module:
    quiet: dict[str, Any] = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    config = GPT2Config(
        vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1, **quiet
    )
    return GPT2LMHeadModel(config)


def _bert() -> nn.Module:
    return BertModel(
        BertConfig(
            vocab_size=97,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=48,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def _smollm2() -> nn.Module:
    from trimtab.models.load import load_model
    from trimtab.models.locate import locate

    return load_model(locate("smollm2-135m"), torch.float32)


_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KINDS = {
    "llama": Kind(_llama, _PROJECTIONS, "layers"),
    "gpt2": Kind(_gpt2, ("c_attn", "c_proj", "c_fc"), "h"),
    "bert": Kind(_bert, ("query", "key", "value", "dense"), "layer"),
    "smollm2-135m": Kind(_smollm2, _PROJECTIONS, "layers"),
}


@dataclass(frozen=True)
class Report:
    """The differences of one variant on one model; ``steps`` of training lie between ``before`` and ``after``."""

    model: str
    variant: str
    dtype: str
    steps: int
    outputs_before: float
    gradients_before: float
    outputs_after: float
    gradients_after: float
    tensors_after: float
    moved: float  # how far the training moved our outputs: what the differences are to be held against
    ours_in_peft: float
    peft_in_ours: float
    merged: float


def make_model(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """The base, with norms and biases that are not all one and zero."""
    torch.manual_seed(seed)
    model = KINDS[kind].make().to(dtype).train()
    if kind != "smollm2-135m":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def rules(kind: str, variant: str) -> list[trimtab.Rule]:
    """The variant as a trimtab user writes it."""
    linear = KINDS[kind].linear
    common: dict[str, Any] = {"method": variant.split()[0], "rank_stabilised": " rs" in variant}
    found = [trimtab.Rule(match=[f"*.{name}" for name in linear], rank=4, alpha=6, **common)]
    if "patterns" in variant:
        found.append(trimtab.Rule(match=f"*.{linear[0]}", rank=2, alpha=6, **common))
        found.append(trimtab.Rule(match=f"*.{linear[1]}", rank=4, alpha=3, **common))
        found.append(trimtab.Rule(match=f"*.{linear[2]}", layers="1", rank=6, alpha=2.5, **common))
    return found


def configuration(kind: str, variant: str) -> LoraConfig:
    """The same as a PEFT user writes it."""
    linear, blocks = KINDS[kind].linear, KINDS[kind].blocks
    rank_pattern, alpha_pattern = {}, {}
    if "patterns" in variant:
        in_block = rf".*\.{blocks}\.1\..*\.{linear[2]}|{blocks}\.1\..*\.{linear[2]}"
        # The patterns are searched in the order of the file, which PEFT sorts.
        rank_pattern = {in_block: 6, linear[0]: 2}
        alpha_pattern = {in_block: 2.5, linear[1]: 3}
    return LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=list(linear),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        use_rslora=" rs" in variant,
        use_dora=variant.startswith("dora"),
        fan_in_fan_out=kind == "gpt2",
    )


def start(ours: nn.Module, theirs: nn.Module, seed: int = 1) -> None:
    """Give both the same tensors, away from the identity, so that every gradient has something to say."""
    generator = torch.Generator().manual_seed(seed)
    mine, peft = our_tensors(ours), their_tensors(theirs, ours)
    with torch.no_grad():
        for name, tensor in mine.items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith(".magnitude"):
                tensor.mul_(1 + 0.05 * noise)
            elif name.endswith(".B"):
                tensor.copy_(0.05 * noise)
            peft[name].copy_(tensor)


def our_tensors(ours: nn.Module) -> dict[str, nn.Parameter]:
    """``MODULE.TENSOR`` -> parameter, under our names."""
    return {
        f"{module}.{key}": parameter
        for module, adapted in adapted_modules(ours)
        for key, parameter in adapted.adapter.named_parameters()
    }


def their_tensors(theirs: nn.Module, ours: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT's parameters under our names. Raises KeyError unless both train the same tensors."""
    found = {name: parameter for name, parameter in theirs.named_parameters() if "lora_" in name}
    renamed = {}
    for name in our_tensors(ours):
        module, key = name.rsplit(".", 1)
        renamed[name] = found.pop(f"base_model.model.{module}.{TENSORS[key]}")
    if found:
        raise KeyError(f"PEFT trains what we do not: {', '.join(list(found)[:3])}")
    return renamed


def batches(model: nn.Module, count: int, seed: int = 2) -> list[Tensor]:
    """Token ids ``[2, 12]`` each."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.vocab_size  # type: ignore[union-attr]
    return [torch.randint(0, vocabulary, (2, 12), generator=generator) for _ in range(count)]  # type: ignore[arg-type]


def outputs(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits; of a model without a head the hidden states, and the pooled one behind them."""
    found = model(input_ids=tokens)
    return found.logits if hasattr(found, "logits") else torch.cat([found[0], found[1].unsqueeze(1)], 1)


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Next-token loss; without a head, how far the hidden states are from a fixed pattern."""
    found = outputs(model, tokens)
    if found.shape[-1] == model.config.vocab_size:  # type: ignore[union-attr]
        return F.cross_entropy(found[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return (found - torch.linspace(-1, 1, found.shape[-1])).square().mean()


def gradients(model: nn.Module, tensors: dict[str, nn.Parameter], tokens: Tensor) -> Gradients:
    """The gradient of every tensor for one batch."""
    found = torch.autograd.grad(loss(model, tokens), list(tensors.values()))
    return dict(zip(tensors, found, strict=True))


def train(model: nn.Module, tensors: dict[str, nn.Parameter], steps: list[Tensor], rate: float = 1e-3) -> None:
    """One step of AdamW for each batch."""
    optimizer = torch.optim.AdamW(list(tensors.values()), lr=rate)
    for tokens in steps:
        optimizer.zero_grad()
        loss(model, tokens).backward()
        optimizer.step()
    optimizer.zero_grad()


def difference(got: Tensor, want: Tensor) -> float:
    """The largest difference of two tensors over the largest number in ``want``."""
    assert got.shape == want.shape
    error, largest = (got - want).detach().abs().max(), want.detach().abs().max()
    return float(error / largest if largest > 0 else error)


def differences(got: dict[str, Any], want: dict[str, Any]) -> float:
    """The largest of ``difference`` over all tensors."""
    assert got.keys() == want.keys()
    return max(difference(got[name], want[name]) for name in want)


def compare(kind: str, variant: str, steps: int, dtype: torch.dtype = torch.float32) -> Report:
    """Run one variant on one model through both libraries."""
    base = make_model(kind, dtype)
    ours, theirs = copy.deepcopy(base), get_peft_model(copy.deepcopy(base), configuration(kind, variant))
    trimtab.attach(ours, rules(kind, variant))
    start(ours, theirs)
    mine, peft = our_tensors(ours), their_tensors(theirs, ours)
    probe, *training = batches(base, steps + 1)

    with torch.no_grad():
        first = outputs(ours, probe)
        outputs_before = difference(first, outputs(theirs, probe))
    gradients_before = differences(gradients(ours, mine, probe), gradients(theirs, peft, probe))
    train(ours, mine, training)
    train(theirs, peft, training)
    gradients_after = differences(gradients(ours, mine, probe), gradients(theirs, peft, probe))
    ours.eval(), theirs.eval(), base.eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        last, their_last = outputs(ours, probe), outputs(theirs, probe)
        trimtab.save_adapter(ours, Path(folder) / "ours")
        theirs.save_pretrained(str(Path(folder) / "theirs"))
        tensors_after = differences(mine, peft)

        loaded: nn.Module = PeftModel.from_pretrained(copy.deepcopy(base), Path(folder) / "ours").eval()
        ours_in_peft = difference(outputs(loaded, probe), last)
        loaded = copy.deepcopy(base)
        trimtab.load_adapter(loaded, Path(folder) / "theirs")
        peft_in_ours = difference(outputs(loaded, probe), their_last)

        del loaded, base
        trimtab.merge(ours)
        merged = difference(outputs(ours, probe), outputs(theirs.merge_and_unload(), probe))
    return Report(
        model=kind,
        variant=variant,
        dtype=str(dtype).removeprefix("torch."),
        steps=steps,
        outputs_before=outputs_before,
        gradients_before=gradients_before,
        outputs_after=difference(last, their_last),
        gradients_after=gradients_after,
        tensors_after=tensors_after,
        moved=difference(last, first),
        ours_in_peft=ours_in_peft,
        peft_in_ours=peft_in_ours,
        merged=merged,
    )


COLUMNS = {
    "outputs_before": "outputs\nstep 0",
    "gradients_before": "gradients\nstep 0",
    "outputs_after": "outputs\nstep N",
    "gradients_after": "gradients\nstep N",
    "tensors_after": "tensors\nstep N",
    "moved": "outputs\n0 to N",
    "ours_in_peft": "ours\n-> PEFT",
    "peft_in_ours": "PEFT\n-> ours",
    "merged": "merged",
}


def print_table(reports: list[Report], steps: int, dtype: str) -> None:
    """One line per report."""
    table = Table(
        title=f"trimtab against PEFT, {dtype}, N = {steps} steps of AdamW: largest difference / largest value"
    )
    table.add_column("model")
    table.add_column("method")
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    for report in reports:
        table.add_row(report.model, report.variant, *(f"{getattr(report, key):.1e}" for key in COLUMNS))
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Parity of trimtab with PEFT.")
    parser.add_argument("--model", choices=sorted(KINDS), action="append", help="default: llama and gpt2, both tiny")
    parser.add_argument("--variant", choices=VARIANTS, action="append", help="default: all")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--steps", type=int, default=10, help="training steps (default: 10)")
    parser.add_argument("--json", type=Path, default=Path("parity.json"), help="where the numbers go")
    said = parser.parse_args()
    reports = []
    for kind in said.model or ["llama", "gpt2"]:
        for variant in said.variant or VARIANTS:
            reports.append(compare(kind, variant, said.steps, getattr(torch, said.dtype)))
    print_table(reports, said.steps, said.dtype)
    said.json.write_text(json.dumps([asdict(report) for report in reports], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
