"""Contexts in which an adapted model is used in another way for a while: faster, or without its adapters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from trimtab.errors import TrimtabWarning
from trimtab.surgery.adapted import carriers, require_adapted
from trimtab.surgery.names import trained_beside
from trimtab.surgery.wrappers import unwrapped


@contextmanager
def for_inference(model: nn.Module) -> Iterator[None]:
    """A context in which the caller promises that no trained tensor of ``model`` changes.

    Without gradients, an adapter with a magnitude keeps its norm (one number per output) from one pass to the next.
    Outside of this context each pass looks whether the trained tensors have changed, so that an outdated norm is never
    used. For passes of a few tokens, tensors are also prepared once, which speeds up writing one token at a time. If
    trained tensors change in this context all the same, the outdated norm is used until it ends. Contexts may be
    nested.
    """
    adapters = [adapter for adapted in carriers(model) for adapter in adapted.every_adapter()]
    for adapter in adapters:
        adapter.hold()
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.release()


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """A context in which ``model`` computes what it computed before its adapters were attached.

    This is the reference model of preference training, without a second copy in memory. Adapters stay in their places
    and keep their values, so that they can be saved, moved or put into another mode meanwhile. A quantised layer gives
    the product with its dequantised weight, as at the first step of training. Contexts may be nested. A tensor outside
    of the adapters that is trained itself (unfrozen by hand) has no other value to go back to, and a warning says so.

    Raises SurgeryError if the model has no adapters.
    """
    model = unwrapped(model)
    adapted = [module for _, module in require_adapted(model, "disable_adapter")]
    if trained := trained_beside(model):
        warnings.warn(
            f"disable_adapter: {len(trained)} tensors outside of the adapters are trained themselves, such as "
            f"{trained[0]}, and keep their trained values. Train them by a rule of method full to switch them off, too",
            TrimtabWarning,
            stacklevel=3,
        )
    before = [module.adapters_disabled for module in adapted]
    for module in adapted:
        module.adapters_disabled = True
    try:
        yield
    finally:
        for module, disabled in zip(adapted, before, strict=True):
            module.adapters_disabled = disabled


def reference(model: Any) -> Any:
    """``model`` without its adapters, as a model of its own that holds the same tensors: a reference model for those
    training loops that ask for one (``DPOTrainer(model, ref_model=trimtab.reference(model))``), and no second copy in
    memory.

    A call of it is one of ``model`` inside ``disable_adapter``. It follows ``model`` wherever that is moved, and must
    not be trained or sharded. Raises SurgeryError if the model has no adapters.
    """
    require_adapted(model := unwrapped(model), "reference")
    made = copy.copy(model)
    # A shallow copy has the tables of hooks in common with the model.
    tables = {key: copy.copy(one) for key, one in vars(model).items() if "_hooks" in key and isinstance(one, dict)}
    vars(made).update(tables)
    inside: list[ExitStack] = []

    def enter(*_: Any) -> None:
        inside.append(ExitStack())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what was unfrozen by hand, at each call
            inside[-1].enter_context(disable_adapter(model))

    def leave(*_: Any) -> None:
        inside.pop().close()

    made.register_forward_pre_hook(enter)
    made.register_forward_hook(leave, always_call=True)
    return made


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, without gradients, inside ``for_inference``. Afterwards every module has the mode that it had before.

    Modes are restored module by module, since a frozen part may be in eval mode inside a training model. Gradients are
    off by ``no_grad`` and not by ``inference_mode``, because a training step may later use tensors that are cached now.
    """
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), for_inference(model):
            yield
    finally:
        for module, training in before:
            module.training = training
