"""What a model holds beside its registered modules: the same modules in a plain list or tuple, or as an attribute that
went round ``nn.Module``. A forward pass that goes through those (MaskFormer's heads) would never meet an adapter that
only took the registered module's place."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from trimtab.bases import HeldWeight


def replace_references(model: nn.Module, replacement: Mapping[int, nn.Module]) -> None:
    """Let them hold ``replacement[id(module)]`` in place of each module that is in it. Lists are changed in place."""
    inside = {id(inner) for new in replacement.values() for inner in (new, *new.children())}
    for module in model.modules():
        if id(module) in inside or isinstance(module, HeldWeight):
            continue  # an adapted module holds what it adapts, and an adapted weight the frozen module that has it
        for name, held in list(vars(module).items()):
            if isinstance(held, nn.Module) and id(held) in replacement:
                vars(module)[name] = replacement[id(held)]
            elif isinstance(held, list | tuple) and any(id(one) in replacement for one in held):
                new = [replacement.get(id(one), one) for one in held]
                if isinstance(held, list):
                    held[:] = new
                elif type(held) is tuple:
                    vars(module)[name] = tuple(new)
