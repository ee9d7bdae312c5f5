"""Rows of one batch through different adapters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from trimtab import bases
from trimtab.errors import SurgeryError
from trimtab.surgery.adapted import Adapted, AdaptedParameter, adapted_modules, bare, bare_modules, require_adapted
from trimtab.surgery.mixing import holder_axes, mixed_holder
from trimtab.surgery.names import known_adapter
from trimtab.surgery.row_plan import RowPlan
from trimtab.surgery.wrappers import unwrapped

# Modules that are called with something else than the rows of the batch, whatever the sizes say: the tokens that were
# sent to one expert of a list, and the distances between tokens (T5).
_OTHER_ROWS = re.compile(r"(^|\.)experts\.\d+(\.|$)|(^|\.)relative_attention_bias$")


@contextmanager
def per_row(model: nn.Module, names: Sequence[str | None]) -> Iterator[RowPlan]:
    """A context in which row i of each batch that ``model`` is called with goes through the adapter ``names[i]``; None:
    through none.

    A row gets the output that it would get alone, to rounding. One product with each frozen weight serves all rows, and
    each adapter adds its own to its rows, so a mixed batch costs little more than one through one adapter. Which
    adapter is active does not matter, and stays as it is. Rows are on the first axis of all that the model's modules
    are called with (``nn.MultiheadAttention`` may have them on the second). ``generate`` and its cache go as ever;
    where it makes several rows of one (beams, ``num_return_sequences``), those go through the row's adapter.

    Gradients go to the adapters that ask for some, at the price of a pass for each adapter; on a GPU, MoRA, and LoRA
    and DoRA up to rank 32, share theirs. As in ``trimtab.for_inference``, norms are kept from one pass without
    gradients to the next; after a pass with gradients they are computed again. Contexts may be nested: the inner one
    rules. The context gives the plan of its rows, which a server can ``deal`` anew from one batch to the next.

    Raises SurgeryError if there is no adapter of such a name; for a batch with another number of rows than ``names``;
    and where rows cannot be told apart: experts that get their tokens in an order of their own, a weight that is read
    by a module which is not called by rows. Such modules may have adapters, as long as no two rows differ there.
    """
    model = unwrapped(model)
    require_adapted(model, "per_row")
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise SurgeryError(
            f"per_row: expected a list with the name of an adapter, or None, for each row of a batch, got {names!r}"
        )
    for name in names:
        if name is not None:
            known_adapter(model, name, "per_row")
    plan = RowPlan(names)
    adapted = list(adapted_modules(model))
    mixed = [(place, module) for place, module in adapted if len(plan.groups(module.adapter_slots)) > 1]
    for place, module in mixed:
        _require_rows(place, module)
    with ExitStack() as left:
        for holder in _holders(model, [module for _, module in mixed]):
            left.enter_context(_set(holder, "forward", partial(_holder_forward, plan, holder)))
        for _, module in adapted:
            left.enter_context(_set(module, "_rows", plan))
            for name in (name for name in module.adapter_slots if name in plan.names):
                left.callback(_release, module, name)
                module.adapter_of(name).hold()
        first = adapted[0][1]

        def begin(_: nn.Module, args: Any, kwargs: Any) -> None:
            if vars(first).get("_rows") is plan:  # and no context inside of this one
                plan.begin(args, kwargs)

        left.callback(model.register_forward_pre_hook(begin, with_kwargs=True).remove)
        if callable(generate := getattr(model, "generate", None)):
            if isinstance(generate, partial) and generate.func is _generate:
                generate = generate.args[1]
            left.enter_context(_set(model, "generate", partial(_generate, plan, generate)))
        if mixed:
            # torch's fused attention takes the weights of whole encoder layers at once.
            left.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
            torch.backends.mha.set_fastpath_enabled(False)
        yield plan


def _release(module: Adapted, name: str) -> None:
    adapter = module.adapter_of(name)
    adapter.release()
    if name != module.active_name and not adapter.is_held:
        adapter.rest()


def _generate(plan: RowPlan, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``generate`` of the model, which may make several rows of one."""
    plan.begin(args, kwargs)
    before, plan.expands = plan.expands, True
    try:
        return generate(*args, **kwargs)
    finally:
        plan.expands = before
        plan.end()


def _holder_forward(plan: RowPlan, holder: nn.Module, *args: Any, **kwargs: Any) -> Any:
    inside = {name for module in holder.modules() if isinstance(module, Adapted) for name in module.adapter_slots}
    groups = plan.groups(sorted(inside))
    if len(groups) == 1:
        return type(holder).forward(holder, *args, **kwargs)
    return mixed_holder(plan, groups, holder, args, kwargs)


def _holders(model: nn.Module, mixed: Sequence[Adapted]) -> list[nn.Module]:
    """The modules that read weights of ``mixed`` ones instead of calling these. Raises SurgeryError if one of them
    cannot be called by rows."""
    ids = {id(module) for module in mixed}
    found = {id(module.base.holder): module.base.holder for module in mixed if isinstance(module, AdaptedParameter)}
    for holder in {id(one): one for _, one in bare_modules(model)}.values():
        if any(id(part) in ids for part in bases.parts(bare(holder))):
            found[id(bare(holder))] = bare(holder)
    for holder in found.values():
        holder_axes(holder)
    for name, layer in model.named_modules():
        attention = getattr(layer, "self_attn", None)
        turned = isinstance(attention, nn.MultiheadAttention) and not attention.batch_first
        turned = turned and isinstance(layer, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
        if turned and any(id(inner) in ids for inner in layer.modules()):
            raise SurgeryError(
                f"per_row: {name or 'the model'} is a {type(layer).__name__} with batch_first=False, whose rows are "
                "not on the first axis. Make it with batch_first=True, or leave it out of the adapters"
            )
    return list(found.values())


def _require_rows(place: str, module: Adapted) -> None:
    if _OTHER_ROWS.search(place):
        raise SurgeryError(
            f"per_row: {place} is not called with the rows of the batch (but with the tokens of one expert, or with "
            "distances), so rows cannot have different adapters there. Leave it out of the adapters, or give all rows "
            "of a batch one adapter (trimtab.set_adapter)"
        )


@contextmanager
def _set(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """A context in which the attribute is in the module's own dictionary, where it hides one of its class."""
    own, nothing = vars(module), object()
    before = own.get(name, nothing)
    own[name] = value
    try:
        yield
    finally:
        if before is nothing:
            own.pop(name, None)
        else:
            own[name] = before
