"""Experts kept in one parameter: a stack ``[experts, out, in]`` or ``[experts, in, out]`` that hangs on a module.

Mixtral, Qwen-MoE, DeepSeek, gpt-oss, Llama 4 and their kin have such stacks in transformers 5, ``experts.gate_up_proj``
and ``experts.down_proj``. Every expert has an adapter of its own, and the adapters' tensors are stacked likewise. The
model multiplies its experts in the way that its configuration says, as before (``trimtab.methods._effective_stack``).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.bases import _base, _held
from trimtab.errors import PlanError

# Classes that keep [experts, in, out] and have no attribute that says so.
_TURNED = {"Llama4TextExperts"}
# Classes that keep their experts one below the other, [experts * rows, columns], and whether these are [in, out].
_FLAT = {"DbrxExpertGLU": {"w1": False, "v1": False, "w2": True}}
_COUNTS = ("num_experts", "num_local_experts", "num_routed_experts", "moe_num_experts", "n_routed_experts")


class ExpertsBase(_held.HeldBase):
    """A handle on a stack of experts' weights."""

    is_linear = False
    is_peft_parameter = True
    wraps_forward: ClassVar[bool] = True

    @staticmethod
    def holds(module: nn.Module) -> Sequence[str]:
        if not _has_experts(module):
            return ()
        flat = _FLAT.get(type(module).__name__, {})
        held = {name: one for name, one in module._parameters.items() if one is not None}
        return [name for name, parameter in held.items() if parameter.dim() > 2 or name in flat]

    @staticmethod
    def knows(module: nn.Module) -> bool:
        return isinstance(module, _held.HeldWeight) and module.attribute in ExpertsBase.holds(module.holder)

    @property
    def _flat(self) -> dict[str, bool]:
        return _FLAT.get(type(self.owner).__name__, {})

    @property
    def _is_flat(self) -> bool:
        return self.module.attribute in self._flat

    @property
    def stored_transposed(self) -> bool:  # type: ignore[override]
        """Whether the stack is laid out as ``[experts, in, out]``."""
        if self._is_flat:
            return self._flat[self.module.attribute]
        turned = getattr(self.owner, "is_transposed", None)
        return bool(turned) if turned is not None else type(self.owner).__name__ in _TURNED

    def require(self) -> None:
        parameter = self.parameter
        if not _base.is_plain(parameter) or parameter.dim() != (2 if self._is_flat else 3):
            raise PlanError(
                f"experts that are stored quantised ({str(parameter.dtype).removeprefix('torch.')} "
                f"{list(parameter.shape)} of a {type(self.owner).__name__}) cannot be adapted; load the model "
                "dequantised (for gpt-oss: quantization_config=Mxfp4Config(dequantize=True)), or leave them out"
            )

    @property
    def stack(self) -> tuple[int, ...]:
        return (int(self.owner.moe_num_experts) if self._is_flat else self.parameter.shape[0],)  # type: ignore[arg-type]

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of one expert."""
        rows, columns = self.parameter.shape[-2:]
        if self._is_flat:
            rows //= self.stack[0]
        return (columns, rows) if self.stored_transposed else (rows, columns)

    @property
    def is_called(self) -> bool:
        return True

    @property
    def changes_products(self) -> bool:
        return bool(getattr(self.owner, "has_bias", False))

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.as_weight(self.at_hand())

    def as_stored(self, weight: Tensor) -> Tensor:
        stored = weight.mT if self.stored_transposed else weight
        return stored.flatten(0, 1) if self._is_flat else stored

    def as_weight(self, stored: Tensor) -> Tensor:
        if self._is_flat:
            stored = stored.reshape(*self.stack, -1, stored.shape[-1])
        return stored.mT if self.stored_transposed else stored

    @property
    def _peft_turns(self) -> bool:
        """Whether PEFT takes the stack's last axis for the input, where it is the output."""
        return self.stored_transposed and not getattr(self.owner, "is_transposed", False)

    def peft_place(self, name: str) -> str | None:
        return None if self._is_flat else name  # where PEFT has one A for all experts

    def peft_key(self, name: str) -> str:
        return {"A": "B", "B": "A"}.get(name, name) if self._peft_turns else name

    def in_layout(self, name: str, tensor: Tensor) -> Tensor:
        # PEFT has A [experts * rank, in] and B [out, rank * experts].
        if self._peft_turns:
            tensor = tensor.mT
        return tensor.flatten(0, 1) if self.peft_key(name) == "A" else tensor.permute(1, 2, 0).flatten(1)

    def as_matrix(self, name: str, tensor: Tensor) -> Tensor:
        (experts,), kind = self.stack, self.peft_key(name)
        if self._is_flat and kind in ("A", "B") and tensor.dim() == 2:
            whole = tensor.expand(experts, -1, -1) if kind == "A" else tensor.unflatten(0, (experts, -1))
            return whole.mT if self._peft_turns else whole
        if kind not in ("A", "B") or tensor.dim() != 2 or tensor.shape["AB".index(kind)] % experts:
            return tensor
        if kind == "A":
            stacked: Tensor = tensor.unflatten(0, (experts, -1))
        else:
            stacked = tensor.unflatten(1, (-1, experts)).movedim(2, 0)
        return stacked.mT if self._peft_turns else stacked

    def reading(self, adapter: Any) -> Tensor | None:
        return None if torch.compiler.is_compiling() else adapter.look(self)

    def around_forward(self, adapter: Any) -> AbstractContextManager[object]:
        around: AbstractContextManager[object] = adapter.one_pass(self)
        return around


def _has_experts(module: nn.Module) -> bool:
    kind = type(module)
    # Asked of a module, what it does not have costs an error that is caught, and every module is asked.
    counts = (getattr(module, count) for count in _COUNTS if count in vars(module) or hasattr(kind, count))
    return "expert" in kind.__name__.lower() or any(isinstance(count, int) for count in counts)
