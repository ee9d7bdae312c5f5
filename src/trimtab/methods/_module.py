"""A whole module trained: a copy of each of its own tensors, which it is called with in their place.

    y = f(x; V)        f the module's own forward pass, V its tensors, which start at the module's own

Parameters have a copy in the dtype of the trained tensors, and are used in the module's own. What the module counts
while it trains (the statistics of a batch norm) is copied as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.bases import ModuleBase, stay
from trimtab.errors import PlanError, SurgeryError
from trimtab.methods import _method
from trimtab.ops.spread import whole


class ModuleMethod(_method.Method):
    """The trained copies of a module's own tensors, under their names in the module.

    Args:
        base: the module; its tensors are copied.
        options: the method's options. Their ``tensors`` are the names of those that are trained, or None for all; what
            else there is stays the module's own.

    Raises PlanError if the module has no such tensor.
    """

    sits_on = "module"
    trains_base = True

    def __init__(self, base: ModuleBase, options: Any) -> None:
        super().__init__(base, options)
        stay(base.module)
        own, tensors = base.tensors(), options.tensors
        if unknown := [name for name in tensors or () if name not in own]:
            raise PlanError(f"it has no tensor {unknown[0]!r}; a {type(base.module).__name__} has {', '.join(own)}")
        self._attributes: dict[str, str] = {}
        kept: dict[int, nn.Parameter] = {}  # a parameter of two names has one copy
        for name, tensor in own.items():
            if tensors is not None and name not in tensors:
                continue
            attribute = name.replace(".", "_")
            while hasattr(self, attribute):
                attribute += "_"
            self._attributes[name] = attribute
            if not isinstance(tensor, nn.Parameter):
                self.register_buffer(attribute, tensor.detach().clone())
                continue
            if id(tensor) not in kept:
                kept[id(tensor)] = nn.Parameter(whole(tensor).detach().to(self.dtype, copy=True))
            self.register_parameter(attribute, kept[id(tensor)])
        self.rate_groups = {self._attributes[name]: "bias" for name, one in own.items() if self._is_bias(name, one)}

    def _is_bias(self, name: str, tensor: Tensor) -> bool:
        return name in self._attributes and tensor.dim() < 2

    def stored_tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, attribute) for name, attribute in self._attributes.items()}

    def starts_at_base(self, name: str) -> bool:
        return True

    def of_base(self, name: str, base: ModuleBase) -> Tensor:
        own = {attribute: name for name, attribute in self._attributes.items()}
        return whole(base.tensors()[own[name]])

    def copies(self, base: ModuleBase) -> dict[str, nn.Parameter]:
        own = base.tensors()
        return {
            attribute: parameter
            for name, attribute in self._attributes.items()
            if isinstance(parameter := own[name], nn.Parameter)
        }

    def __contains__(self, name: str) -> bool:
        return name in self._attributes

    def tensor(self, name: str, base: ModuleBase) -> Tensor:
        """The trained tensor ``name`` as the module computes with it: in the module's dtype, with its gradient."""
        mine: Tensor = getattr(self, self._attributes[name])
        return mine.to(base.tensors()[name].dtype)

    def forward(self, base: ModuleBase, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module gives for these arguments with the trained tensors."""
        own = base.tensors()
        mine = {name: getattr(self, attribute).to(own[name].dtype) for name, attribute in self._attributes.items()}
        if any(tensor.is_meta and not own[name].is_meta for name, tensor in mine.items()):
            raise SurgeryError(_method.NO_MEMORY.format(method="full"))
        return base.call(mine, args, kwargs)

    @torch.no_grad()
    def effective_weight(self, base: ModuleBase, dtype: torch.dtype | None = None) -> Tensor:
        """The module's ``weight``, as it is stored there. Raises SurgeryError if it has none."""
        if "weight" not in base.tensors():
            raise SurgeryError(f"a {type(base.module).__name__} has no 'weight'; it has {', '.join(base.tensors())}")
        weight = getattr(self, self._attributes["weight"]) if "weight" in self else whole(base.tensors()["weight"])
        work = dtype or _method.full_dtype(base)
        return weight.detach().to(work, copy=True)

    def extra_repr(self) -> str:
        return ", ".join(self._attributes)
