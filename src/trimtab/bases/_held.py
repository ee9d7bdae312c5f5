"""Weights that hang directly on a module as parameters, and not as the ``weight`` of a layer: the stacked projections
of ``nn.MultiheadAttention``, experts kept in one tensor.

Such a weight is a target of its own. What stands for it, wherever the library expects a module, is a ``HeldWeight``; a
base of this kind says which parameters of a module it takes (``holds``), and the rest of the library asks no further.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from torch import Tensor, nn

from trimtab.bases import _base


class HeldWeight(nn.Module):
    """The parameter ``attribute`` of the module ``holder``, seen as a layer of its own. It holds no tensor itself."""

    holder: nn.Module

    def __init__(self, holder: nn.Module, attribute: str) -> None:
        super().__init__()
        self.__dict__["holder"] = holder  # not as a child, since the adapter of this weight is a child of the holder
        self.attribute = attribute

    @property
    def weight(self) -> Tensor:
        """The frozen weight, whatever a look at the holder's attribute gives."""
        weight: Tensor = stored(self.holder, self.attribute)
        return weight

    def extra_repr(self) -> str:
        return f"{type(self.holder).__name__}.{self.attribute}"


def stored(holder: nn.Module, attribute: str) -> Any:
    """What ``holder`` keeps under ``attribute``: its parameter, or the plain tensor that DataParallel puts there; None
    if there is neither."""
    own = vars(holder)
    return own[attribute] if attribute in own else holder._parameters.get(attribute)


class HeldBase(_base.WeightBase):
    """A handle on a weight that hangs directly on a module. The module reads it, so no layer is called."""

    module: HeldWeight

    wraps_forward: ClassVar[bool] = False
    """Whether ``around_forward`` is entered for each forward pass of the holder."""

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.weight  # type: ignore[return-value]

    @property
    def bias_attribute(self) -> str | None:
        """The parameter of the holder that it adds to what this weight gives; None if it has none."""
        return None

    @property
    def stored_bias(self) -> Tensor | None:
        bias: Tensor | None = None if self.bias_attribute is None else stored(self.owner, self.bias_attribute)
        return bias

    def replace_bias(self, parameter: nn.Parameter) -> None:
        assert self.bias_attribute is not None
        self.owner._parameters[self.bias_attribute] = parameter

    @property
    def is_called(self) -> bool:
        return False

    @property
    def owner(self) -> nn.Module:
        return self.module.holder

    @property
    def attribute(self) -> str:
        return self.module.attribute

    def tensor_name(self, name: str) -> str:
        return name

    def replace(self, parameter: nn.Parameter) -> None:
        self.owner._parameters[self.module.attribute] = parameter

    def on(self, holder: nn.Module) -> HeldBase:
        """A handle on the weight of the same name that hangs on ``holder``, a copy of this one's."""
        return self if holder is self.owner else type(self)(HeldWeight(holder, self.module.attribute))

    def reading(self, adapter: Any) -> Tensor | None:
        """What a look at the holder's attribute gives; None for the effective weight, as any layer shows its own."""
        return None

    def around_forward(self, adapter: Any) -> AbstractContextManager[object]:
        """The context in which the holder's forward pass runs, if ``wraps_forward``."""
        return nullcontext()


class DenseHeldBase(HeldBase):
    """A held weight that is stored dense, as ``[out, in]``."""

    @property
    def shape(self) -> tuple[int, int]:
        out_features, in_features = self.parameter.shape
        return out_features, in_features

    def weight(self, dtype: Any = None) -> Tensor:
        return self.at_hand()

    def as_stored(self, weight: Tensor) -> Tensor:
        return weight
