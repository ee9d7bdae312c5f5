"""What every kind of frozen module can do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from trimtab.bases import _offloading
from trimtab.ops.decomposition import Axis, squared_norms
from trimtab.ops.linear_map import MATRIX, LinearMap
from trimtab.ops.read_weight import read_weight
from trimtab.ops.spread import is_spread, whole

Kind = Literal["weight", "block", "module", "table"]
"""What a method can sit on: a layer that multiplies with one weight; a block of several modules around which one hidden
state comes in and goes out; any module, whose own tensors are trained; or a table of tokens, of which rows are."""

DENSE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes in which a dense weight may be stored."""


class Base:
    """A handle on one frozen module. It owns no tensor: what the module holds is read through it each time."""

    kind: ClassVar[Kind]

    is_fallback: ClassVar[bool] = False
    """Whether it takes what no other base knows, where a rule names just that."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @staticmethod
    def knows(module: nn.Module) -> bool:
        """Whether ``module`` is of this kind."""
        raise NotImplementedError

    @staticmethod
    def refuses(module: nn.Module) -> str:
        """Why ``module``, which looks as if it were of this kind, is not; empty if it does not look so."""
        return ""

    @staticmethod
    def holds(module: nn.Module) -> Sequence[str]:
        """Which parameters of ``module`` are weights of this kind, each a target of its own: ``MODULE.PARAMETER``."""
        return ()

    @staticmethod
    def parts(module: nn.Module) -> Sequence[str]:
        """The children of a module with such weights that a glob over the module's name selects with them."""
        return ()

    @property
    def owner(self) -> nn.Module:
        """The module that has what is trained here among its own parameters."""
        return self.module

    @property
    def identity(self) -> object:
        """What an adapter belongs to: modules with the same one share an adapter."""
        raise NotImplementedError

    @property
    def shared(self) -> tuple[object, ...]:
        """What may hang in other modules, too, so that one rule has to decide about all of them."""
        return (self.identity,)

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the base multiplies."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        raise NotImplementedError


class WeightBase(Base):
    """A handle on a layer that multiplies with one weight ``[out, in]``."""

    kind = "weight"

    stored_dense: ClassVar[bool] = True
    """Whether the weight lies in memory as it multiplies. Else it is computed at every look, and never kept."""
    stored_transposed: ClassVar[bool] = False
    """Whether the weight lies in memory as ``[in, out]``."""

    is_linear: ClassVar[bool] = True
    """Whether the layer is a product with a matrix over the last dimension: what ``all-linear`` means, and what can be
    quantised."""

    through: LinearMap = MATRIX
    """How a batch goes through the weight."""

    is_peft_parameter: ClassVar[bool] = False
    """Whether PEFT reaches the weight as a parameter (``target_parameters``), and not by the name of a module."""

    peft_names: ClassVar[Mapping[str, str]] = {
        "A": "lora_A.weight",
        "B": "lora_B.weight",
        "magnitude": "lora_magnitude_vector",
    }
    """What PEFT calls the trained tensors of a low-rank update on such a layer."""

    @property
    def parameter(self) -> nn.Parameter:
        """The stored weight. Two modules with the same one are tied."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def attribute(self) -> str:
        """The name of the weight at the module that has it."""
        return "weight"

    def at_hand(self) -> Tensor:
        """The stored weight with all its numbers, which accelerate or FSDP2 may keep elsewhere between two calls."""
        parameter = self.parameter
        return _offloading.fetched(self.owner, self.attribute, parameter) if parameter.is_meta else whole(parameter)

    @property
    def is_called(self) -> bool:
        """Whether the layer is called with a batch. Else its weight is only read, and no input passes by."""
        return True

    def peft_place(self, name: str) -> str | None:
        """Where PEFT keeps the tensors of a layer that is called ``name``; None if it has no place for such a layer."""
        return name if self.is_called else None

    def peft_partner(self, name: str) -> str | None:
        """The layer that PEFT adapts whenever it adapts this one, called ``name``, and with the same numbers."""
        return None

    @property
    def stack(self) -> tuple[int, ...]:
        """The axes before ``[out, in]`` of a stack of weights: ``(experts,)``. A method's tensors have them, too."""
        return ()

    @property
    def groups(self) -> int:
        """Into how many groups the inputs and outputs are cut, of which each output reads the inputs of its own."""
        return 1

    @property
    def changes_products(self) -> bool:
        """Whether the module changes a product with the weight in place."""
        return False

    @property
    def identity(self) -> object:
        return self.parameter

    @property
    def bias(self) -> Tensor | None:
        """``[out]``, or None."""
        if (bias := self.stored_bias) is None or not bias.is_meta:
            return None if bias is None else whole(bias)
        return _offloading.fetched(self.owner, self.bias_attribute or "bias", bias)

    @property
    def stored_bias(self) -> Tensor | None:
        """The bias as it is stored, which may be without its numbers (``at_hand``)."""
        return self.module.bias  # type: ignore[return-value]

    @property
    def bias_attribute(self) -> str | None:
        """The name of the bias at the module that has the weight."""
        return "bias"

    @property
    def dtype(self) -> torch.dtype:
        return self.parameter.dtype

    @property
    def device(self) -> torch.device:
        return _offloading.device_of(self.owner, self.parameter)

    @property
    def shared(self) -> tuple[object, ...]:
        return (self.parameter,)

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight ``[out, in]``: a view in the base's own dtype where it is stored dense; else a new tensor
        in ``dtype`` (None: the base's)."""
        raise NotImplementedError

    def again(self, dtype: torch.dtype) -> Callable[[], Tensor] | None:
        """How the backward pass gets ``weight(dtype)`` once more, as a new tensor of its own; None where the tensor
        itself may be kept for it."""
        return None

    def require(self) -> None:
        """Raise PlanError if this layer is of a kind that is known, and yet can have no adapter."""

    @property
    def frozen_column(self) -> int | None:
        """The column of the weight that training leaves as it is, like the padding row of a look-up; None for none."""
        return None

    first_factor_zero: ClassVar[bool] = False
    """Whether a low-rank update ``B A`` starts with A at zero and B drawn; else it is the other way round."""

    def prepared(self, x: Tensor) -> Tensor:
        """``x`` as it goes through the map: where a layer first pads its input, padded. Differentiable."""
        return x

    def dtype_for(self, x: Tensor) -> torch.dtype:
        """The dtype in which ``x`` is multiplied."""
        return self.dtype

    def multiply(self, x: Tensor) -> Tensor:
        """What the bare layer gives for ``x``, as the adapted one has it at its start."""
        output: Tensor = self.module(x)
        return output

    def squared_norms(self, axis: Axis) -> Tensor:
        """Squared norms of the rows ``[out]`` or columns ``[in]``, in float64."""
        with torch.no_grad():
            return squared_norms(self.weight(), axis)

    def stored(self) -> tuple[Tensor, ...]:
        """The tensors that the weight is made of."""
        return (self.parameter,)

    def read(self, adapter: Any) -> Tensor:
        """What code gets that reads the weight of the module, beside which ``adapter`` lies (``ops.read_weight``)."""
        shape = self.parameter.shape if self.stored_dense else self.shape
        return read_weight(
            lambda: adapter.acting_weight(self),
            adapter.weight_tensors(),
            of=(shape, self.dtype, self.device),
            assign=self._assign if self.stored_dense else None,
        )

    def _assign(self, value: Tensor) -> None:
        self.parameter.data = value

    def as_dense(self, dtype: torch.dtype) -> nn.Module:
        """A module with a dense weight that does what this one does: this one, if its weight is stored dense."""
        return self.module

    def as_stored(self, weight: Tensor) -> Tensor:
        """``weight [out, in]`` laid out as the module stores its own."""
        raise NotImplementedError

    def as_weight(self, stored: Tensor) -> Tensor:
        """A weight that is laid out as the module stores its own, as ``[out, in]``."""
        return self.as_stored(stored)  # which is the same, or turned, and so is the way back

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Replace the stored weight by ``weight [out, in]``, rounded to what the base stores, in place."""
        _offloading.write(self.owner, self.attribute, self.parameter, self.as_stored(weight))

    @torch.no_grad()
    def write_bias(self, bias: Tensor) -> None:
        """Replace the stored bias by ``bias [out]``, rounded to its dtype, in place."""
        assert self.stored_bias is not None
        _offloading.write(self.owner, self.bias_attribute or "bias", self.stored_bias, bias)

    def peft_key(self, name: str) -> str:
        """Which of PEFT's tensors holds the trained tensor ``name``, by our name of it; and the other way round."""
        return name

    def in_layout(self, name: str, tensor: Tensor) -> Tensor:
        """The trained tensor ``name`` of a low-rank update (``A [rank, in]``, ``B [out, rank]`` or ``magnitude [out]``)
        in the shape that PEFT gives it on such a layer."""
        return tensor

    def as_matrix(self, name: str, tensor: Tensor) -> Tensor:
        """The way back from ``in_layout``. A tensor of another shape comes back as it is, and the caller refuses it."""
        return tensor

    def peft_options(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The options that PEFT's ``tensors``, in its layout, ask for on such a layer beside those in its
        configuration."""
        return {}

    def peft_differs(self, options: Any) -> str:
        """Why PEFT computes something else on such a layer than we do with ``options``; empty if it does not."""
        return ""

    def tensor_name(self, name: str) -> str:
        """What the stored weight is called in the files of a model, if its target is called ``name``."""
        return f"{name}.weight"

    def replace(self, parameter: nn.Parameter) -> None:
        """Store ``parameter`` in place of the weight."""
        self.module.weight = parameter

    def replace_bias(self, parameter: nn.Parameter) -> None:
        """Store ``parameter`` in place of the bias."""
        self.module.bias = parameter

    def untie(self) -> None:
        """Give the module a weight of its own, equal to the one that it shared."""
        self.replace(nn.Parameter(self.parameter.detach().clone(), requires_grad=self.parameter.requires_grad))


class BlockBase(Base):
    """A handle on a block of several modules that takes a hidden state ``[..., in]`` and gives one ``[..., out]``."""

    kind = "block"

    @property
    def identity(self) -> object:
        return self.module

    def input(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The hidden state ``[..., in]`` among the arguments of a call of the block; None if there is none."""
        raise NotImplementedError

    def changed(self, output: Any, change: Callable[[Tensor], Tensor]) -> Any:
        """The block's ``output`` with ``change`` applied to the hidden state ``[..., out]`` in it. Raises SurgeryError
        if there is none."""
        raise NotImplementedError


class ModuleBase(Base):
    """A handle on a module whose own tensors are trained, each by its name in the module."""

    kind: ClassVar[Kind] = "module"

    @property
    def identity(self) -> object:
        return self.module

    @property
    def shared(self) -> tuple[object, ...]:
        return tuple(tensor for tensor in self.tensors().values() if isinstance(tensor, nn.Parameter))

    @property
    def dtype(self) -> torch.dtype:
        floating = (one.dtype for one in self.tensors().values() if one.is_floating_point())
        return next(floating, torch.get_default_dtype())

    @property
    def device(self) -> torch.device:
        return _offloading.device_of(self.module, next(iter(self.tensors().values())))

    def tensors(self) -> dict[str, Tensor]:
        """The module's own parameters, and the buffers that are stored with it, by name."""
        raise NotImplementedError

    def call(self, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the module gives with ``tensors`` in the place of its own; buffers among them are changed in place."""
        raise NotImplementedError

    def hang(self, name: str, parameter: nn.Parameter) -> None:
        """Hang ``parameter`` into the place of the module's own."""
        raise NotImplementedError


def can_be_called(module: nn.Module) -> bool:
    """Whether ``module`` has a forward pass; a list of modules or of parameters has none."""
    return type(module).forward is not nn.Module.forward


def holders(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """``module`` and the containers in it whose tensors are its own, each with the prefix of their names."""
    yield prefix, module
    for attribute, child in module._modules.items():
        if child is not None and not can_be_called(child):
            yield from holders(child, f"{prefix}{attribute}.")


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of ``module`` without those of the modules inside it that can be called, by name."""
    for prefix, holder in holders(module):
        for name, parameter in holder._parameters.items():
            if parameter is not None:
                yield prefix + name, parameter


def is_instance_by_name(module: nn.Module, place: str, name: str) -> bool:
    """Whether ``module`` is of the class ``name`` of the Python module ``place``, or of one derived from it.

    Asked by name: a model without such a layer need not import its package.
    """
    return any((kind.__module__, kind.__name__) == (place, name) for kind in type(module).__mro__)


def holds_plain_weight(module: Any) -> bool:
    """Whether the weight of ``module`` is an ordinary tensor of numbers that can be multiplied with: no subclass, which
    may mean something else by its elements, and none that a parametrisation computes."""
    return is_plain(module.weight)


def is_plain(weight: Any) -> bool:
    """Whether ``weight`` is a parameter that is an ordinary tensor of numbers."""
    own = weight.to_local() if is_spread(weight) else weight.data if type(weight) is nn.Parameter else None
    return type(own) is Tensor and weight.dtype in DENSE
