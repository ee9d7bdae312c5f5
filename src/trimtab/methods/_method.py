"""What every method shares, whatever it sits on."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from trimtab.bases import Base, Kind, stay
from trimtab.errors import PlanError, SurgeryError

TRAINING_ONLY: Final = "training only"
"""Marks an option that changes how training goes on, and not what the trained tensors compute."""
NO_MEMORY: Final = (
    "the adapter ({method}) is on the meta device, without numbers, and the weight that it sits on is not. Give it "
    "memory (adapter.to_empty(device=...)), or load a state that holds its tensors, too"
)
RateGroup = Literal["weight", "bias", "second factor", "magnitude"]
"""What an optimiser may treat differently. A bias and a magnitude never decay. A second factor is the one that a
low-rank update starts at zero; LoRA+ trains it faster. A magnitude can have a learning rate of its own."""


def full_dtype(base: Base) -> torch.dtype:
    """The dtype of norms, of trained tensors that are told no other, and of what is computed by the plain formula:
    float64 on a float64 base, else float32."""
    return torch.float64 if base.dtype == torch.float64 else torch.float32


class Options(BaseModel):
    """What any method can be told."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    dropout: Annotated[float, TRAINING_ONLY] = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="Dropout on the input of the update, in training only. (Of a look-up's nothing is dropped.)",
    )
    dtype: Annotated[Literal["float32", "bfloat16", "float16", "float64"] | None, TRAINING_ONLY] = Field(
        None, description="Dtype of the trained tensors. Default: float32, or float64 on a float64 base."
    )

    def said(self) -> dict[str, Any]:
        """The options that were set, as keywords that set them again."""
        return self.model_dump(exclude_unset=True)

    @classmethod
    def read(cls, stored: dict[str, Any], tensors: Collection[str]) -> Self:
        """The options that were ``stored`` with an adapter of ``tensors``, by this release or by one before it."""
        return cls(**stored)

    def computes(self) -> dict[str, Any]:
        """What decides the outputs: two adapters that agree in it compute the same from the same tensors."""
        training_only = {name for name, field in type(self).model_fields.items() if TRAINING_ONLY in field.metadata}
        return self.model_dump(exclude=training_only)


class Method(nn.Module):
    """The trained tensors of one method on one frozen module, and what they do. Complete when constructed.

    Args:
        base: the frozen module; read here for its shape, its dtype and what else the method needs, and not kept.
        options: the method's options.
        shape: ``(out, in)``, where it is not to be asked of the base.
    """

    sits_on: ClassVar[Kind]
    """The kind of base that the method takes."""
    options_type: type[Options] = Options
    trains_base: ClassVar[bool] = False
    """Whether the method trains the base weight itself, and not something beside it."""
    _is_replica = False  # nn.DataParallel sets it on its copies, which live for one pass
    rate_groups: Mapping[str, RateGroup] = {}
    """The rate group of each trained tensor that is no plain ``weight``."""
    unit: float = 1.0
    """What a step of an optimiser is counted in: its learning rate is so many times the usual one."""

    def __init__(self, base: Base, options: Options, shape: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.options = options
        self.out_features, self.in_features = shape or base.shape
        self.default_dtype = full_dtype(base)
        self.dtype: torch.dtype = getattr(torch, options.dtype) if options.dtype else self.default_dtype
        self.zero_rows = 0
        self._holds = 0
        self.unset: tuple[str, ...] = ()

    @classmethod
    def fitted(cls, options: Any, shape: tuple[int, int]) -> Any:
        """``options`` with the largest rank that suits a module of ``shape`` ``(out, in)``, where theirs is larger."""
        return options

    @classmethod
    def require_fit(cls, options: Any, shape: tuple[int, int]) -> None:
        """Raise PlanError if the rank is larger than a matrix of ``shape`` ``(out, in)`` can have."""
        if (fitted := cls.fitted(options, shape)) != options:
            raise PlanError(
                f"rank {options.rank} is larger than the matrix: a weight of {shape[0]} x {shape[1]} has rank at most "
                f"{fitted.rank}; lower the rank for this module"
            )

    @classmethod
    def kind_for(cls, options: Any) -> Kind:
        """The kind of base that the method takes with these options."""
        return cls.sits_on

    @classmethod
    def class_for(cls, base: Base) -> type[Method]:
        """The class of the method's adapters on ``base``."""
        return cls

    def stored_tensors(self) -> dict[str, Tensor]:
        """What is saved of the adapter, by name: what is trained, and what is counted while it is."""
        buffers = {
            name: buffer for name, buffer in self._buffers.items() if name not in self._non_persistent_buffers_set
        }
        return {**dict(self.named_parameters()), **{name: one for name, one in buffers.items() if one is not None}}

    def merged(self, name: str, own: Tensor) -> Tensor:
        """What the base's ``own`` tensor becomes, where a copy of it is trained under ``name``."""
        return self.stored_tensors()[name].detach()

    def copies(self, base: Any) -> dict[str, nn.Parameter]:
        """The base's own parameters of which a copy is trained, by the names of the copies in this adapter."""
        return {}

    # Tensors that come from nowhere, and tensors that go somewhere else --------------------------------------------

    def start(self, name: str, tensor: Tensor) -> None:
        """Give the trained tensor ``name`` the value in ``tensor`` that it has before training."""
        tensor.zero_()

    def starts_at_base(self, name: str) -> bool:
        """Whether the trained tensor ``name`` starts at a value of the base, and not at one of its own."""
        return False

    def of_base(self, name: str, base: Any) -> Tensor:
        """The value of the base at which the trained tensor ``name`` starts."""
        raise NotImplementedError

    def _apply(self, *args: Any, **kwargs: Any) -> Method:
        nowhere = [name for name, tensor in self._held_tensors() if tensor.is_meta]
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        # to_empty: there is memory now, and nothing in it. What starts at the base's values waits for the base's.
        with torch.no_grad():
            for name, tensor in self._held_tensors():
                if tensor.is_meta or name not in nowhere:
                    continue
                if not self.starts_at_base(name):
                    self.start(name, tensor)
                elif tensor.is_floating_point():
                    tensor.fill_(math.nan)
                    self.unset = (*self.unset, name)
                else:
                    tensor.zero_()
        return self

    @torch.no_grad()
    def settle(self, base: Any) -> None:
        """Let what starts at the base's values start there now, unless it was loaded in the meantime."""
        for name, tensor in self._held_tensors():
            if name in self.unset and not tensor.is_meta and bool(tensor.isnan().all()):
                value = self.of_base(name, base)
                if value.is_meta:
                    return  # nothing is there yet
                tensor.copy_(value)
        self.unset = ()

    can_refit: ClassVar[bool] = True
    """Whether ``refit`` can follow a base of another size."""

    def ratio_on(self, base: Any) -> Tensor | None:
        """What the magnitude multiplies the weight of ``base`` with; None without one."""
        return None

    @torch.no_grad()
    def refit(self, base: Any, ratio: Tensor | None) -> None:
        """Follow a base that has got more or fewer rows or columns. What is new of an update is zero; ``ratio`` is what
        ``ratio_on`` gave before."""
        if (self.out_features, self.in_features) == base.shape:
            return
        fresh = type(self)(base, self.options)
        for (name, tensor), (_, new) in zip(self._held_tensors(), fresh._held_tensors(), strict=True):
            if new.shape != tensor.shape:  # a tensor that two modules share was made to fit already
                if not self.starts_at_base(name):
                    new.zero_()
                common = tuple(slice(min(sizes)) for sizes in zip(tensor.shape, new.shape, strict=True))
                new[common] = tensor[common].to(new)
                tensor.data = new.to(tensor)
        self.out_features, self.in_features = fresh.out_features, fresh.in_features

    def _held_tensors(self) -> list[tuple[str, Tensor]]:
        held = [*self._parameters.items(), *self._buffers.items()]
        return [(name, tensor) for name, tensor in held if tensor is not None]

    def __setattr__(self, name: str, value: Any) -> None:
        # accelerate keeps these two at a module whose tensors it will keep elsewhere, one before and one after.
        if name == "_old_forward":
            self.__dict__["_before_offloading"] = dict(self._parameters)
        super().__setattr__(name, value)
        if name == "_hf_hook":
            stay(self, self.__dict__.pop("_before_offloading", None))

    def hold(self) -> None:
        """The caller promises that the trained tensors keep their values until ``release``."""
        self._holds += 1

    def release(self) -> None:
        """The end of ``hold``."""
        self._holds -= 1

    @property
    def is_held(self) -> bool:
        """Whether someone has promised that."""
        return bool(self._holds)

    def forget(self) -> None:
        """Drop what follows from the trained tensors and was kept, such as norms: they are about to change."""

    def rest(self) -> Any:
        """Drop whatever was kept, since this adapter is not needed for now, and give what is true of the frozen weight
        alone, for the next adapter on it (``resume``)."""
        self.forget()

    def resume(self, shared: Any) -> None:
        """Take over what ``rest`` of another adapter on the same weight gave."""

    def prepare(self, base: Any) -> None:
        """Compute what all passes share, such as the norms of the frozen weight, if it is not there."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_holds": 0}  # the promise was made for this one, not for a copy

    def effective_weight(self, base: Any, dtype: torch.dtype | None = None) -> Tensor:
        """The weight ``[out, in]`` with which the module acts. Raises SurgeryError where a method changes none."""
        raise SurgeryError(f"{type(self).__module__.rsplit('.', 1)[-1]} changes no weight: it acts on a hidden state")

    def extra_repr(self) -> str:
        said = self.options.model_dump(exclude_defaults=True)
        return ", ".join([f"{self.in_features} -> {self.out_features}", *(f"{k}={v}" for k, v in said.items())])
