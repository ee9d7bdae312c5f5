"""The steps of `benchmarks/gpu.py`: forward and backward of a few blocks of a model's shape, under every arm in turn.

    frozen              the bare blocks; the gradient is carried through them to their input: the floor
    lora/dora/mora      ours, with the kernels that the device has
    ... dropout         the same with dropout 0.05
    ... plain           the same with torch's own operations one after the other
    dense dora          the formula written plainly: W' = m (W + s B A) / ||W + s B A||, then one linear layer
    peft lora/dora      PEFT's own at its fastest: no dropout, its tensors in the base's dtype

All arms stand in one process and take turns (A B C A B C ...); a step is timed by events of the device, and trained
tensors change between two steps, as an optimiser would change them. Peak memory, launches and the kernels' own time are
of one more step each. Quantised arms of PEFT are bitsandbytes' own layers.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from gpu_record import Record
from quantised import SHAPES
from step import TARGETS, DenseDora, disturb, with_peft
from trimtab.ops import kernels

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
ARMS = (
    "frozen",
    "lora",
    "dora",
    "mora",
    "dora dropout",
    "lora plain",
    "dora plain",
    "mora plain",
    "dense dora",
    "peft lora",
    "peft dora",
)
PACKAGES = {"int8": "bitsandbytes", "nf4": "bitsandbytes", "peft lora": "peft", "peft dora": "peft"}
RANK, LAYERS, ROW = 16, 2, 1024
REPEATS, WARM_UP = 15, 3
MIB = 2**20


def groups(*, tiny: bool) -> list[tuple[str, str, tuple[int, ...]]]:
    """Shape, kind and lengths of what is measured, what the bars are about first."""
    if tiny:
        return [("tiny", kind, (16,)) for kind in ("bf16", "int8", "nf4")]
    kinds = ("bf16", "nf4", "int8")
    first = [("llama-3.1-8b", kind, (4096,)) for kind in kinds]
    more = [("llama-3.1-8b", kind, (1024, 16384)) for kind in kinds]
    return [*first, *more, *(("llama-3.2-1b", kind, (4096, 1024, 16384)) for kind in kinds)]


def run(record: Record, device: torch.device, *, tiny: bool, late: Callable[[], bool], plain: bool = False) -> None:
    """Add a row for each shape, kind and length that is not there yet; ``plain``: by torch's operations alone."""
    if plain:
        record.note("the steps that follow are by torch's operations alone: those before them ended the process")
    if not importlib.util.find_spec("peft"):
        record.note("PEFT is not installed, so its arms are left out: pip install peft")
    for shape, kind, lengths in groups(tiny=tiny):
        if kind in PACKAGES and not importlib.util.find_spec(PACKAGES[kind]):
            record.note(f"{kind} is left out: {PACKAGES[kind]} is not installed")
            continue
        names = {tokens: f"{shape}, {kind}, {tokens:,} tokens" for tokens in lengths}
        wanted = {tokens: name for tokens, name in names.items() if not record.has("steps", name)}
        if not wanted:
            continue
        arms = _Arms(shape, kind, device, tiny=tiny, plain=plain)
        for tokens, name in wanted.items():
            if late():
                record.note("the steps ran out of time: not all lengths and kinds are measured")
                return
            # Should this one end the process, the next one begins behind it.
            record.add("steps", name=name, shape=shape, kind=kind, tokens=tokens, error="it ended the process")
            try:
                figures = arms.measure(tokens, *((1, 1) if tiny else (REPEATS, WARM_UP)))
            except Exception as error:  # the other lengths may go through
                figures = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            record.add("steps", name=name, shape=shape, kind=kind, tokens=tokens, **figures)
            print(f"{name}: {figures.get('ratio', figures.get('error'))}", flush=True)
        del arms
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


class _Arms:
    """The models of all arms of one shape and kind."""

    def __init__(self, shape: str, kind: str, device: torch.device, *, tiny: bool, plain: bool) -> None:
        self.device = device
        self.plain = plain
        self.models: dict[str, Any] = {}
        self.errors: dict[str, str] = {}
        self.held: dict[str, float] = {}
        sizes = TINY if tiny else SHAPES[shape]
        for arm in ARMS:
            if arm in PACKAGES and not importlib.util.find_spec(PACKAGES[arm]):
                continue
            if arm == "dense dora" and kind != "bf16":
                continue
            torch.manual_seed(0)
            before = _allocated(device)
            try:
                model = llama_blocks(sizes, kind, 1 if tiny else LAYERS, device, torch.bfloat16)
                self.models[arm] = _adapted(model, arm, kind).to(device)
            except Exception as error:
                self.errors[arm] = _told(error)
            self.held[arm] = (_allocated(device) - before) / MIB

    def measure(self, tokens: int, repeats: int, warm_up: int) -> dict[str, Any]:
        """The figures of every arm for steps of ``tokens`` tokens."""
        steps = {arm: _stepper(model, tokens, self.device) for arm, model in self.models.items()}
        errors = dict(self.errors)
        ms: dict[str, list[float]] = {arm: [] for arm in steps}
        for number in range(warm_up + repeats):
            for arm in [*steps]:
                disturb(self.models[arm])
                try:
                    with kernels_of(arm, plain=self.plain):
                        taken = _timed(steps[arm], self.device)
                except Exception as error:
                    errors[arm] = _told(error)
                    del steps[arm], ms[arm]
                    continue
                if number >= warm_up:
                    ms[arm].append(taken)
        medians = {arm: statistics.median(times) for arm, times in ms.items()}
        more = {}
        for arm, step in steps.items():
            disturb(self.models[arm])
            with kernels_of(arm, plain=self.plain):
                peak = _peak(step, self.device)
                launches, busy = _launches(step, self.device)
            more[arm] = {"peak_mib": peak, "launches": launches, "busy_ms": busy}
        return {
            "repeats": repeats,
            "ms": medians,
            "times": ms,
            "ratio": {arm: median / medians["frozen"] for arm, median in medians.items()},
            **{key: {arm: one[key] for arm, one in more.items()} for key in ("peak_mib", "launches", "busy_ms")},
            "held_mib": {arm: self.held[arm] for arm in steps},
            "errors": errors,
        }


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def llama_blocks(sizes: dict[str, Any], kind: str, layers: int, device: torch.device, dtype: torch.dtype) -> Any:
    """Random Llama blocks of these sizes on ``device``, their projections quantised as ``kind``."""
    from transformers import LlamaConfig, LlamaModel

    from trimtab import bases

    config = LlamaConfig(vocab_size=8, num_hidden_layers=layers, use_cache=False, pad_token_id=None, **sizes)
    config._attn_implementation = "sdpa"
    with torch.device(device):
        model: Any = LlamaModel(config)
        model = model.to(dtype)
    model.norm = nn.Identity()
    for module in list(model.modules()) if kind != "bf16" else ():
        for name, inner in list(module._modules.items()):
            if name in TARGETS and isinstance(inner, nn.Linear):
                handle = bases.find(inner)
                assert handle is not None
                module._modules[name] = bases.quantise(handle, kind).to(device)
    return model.requires_grad_(False).train()


def _adapted(model: Any, arm: str, kind: str) -> Any:
    import trimtab

    method, dropout = arm.removesuffix(" plain").removesuffix(" dropout"), 0.05 * arm.endswith(" dropout")
    if method in ("lora", "dora", "mora"):
        options: dict[str, Any] = {"dropout": dropout} if method == "mora" else {"alpha": 2 * RANK, "dropout": dropout}
        trimtab.attach(model, trimtab.Plan([trimtab.Rule(match="all-linear", method=method, rank=RANK, **options)]))
    elif method == "dense dora":
        for module in list(model.modules()):
            for name in TARGETS:
                if hasattr(module, name):
                    setattr(module, name, DenseDora(getattr(module, name), RANK))
    elif method.startswith("peft"):
        for module in model.modules():
            theirs = next((one for one in type(module).__mro__ if one.__module__ == "bitsandbytes.nn.modules"), None)
            if theirs is not None:
                module.__class__ = theirs
                if kind == "int8":
                    module.init_8bit_state()  # before PEFT moves weights about, and their scales are lost on the way
        model.is_loaded_in_8bit, model.is_loaded_in_4bit = kind == "int8", kind == "nf4"
        model = with_peft(model, method, RANK, TARGETS, model.dtype if kind == "bf16" else torch.bfloat16)
    return model


def kernels_of(arm: str, *, plain: bool) -> Any:
    """The context that an arm's steps run in: plain kernels where it says so."""
    return kernels.using("plain") if plain or arm.endswith(" plain") else nullcontext()


def _stepper(model: Any, tokens: int, device: torch.device) -> Callable[[], None]:
    rows = max(1, tokens // ROW)
    shape = rows, tokens // rows, model.config.hidden_size
    x = torch.randn(shape, device=device).to(torch.bfloat16).requires_grad_()
    upstream = torch.randn(shape, device=device).to(torch.bfloat16)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        model(inputs_embeds=x).last_hidden_state.backward(upstream)
        x.grad = None
        for parameter in trained:
            parameter.grad = None

    return step


def _timed(step: Callable[[], None], device: torch.device) -> float:
    """Milliseconds of one step."""
    if device.type != "cuda":
        began = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - began)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    step()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last))


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _peak(step: Callable[[], None], device: torch.device) -> float:
    """MiB that a step takes at its highest, beyond what is held before it."""
    if device.type != "cuda":
        from common import peak_allocation

        return peak_allocation(step) / MIB
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def _launches(step: Callable[[], None], device: torch.device) -> tuple[int, float | None]:
    """Kernels of one step and their milliseconds; on a processor torch's operations, and None."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_device = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    with profile(activities=activities) as watched:
        step()
        if on_device:
            torch.cuda.synchronize()
    events = watched.profiler.kineto_results.events()
    if not on_device:
        return sum(event.name().startswith("aten::") for event in events), None
    kernels = [event for event in events if event.device_type() == DeviceType.CUDA]
    kernels = [event for event in kernels if not event.name().lower().startswith(("memcpy", "memset", "gpu_user"))]
    return len(kernels), sum(event.duration_ns() for event in kernels) / 1e6
