"""Any other matrix that hangs on a module as a parameter: a layer that a user wrote, positions, a table.

What the module does with it is not known, and need not be: it reads the matrix, and gets the effective one. It is taken
by a rule that names the parameter (``*.mixer.weight``), and not by one that names modules, such as ``*``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from trimtab.bases import _base, _held


class ParameterBase(_held.DenseHeldBase):
    """A matrix of which no other base knows what it is; ``[out, in]`` is its own shape."""

    is_linear = False
    is_fallback = True
    is_peft_parameter = True

    def peft_place(self, name: str) -> str | None:
        return name

    @staticmethod
    def holds(module: nn.Module) -> Sequence[str]:
        if type(module).__module__.startswith("torch.nn."):  # lists of parameters, and layers with kernels of their own
            return ()
        return [
            name
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.dim() == 2 and _base.is_plain(parameter)
        ]

    @staticmethod
    def knows(module: nn.Module) -> bool:
        return isinstance(module, _held.HeldWeight) and module.attribute in ParameterBase.holds(module.holder)
