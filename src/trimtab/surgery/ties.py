"""The ties of a transformers model through a merge: what is untied stays untied, and every other tie stays a tie.

transformers ties weights by a table of the model's class (target: source) wherever ``config.tie_word_embeddings`` is
set; when it loads a model it leaves those alone that the file holds apart, and when it saves one it drops a target that
is the same tensor as another name. The flag may stand for more than one tie, and in some families it also scales what
the head is given. So it is turned off only where it says nothing but the one tie that the merge has undone.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from torch import nn

from trimtab.surgery.adapted import bare, bare_modules

_FLAG = "tie_word_embeddings"


class _Tied(NamedTuple):
    """One model (or a model inside it) whose configuration ties weights; names are relative to it."""

    prefix: str
    model: Any
    sources: dict[str, str]


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter under each name that it has in the bare model."""
    return {
        f"{name}.{attribute}" if name else attribute: parameter
        for name, module in bare_modules(model)
        for attribute, parameter in bare(module)._parameters.items()
        if parameter is not None
    }


def keep_other_ties(model: nn.Module, before: dict[str, nn.Parameter]) -> tuple[str, ...]:
    """Let ``model``, whose adapters are merged and removed, be saved, loaded and tied again as it is now.

    ``before`` are the ``parameters_by_name`` of before the merge. Return the names of the modules that got a weight of
    their own here, because the tie that was left to them cannot be expressed by the model's table.
    """
    alone = []
    tied = list(_tied_models(model))
    for prefix, _, sources in tied:
        for target in _undone(model, prefix, sources, before):
            # As one tensor with another name it would not be saved, and be tied to the source again when it is loaded.
            parameter = parameters_by_name(model)[target]
            if sum(held is parameter for module in model.modules() for held in module._parameters.values()) > 1:
                owner, _, attribute = target.rpartition(".")
                own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                model.get_submodule(owner)._parameters[attribute] = own
                alone.append(owner)
    pairs_by_flag: dict[int, int] = {}
    for _, part, sources in tied:
        pairs_by_flag[id(part.config)] = pairs_by_flag.get(id(part.config), 0) + len(sources)
    for prefix, part, sources in tied:
        undone = {target.removeprefix(prefix) for target in _undone(model, prefix, sources, before)}
        if not undone:
            continue
        if pairs_by_flag[id(part.config)] == 1 and not _flag_is_read(model):
            setattr(part.config, _FLAG, False)
        else:
            # On this object alone, so that tie_weights (which resizing the embeddings calls) does not tie it again.
            part._tied_weights_keys = {target: source for target, source in sources.items() if target not in undone}
    _forget_undone(model)
    return tuple(dict.fromkeys(alone))


def _tied_models(model: nn.Module) -> Iterator[_Tied]:
    for prefix, part in model.named_modules():
        if hasattr(part, "get_expanded_tied_weights_keys") and (sources := part.get_expanded_tied_weights_keys()):
            yield _Tied(f"{prefix}." if prefix else "", part, sources)


def _undone(model: nn.Module, prefix: str, sources: dict[str, str], before: dict[str, nn.Parameter]) -> list[str]:
    """The full names of the targets that were tied to their source before, and are not now."""
    now = parameters_by_name(model)

    def are_one(parameters: dict[str, nn.Parameter], target: str, source: str) -> bool:
        one = parameters.get(prefix + target)
        return one is not None and one is parameters.get(prefix + source)

    return [
        prefix + target
        for target, source in sources.items()
        if are_one(before, target, source) and not are_one(now, target, source)
    ]


def _forget_undone(model: nn.Module) -> None:
    """Remove the undone ties from the lists of ties that the model made when it was built."""
    for part in model.modules():
        ties = getattr(part, "all_tied_weights_keys", None)
        if ties:
            now = parameters_by_name(part)
            for target, source in list(ties.items()):
                if target in now and source in now and now[target] is not now[source]:
                    del ties[target]


def _flag_is_read(model: nn.Module) -> bool:
    """Whether the code of a module in ``model`` reads the flag, outside of what every transformers model inherits."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    return any(
        _reads(function.__code__)
        for kind in kinds
        if kind.__module__.partition(".")[0] != "torch" and kind.__module__ != "transformers.modeling_utils"
        for name, value in vars(kind).items()
        if name == "forward" and isinstance(function := _innermost(value), FunctionType)
    )


def _innermost(function: Any) -> Any:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def _reads(code: CodeType) -> bool:
    return _FLAG in code.co_names or any(_reads(inner) for inner in code.co_consts if isinstance(inner, CodeType))
