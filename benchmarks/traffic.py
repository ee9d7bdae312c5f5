"""What an adapter asks of a GPU, counted without one: launches, bytes to and from memory, and what is kept for the
backward pass, of a Llama-8B block and of its seven linear layers alone.

    python benchmarks/traffic.py                          at 1,024, 4,096 and 16,384 tokens
    python benchmarks/traffic.py --tokens 4096 --rank 64
    python benchmarks/traffic.py --rows 1 8 64            so many rows, each through one of eight adapters (per_row)
    python benchmarks/traffic.py --left-out               what two things would bring that are not done

The layers run on tensors without numbers, on the device of ``tests/accelerator.py``. Every operation of torch is a
launch that reads its arguments and writes its results; one of ours is one launch, or two where sums are finished by a
second; attention is one forward and one backward. "roof" is the time that bytes and products would take at the rates
of an H200 (4.0 TB/s, 790 TFLOP/s), over that of the same layers without an adapter: a bound, and no measurement.
"norms" are the launches of the norms, once per optimiser step; they are not in the others. What is kept is counted
beyond the parameters; of the layers alone, beyond each layer's input and output, too.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
import trimtab
from accelerator import DEVICE, NAME, accelerator
from common import alternate, show, write_results
from quantised import SHAPES
from trimtab.bases import _base
from trimtab.ops import cost
from trimtab.ops.kernels import using
from trimtab.surgery.contexts import for_inference

aten = torch.ops.aten
LLAMA_8B = SHAPES["llama-3.1-8b"]
ADAPTERS = 8
LINEAR = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)]
"""``(in, out)`` of q, k, v, o, gate, up and down."""
BANDWIDTH, RATE = 4.0e12, 790e12
METHODS: dict[str, dict[str, Any] | None] = {
    "frozen": None,
    "lora": {"method": "lora", "rank": 16},
    "dora": {"method": "dora", "rank": 16},
    "mora": {"method": "mora", "rank": 16},
    "mora, magnitude": {"method": "mora", "rank": 16, "magnitude": True},
    "lora, dropout": {"method": "lora", "rank": 16, "dropout": 0.05},
    "dora, dropout": {"method": "dora", "rank": 16, "dropout": 0.05},
}
NO_LAUNCH = {
    "empty",
    "empty_strided",
    "empty_like",
    "new_empty",
    "detach",
    "alias",
    "lift_fresh",
    "_local_scalar_dense",
    "_unsafe_view",
}
LAUNCHES = {"backward_pass": 2, "squared_norms": 2}
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")


class Counted(TorchDispatchMode):
    """Counts what a device would be sent while ``counts`` is true, and the bytes and the time of it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_operation: Counter[str] = Counter()
        self.bytes = self.seconds = 0.0
        self.counts = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 0.0
        given = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        written = [one for one in tree_leaves(given) if isinstance(one, Tensor)]
        ours = func._schema.name.startswith("trimtab::")
        if self.counts and (written or ours) and not func.is_view and name not in NO_LAUNCH:
            read = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
            moved = sum(one.numel() * one.element_size() for one in (*read, *(written or args[:1])))
            work = 2 * math.prod(read[-2].shape) * read[-1].shape[-1] if name in PRODUCTS else 0
            if name.startswith("attend"):  # each token sees half of the others
                tokens, heads = read[0].shape[0], read[0].shape[1:].numel()
                work = tokens * ROW * heads * (2 if name == "attend" else 5)
            if name == "backward_pass" and len(given[4]):  # what is written for the second launch, and read there
                (tokens, rank), (out, _) = given[3].shape, given[4].shape
                moved += 8 * rank * (tokens * math.ceil(out / 128) + out * math.ceil(tokens / 256))
            self.by_operation[name] += LAUNCHES.get(name, 1)
            self.bytes += moved
            self.seconds += max(moved / BANDWIDTH, work / RATE)
        return given


class Counts(NamedTuple):
    """Of a forward and a backward pass."""

    launches: int
    kept: int
    """Bytes."""
    bytes: float = 0.0
    seconds: float = 0.0


@contextmanager
def pretended(kernels: str) -> Iterator[Counted]:
    """A device whose tensors have no numbers, with this set of kernels."""
    counted, fused = Counted(), {NAME: cost.FUSED if kernels == "triton" else cost.SEPARATE}
    with ExitStack() as stack:
        stack.enter_context(accelerator())
        stack.enter_context(patch.object(_base, "is_plain", _is_plain))
        stack.enter_context(patch.dict(cost._KINDS, fused))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(using(kernels))
        stack.enter_context(counted)
        yield counted


def _is_plain(weight: Any) -> bool:
    return type(weight.data) in (Tensor, FakeTensor) and weight.dtype in _base.DENSE


def measure(
    said: dict[str, Any] | None,
    tokens: int,
    *,
    shapes: list[tuple[int, int]] = LINEAR,
    kernels: str,
    held: bool = False,
) -> Counts:
    """Linear layers of these shapes in bfloat16; ``held``: norms are there already, as within an optimiser's step."""
    kept = 0
    with pretended(kernels) as counted:
        for in_features, out_features in shapes:
            layer = nn.Linear(in_features, out_features, bias=False, device=DEVICE, dtype=torch.bfloat16)
            model = nn.Sequential(layer.requires_grad_(False))
            x = torch.empty(tokens, in_features, device=DEVICE, dtype=torch.bfloat16)
            found, output = _passes(model, said, counted, x, held=held)
            kept += sum(size for key, size in found.items() if key not in (_key(x), _key(output)))
    return Counts(counted.by_operation.total(), kept, counted.bytes, counted.seconds)


def block(said: dict[str, Any] | None, tokens: int, *, kernels: str) -> Counts:
    """A whole Llama-8B block in bfloat16, norms held; attention is a program that keeps q, k, v and its output."""
    from transformers import LlamaConfig, LlamaModel

    with pretended(kernels) as counted:
        config = LlamaConfig(vocab_size=8, num_hidden_layers=1, use_cache=False, pad_token_id=None, **LLAMA_8B)
        config._attn_implementation = "counted"
        config.dtype = torch.bfloat16
        with torch.device(DEVICE):
            model: Any = LlamaModel._from_config(config)
        model.norm = nn.Identity()
        model.requires_grad_(False).train()
        x = torch.empty(max(1, tokens // ROW), min(ROW, tokens), 4096, device=DEVICE, dtype=torch.bfloat16)
        found, _ = _passes(_Hidden(model), said, counted, x, held=True)
    return Counts(counted.by_operation.total(), sum(found.values()), counted.bytes, counted.seconds)


class _Hidden(nn.Module):
    """A model from its embeddings to its last hidden state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.model(inputs_embeds=x).last_hidden_state
        return hidden


def _passes(
    model: nn.Module, said: dict[str, Any] | None, counted: Counted, x: Tensor, *, held: bool
) -> tuple[dict[int, int], Tensor]:
    """Attach, and go through forward and backward; gives the bytes of each memory that is kept, and the output."""
    if said is not None:
        trimtab.attach(model, trimtab.Rule(match="all-linear", **said))
    x.requires_grad_()
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[_key(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with for_inference(model) if held and said is not None else ExitStack():
        model(x)  # the first pass computes what is kept of the frozen weight
        counted.counts = True
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(x)
        counted.counts = False
        upstream = torch.empty_like(output)
        counted.counts = True
        output.backward(upstream)
        counted.counts = False
    for one in (*model.parameters(), *model.buffers()):
        kept.pop(_key(one), None)
    return kept, output


def _key(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def by_rows(methods: Sequence[str], rows: int, tokens: int, *, segments: bool, trains: bool = False) -> Counts:
    """A layer 4,096 x 4,096 in bfloat16, whose batch of ``rows`` times ``tokens`` goes through eight adapters, of these
    methods in turn; ``segments``: as it goes on a GPU, else adapter by adapter, as elsewhere; ``trains``: all of them,
    so backward, too."""
    with pretended("triton") as counted:
        model = nn.Sequential(nn.Linear(4096, 4096, bias=False, device=DEVICE, dtype=torch.bfloat16))
        for number in range(ADAPTERS):
            said = METHODS[methods[number % len(methods)]] or {}
            trimtab.attach(model, trimtab.Rule(match="all-linear", **said), name=f"adapter {number}")
        names = [f"adapter {row % ADAPTERS}" for row in range(rows)]
        x = torch.empty(rows, tokens, 4096, device=DEVICE, dtype=torch.bfloat16)
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(trains))
            if not segments:
                for place in ("ops.mixed_rows", "surgery.mixing"):
                    stack.enter_context(patch(f"trimtab.{place}.segments_for", lambda rows: None))
            for name in names:
                trimtab.set_adapter(model, name)
            for parameter in model.parameters():
                parameter.requires_grad_(trains and parameter.dtype == torch.float32)
            stack.enter_context(trimtab.per_row(model, names))
            model(x)
            counted.counts = True
            output = model(x.requires_grad_(trains))
            if trains:
                output.backward(output.detach())
            counted.counts = False
    return Counts(counted.by_operation.total(), 0, counted.bytes, counted.seconds)


# Attention, as one program each way -----------------------------------------------------------------------------------

ROW = 1024
"""Tokens of a row."""


@torch.library.custom_op("traffic::attend", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("traffic::attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError


@_attend_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y: Tensor
        y, sums = torch.ops.traffic.attend(q, k, v)
        ctx.save_for_backward(q, k, v, y, sums)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return torch.ops.traffic.attend_backward(grad, *ctx.saved_tensors)


def _attention(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return _Attention.apply(q, k, v).transpose(1, 2), None  # type: ignore[no-untyped-call]


# What is left out -----------------------------------------------------------------------------------------------------


def left_out(tokens: int, rank: int) -> None:
    """Print what would be had where q, k, v and gate, up read their input together, for ``x A^T`` and for the gradients
    of A: on a GPU by bytes, on this processor by the clock, at the shapes of SmolLM2. And where DoRA kept no output
    behind q, k, o and down, whose products would be computed again, or kept in fewer bits."""
    frozen, lora, dora = (block(METHODS[one], tokens, kernels="triton") for one in ("frozen", "lora", "dora"))
    saved = 2 * (2 + 1) * tokens * LLAMA_8B["hidden_size"] * 2 / BANDWIDTH
    print(f"{tokens:,} tokens, a Llama-8B block by the rates of an H200, {1e6 * frozen.seconds:.0f} us frozen:")
    print(
        f"  one read for q, k, v and one for gate, up: at most {1e6 * saved:.0f} us less ({saved / frozen.seconds:.1%})"
    )
    work = sum(2 * tokens * math.prod(shape) for shape in (LINEAR[0], LINEAR[1], LINEAR[3], LINEAR[6])) / RATE
    mib = sum(2 * tokens * LINEAR[place][1] for place in (0, 1, 3, 6)) / 2**20
    more = f"{(dora.kept - lora.kept) / 2**20:.0f} MiB more than LoRA's {lora.kept / 2**20:.0f}"
    print(f"  DoRA keeps {more}, {mib:.0f} of them behind q, k, o and down; their products again: {1e6 * work:.0f} us ")
    print(f"  more ({work / frozen.seconds:.0%})")
    grad, y = torch.randn(tokens, 512), torch.randn(tokens, 512).bfloat16()
    exact = (grad.double() * y.double()).sum(0)
    for kind in (torch.bfloat16, torch.float8_e4m3fn):
        noise = y.float() * (1 + 2**-9 * torch.randn_like(grad)) if kind is torch.bfloat16 else y.float()
        error = ((grad * noise.to(kind).float()).double().sum(0) - exact).norm() / exact.norm()
        print(f"  the gradient of m from outputs in {kind}: off by {error:.1e} of it")
    for dtype in (torch.bfloat16, torch.float32):
        steps = _thin(dtype, rank)
        ms = {name: 1e3 * statistics.median(times) for name, times in alternate(steps, 200).items()}
        print(
            f"this processor, {dtype}, 1,024 tokens: " + ", ".join(f"{name} {one:.3f} ms" for name, one in ms.items())
        )


def _thin(dtype: torch.dtype, rank: int) -> dict[str, Callable[[], object]]:
    x, factors, inner = (torch.randn(*shape).to(dtype) for shape in ((1024, 576), (3 * rank, 576), (1024, 3 * rank)))
    inners = [one.contiguous() for one in inner.split(rank, 1)]
    weight = torch.randn(960, 576).to(dtype)  # of q, k and v

    def apart() -> None:
        for a, h in zip(factors.split(rank), inners, strict=True):
            x.mm(a.t())
            h.t().mm(x)

    def together() -> None:
        x.mm(factors.t())
        inner.t().mm(x)

    return {"apart": apart, "together": together, "x W^T": lambda: x.mm(weight.t())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--left-out", action="store_true")
    options = parser.parse_args()
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("counted", _attention)
    if options.rows:
        print("eight adapters on a layer 4,096 x 4,096: launches, MiB moved, us by the rates of an H200")
        mixed = ("lora",), ("dora",), ("mora",), ("lora", "dora", "mora")
        for trains, methods in itertools.product((False, True), mixed):
            print("forward and backward" if trains else "forward")
            for tokens, rows in itertools.product((1, 512), options.rows):
                asked = {"trains": trains}
                each = [by_rows(methods, rows, tokens, segments=segments, **asked) for segments in (False, True)]
                figures = [f"{one.launches:4} {one.bytes / 2**20:8.1f} {1e6 * one.seconds:7.1f}" for one in each]
                print(f"{', '.join(methods):18} {rows:3} x {tokens:3}  apart {figures[0]}   segments {figures[1]}")
        return
    if options.left_out:
        for tokens in options.tokens:
            left_out(tokens, options.rank)
        return
    rows, found = [], []
    for tokens in options.tokens:
        bare = measure(None, tokens, kernels="plain"), block(None, tokens, kernels="plain")
        for method, said in METHODS.items():
            for kernels in ("plain", "triton")[said is None :]:
                if said is not None:
                    said = {**said, "rank": options.rank}
                layers = measure(said, tokens, kernels=kernels, held=True)
                norms = measure(said, tokens, kernels=kernels).launches - layers.launches
                whole = block(said, tokens, kernels=kernels)
                counts = {"layers": layers._asdict(), "block": whole._asdict(), "norms": norms}
                found.append({"tokens": tokens, "method": method, "kernels": kernels, **counts})
                figures = [
                    f"{one.seconds / floor.seconds:.2f}" for one, floor in zip((layers, whole), bare, strict=True)
                ]
                rows.append([f"{tokens:,}", method, kernels, f"{layers.launches}", f"{norms}"])
                rows[-1] += [f"{layers.bytes / 1e9:.2f}", figures[0], f"{layers.kept / 2**20:.1f}"]
                rows[-1] += [f"{whole.launches}", figures[1], f"{whole.kept / 2**20:.0f}"]
    columns = ["tokens", "method", "kernels", "launches", "norms", "GB", "roof", "kept MiB"]
    columns += ["block: launches", "roof", "kept MiB"]
    show("linear layers of a Llama-8B block, and the block, forward and backward, counted for a GPU", columns, rows)
    write_results("traffic", {"rank": options.rank, "dtype": "bfloat16"}, found)


if __name__ == "__main__":
    main()
