"""``nn.MultiheadAttention``: its query, key and value projections, which hang on it as parameters.

They are stacked in ``in_proj_weight [3 E, E]``; or, where keys or values have a width of their own, they are
``q_proj_weight [E, E]``, ``k_proj_weight [E, kdim]`` and ``v_proj_weight [E, vdim]``. The output projection
``out_proj`` is a linear layer, which the attention reads and does not call.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from trimtab.bases import _base, _held

_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class AttentionBase(_held.DenseHeldBase):
    """One stored projection of an attention."""

    @staticmethod
    def holds(module: nn.Module) -> Sequence[str]:
        if not isinstance(module, nn.MultiheadAttention):
            return ()
        return [name for name in _WEIGHTS if _base.is_plain(module._parameters.get(name))]

    @staticmethod
    def parts(module: nn.Module) -> Sequence[str]:
        return ["out_proj"] if isinstance(module, nn.MultiheadAttention) else ()

    @property
    def bias_attribute(self) -> str | None:
        # There is one bias for all three projections, whether they are stacked or not.
        first = self.module.attribute in ("in_proj_weight", "q_proj_weight")
        return "in_proj_bias" if first and _held.stored(self.owner, "in_proj_bias") is not None else None

    def peft_place(self, name: str) -> str | None:
        """PEFT wraps the attention: its own tensors are those of ``in_proj_weight``."""
        holder, _, attribute = name.rpartition(".")
        return holder if attribute == "in_proj_weight" else None

    def peft_partner(self, name: str) -> str | None:
        return name.rpartition(".")[0] + ".out_proj"

    @staticmethod
    def knows(module: nn.Module) -> bool:
        return isinstance(module, _held.HeldWeight) and module.attribute in AttentionBase.holds(module.holder)
