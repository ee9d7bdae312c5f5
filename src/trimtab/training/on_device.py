"""What a run leaves to its device, decided once the model is there: how attention is computed, whether Liger's kernels
take the place of small modules, whether the rows of a batch lie one behind the other.

Each decision follows from what is installed and from what the model can do. What is said in the YAML and cannot be is
an error in words; what ``auto`` has chosen is told in one sentence.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from trimtab import tasks
from trimtab.config.resolve import Job
from trimtab.data.packing import LAYOUT, PackingCollator
from trimtab.errors import ConfigError, ModelError
from trimtab.models.model_files import quiet_transformers
from trimtab.surgery.contexts import evaluating

FLASH = {"flash_attention_3": ("flash_attn_interface", 9), "flash_attention_2": ("flash_attn", 8)}
"""Flash attention's packages, the newest first: the module that each installs, and the least generation of NVIDIA GPU
that ``auto`` takes it for (9: Hopper, 8: Ampere)."""
SLACK = 16
"""How many roundings of its dtype two ways of computing the same thing may lie apart, next to the largest value."""
LIGER = {"rms_norm": True, "layer_norm": True}
"""What is taken of Liger. Not its losses: ours makes no logits but at labels, a chunk at a time, and weighs tokens."""
WRITERS = ("rope", "swiglu", "geglu")
"""Taken, too, where no magnitude is trained: these write over outputs that a magnitude's gradient is read from, which
would then be computed again (`trimtab.integrations.liger`)."""
NO_LOSS = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def fitted(job: Job, model: Any, remark: Callable[[str], None]) -> Job:
    """Fit ``model``, which is on its device, to that in place; gives ``job`` with nothing of it left open.

    ``remark`` is told what was chosen, if anything was.

    Raises ConfigError or ModelError, with the key, for what is asked for and cannot be.
    """
    chosen: list[str] = []
    if attention := _attention(job, model):
        chosen.append(f"attention by {attention}")
    if liger := _liger(job, model):
        chosen.append(f"{liger} by Liger's kernels")
    packs = _packs(job, model)
    if packs:
        chosen.append("batches without padding")
        if not is_flash(model) and job.config.train.padding_free is True:
            chosen[-1] += " (without flash attention their masks have as many rows and columns as a batch has tokens)"
    if job.config.train.tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        chosen.append("products of float32 in TF32")
    if chosen:
        remark(f"on this device: {'; '.join(chosen)}")
    if job.precision == "float16":
        remark("computing in float16: gradients are scaled, and a step whose gradients overflow is left out")
    train = job.config.train.model_copy(update={"padding_free": packs})
    return replace(job, config=job.config.model_copy(update={"train": train}))


def _generation() -> int:
    """Of the GPU that models are put on, as NVIDIA counts them; 0 where there is none."""
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def is_flash(model: Any) -> bool:
    """Whether ``model`` computes attention by a flash attention package."""
    return "flash" in str(getattr(getattr(model, "config", None), "_attn_implementation", ""))


def _attention(job: Job, model: Any) -> str | None:
    """Set the attention that the run asks for, or that is best here; its name if it is other than the model's own."""
    said = job.config.model.attention
    if said in ("sdpa", "eager"):
        return None
    half = job.dtype in (torch.bfloat16, torch.float16)
    if said == "auto":
        found = [name for name, (package, least) in FLASH.items() if _installed(package) and _generation() >= least]
        for name in found if half and getattr(model, "_supports_flash_attn", False) else ():
            if _set_attention(model, name) is None:
                return name
        return None
    if not half:
        raise ModelError(f"model.attention: {said} computes in half precision: set train.precision to bfloat16")
    if (package := FLASH.get(said, ("", 0))[0]) and not (_installed(package) or _installed("kernels")):
        raise ModelError(
            f"model.attention: {said} is not installed: install {package.replace('_', '-')} for your CUDA, or the "
            "package kernels, which fetches it built; or leave model.attention out"
        )
    if "/" in said and not _installed("kernels"):
        raise ModelError(f"model.attention: {said} is fetched by the package kernels: pip install kernels")
    if not _generation():
        raise ModelError(f"model.attention: {said} takes a GPU, and torch sees none here; leave model.attention out")
    if error := _set_attention(model, said):
        raise ModelError(f"model.attention: {said} cannot be had for this model. {error}")
    return said


def _set_attention(model: Any, name: str) -> str | None:
    """What is wrong with ``name`` for ``model``; None if it is in use now."""
    before = model.config._attn_implementation
    try:
        with quiet_transformers():
            model.set_attn_implementation(name)
    except Exception as error:  # not installed, not built for this device, not for this model: each raises its own
        model.set_attn_implementation(before)
        return " ".join(str(error).split())[:300]
    if model.config._attn_implementation == before:
        return f"a {type(model).__name__} has {before} attention of its own"
    return None


def _liger(job: Job, model: Any) -> str:
    """Put Liger's kernels in, where that is asked for or pays, and the model computes as before; gives what they do."""
    said = job.config.model.liger
    kind = getattr(model.config, "model_type", "")
    if said is False or (said == "auto" and not (_installed("liger_kernel") and model.device.type == "cuda")):
        return ""
    if not _installed("liger_kernel"):
        raise ModelError("model.liger: liger-kernel is not installed: pip install 'trimtab[gpu]'")
    if model.device.type == "cpu":
        raise ModelError("model.liger: Liger's kernels take a GPU, and the model is on the processor; set it to false")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers.integrations.liger import apply_liger_kernel

    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        if said is True:
            raise ModelError(f"model.liger: Liger has no kernels for a model of type {kind}; set it to false")
        return ""
    before = _both_ways(model)
    with quiet_transformers():
        apply_liger_kernel(model, {**LIGER, **dict.fromkeys(WRITERS, not job.trains_magnitudes), **NO_LOSS})
    if not all(_same(one, other) for one, other in zip(_both_ways(model), before, strict=True)):
        raise ModelError(f"model.liger: with Liger's kernels this {kind} computes something else; set it to false")
    return "norms" if job.trains_magnitudes else "norms, rotary embedding and gates"


def _packs(job: Job, model: Any) -> bool:
    """Whether the rows of a batch lie one behind the other."""
    said = job.config.train.padding_free
    if said is False or (said == "auto" and not is_flash(model)):
        return False
    packer = tasks.of(job).packer(job.reader, flash=is_flash(model))
    fault = f"rows of {job.task} are read apart" if packer is None else packing_fault(model, packer)
    if fault and said is True:
        raise ConfigError(f"train.padding_free: {fault}; set it to false")
    return fault is None


def packing_fault(model: Any, packer: Callable[..., dict[str, Any]] | None = None) -> str | None:
    """Why ``model`` cannot be trained on rows that lie one behind the other; None if it can.

    Two rows are given to it together. What it makes of the second must be what it makes of it alone, and must not
    change with the first.
    """
    collate = packer or PackingCollator(flash=is_flash(model))
    first, other, second = (ids[0] for ids in _ids(model, 31).split([9, 9, 13], dim=1))

    def after(row: torch.Tensor) -> torch.Tensor:
        batch = collate([{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in (row, second)])
        layout = {key: batch[key] for key in LAYOUT if key in batch}
        layout = {key: one.to(model.device) if isinstance(one, torch.Tensor) else one for key, one in layout.items()}
        logits = _logits(model, batch["input_ids"].to(model.device), **layout)
        return logits[:, len(row) :]

    try:
        together = after(first)
        changed, alone = after(other), _logits(model, second[None])
    except (TypeError, ValueError, RuntimeError) as error:
        return f"this model does not take positions that begin anew ({' '.join(str(error).split())[:150]})"
    if not _same(changed, together, SLACK // 4):
        return "in this model a row would see the tokens of the row before it"
    return None if _same(together, alone) else "this model computes something else of a row that others stand before"


def _ids(model: Any, count: int) -> torch.Tensor:
    embeddings = model.get_input_embeddings()
    numbers = torch.arange(count, device=embeddings.weight.device) * 7919 + 13
    found: torch.Tensor = (numbers % embeddings.num_embeddings)[None]
    return found


def _both_ways(model: Any) -> list[torch.Tensor]:
    """Logits of a few tokens, and the gradients that come back to their embeddings and to the trained vectors, all in
    one dtype."""
    ids = _ids(model, 18)
    logits = _logits(model, ids)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
    training = model.training
    with torch.enable_grad():
        found = model.eval()(inputs_embeds=embedded.requires_grad_(), use_cache=False).logits
        vectors = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.dim() == 1]
        gradients = torch.autograd.grad(found.float().square().mean(), [embedded, *vectors], allow_unused=True)
    model.train(training)
    return [logits, *(gradient.to(logits.dtype) for gradient in gradients if gradient is not None)]


def _logits(model: Any, ids: torch.Tensor, **layout: Any) -> torch.Tensor:
    with evaluating(model):
        output = model(input_ids=ids, **layout, **({"use_cache": False} if layout else {}))
    found: torch.Tensor = output.logits if hasattr(output, "logits") else output[0]
    return found


def _same(one: torch.Tensor, other: torch.Tensor, slack: int = SLACK) -> bool:
    largest = float(other.double().nan_to_num().abs().max())
    atol = slack * torch.finfo(other.dtype).eps * largest
    return bool(torch.allclose(one.double(), other.double(), rtol=0, atol=atol, equal_nan=True))
