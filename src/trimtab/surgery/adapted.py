"""Adapted modules: what takes the place of a frozen module, how it is put in and taken out, and which a model has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab import bases
from trimtab.bases import Base, BlockBase, HeldBase, HeldWeight, ModuleBase, WeightBase
from trimtab.errors import SurgeryError
from trimtab.methods import Method
from trimtab.ops.read_weight import read_weight
from trimtab.surgery import weight_of_own
from trimtab.surgery.carrier import DEFAULT, Carrier, Slot, place_of
from trimtab.surgery.holding import own_class
from trimtab.surgery.hooks import call_with_hooks, has_hooks
from trimtab.surgery.mixing import mixed_call, mixed_layer
from trimtab.surgery.row_plan import Group
from trimtab.surgery.wrappers import unwrapped


class Adapted(Carrier):
    """A frozen module ``base`` with the adapters beside it. Attributes that it lacks are looked up on the module."""

    @staticmethod
    def around(handle: Base, adapter: Method, method: str, rule: int) -> Adapted:
        """An adapted module of the kind that ``handle`` asks for, with one adapter."""
        return Adapted.kind_for(handle)(DEFAULT, Slot(handle, method, rule, place_of(DEFAULT), 0), adapter)

    @staticmethod
    def kind_for(handle: Base) -> type[Adapted]:
        if isinstance(handle, ModuleBase):
            return AdaptedModule
        if isinstance(handle, HeldBase):
            return AdaptedParameter
        return AdaptedBlock if handle.kind == "block" else AdaptedLayer

    def _by_rows(self, groups: list[Group], args: Any, kwargs: Any) -> Any:
        """What the module gives inside of ``per_row``, for the rows of each adapter."""
        # Tensors may have changed before a pass with gradients, and may change after it.
        forgotten = self.every_adapter() if torch.is_grad_enabled() else []
        for adapter in forgotten:
            adapter.forget()
        try:
            return self._rows_through(groups, args, kwargs)
        finally:
            for adapter in forgotten:
                adapter.forget()

    def _rows_through(self, groups: list[Group], args: Any, kwargs: Any) -> Any:
        plan, what = self._rows, f"a {type(self.base).__name__}"
        assert plan is not None
        if len(groups) == 1:
            return self._alone(groups[0].name, args, kwargs)
        handles = {group.name: self.handle_of(group.name) for group in groups if group.name is not None}
        kinds = {handle.kind for handle in handles.values()}
        if kinds == {"block"}:
            return self.base(*args, **kwargs)  # with the hook on it
        base = next(iter(handles.values()))
        if kinds == {"weight"} and isinstance(base, WeightBase):
            (x,) = args or kwargs.values()
            adapters = {group.name: None if group.name is None else self.adapter_of(group.name) for group in groups}
            return mixed_layer(plan, groups, adapters, base, x)

        def alone(*args: Any, **kwargs: Any) -> Any:
            return self._alone(self.acting_names()[0], args, kwargs)

        # Modules inside of this one may have adapters that it has not.
        inside = {name for one in self.modules() if isinstance(one, Adapted) for name in one.adapter_slots}
        return mixed_call(plan, plan.groups(sorted(inside)), alone, args, kwargs, what=what)

    def _alone(self, name: str | None, args: Any, kwargs: Any) -> Any:
        """What the module gives with the adapter ``name`` for all rows."""
        layer: Any = next((slot.handle for slot in self._slots.values() if slot.handle.kind == "weight"), None)
        handle = layer if name is None else self.handle_of(name)
        if handle is None or handle.kind == "block":
            return self.base(*args, **kwargs)
        if handle.kind != "weight":
            return self.adapter_of(name or "")(handle, args, kwargs)
        (x,) = args or kwargs.values()
        return layer.multiply(x) if name is None else self.adapter_of(name)(x, handle)

    def _refused(self, own: Tensor) -> Tensor:
        """What code gets that reads a tensor of this module while the rows of the batch have different ones: its shape
        and dtype, and SurgeryError for its numbers."""

        def numbers() -> Tensor:
            raise SurgeryError(
                f"per_row: a tensor of a {type(self.base).__name__} {list(own.shape)} is read, and not called with the "
                "rows of the batch, which have different ones. Leave this module out of the adapters, or give all rows "
                "of a batch one adapter (trimtab.set_adapter)"
            )

        return read_weight(numbers, (), of=(own.shape, own.dtype, own.device))

    def __getattr__(self, name: str) -> Any:
        """What this module lacks (``padding_idx``, ``kernel_size``, ...) is looked up on the frozen one."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # What this class defines and cannot give is not to be had from the frozen module under the same name, and
            # accelerate asks every module for its own hook. While this module is being copied, it has no frozen one yet
            # and is asked for names such as __deepcopy__.
            mine = hasattr(type(self), name) or name.startswith("__") or name in ("_hf_hook", "_old_forward")
            if mine or "base" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base, name)


class AdaptedLayer(Adapted):
    """A frozen layer with a weight, and its adapter.

    ``weight`` is the effective weight, in the layout of the frozen layer's own weight and with its gradient
    (``trimtab.ops.read_weight``). Code that reads a layer's weight and does not call the layer (fused attention, tied
    heads) therefore computes with the right one, and trains the adapter. Assigning a weight assigns the frozen one.
    Hooks on the frozen layer run, and see what the layer with its adapter is given and gives.
    """

    if TYPE_CHECKING:

        @property
        def handle(self) -> WeightBase: ...

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        base = self._modules["base"]
        assert base is not None
        if has_hooks(base) and not (self.acting_names() == [None] and self.handle.stored_dense):
            return call_with_hooks(base, self._compute, args, kwargs)  # (a bare dense layer calls itself)
        return self._compute(*args, **kwargs)

    def _compute(self, *args: Any, **kwargs: Any) -> Any:
        if (groups := self.row_groups()) is not None:
            return self._by_rows(groups, args, kwargs)
        (x,) = args or kwargs.values()
        if self.off:
            return self.handle.multiply(x)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            weight_of_own.tell_of_no_gradient(self)
        try:
            return self.current_adapter(x, self.handle)
        except (RuntimeError, NotImplementedError):
            weight_of_own.require_usable(self)
            raise

    @property
    def weight(self) -> Tensor:
        name, *others = self.acting_names()
        if others:
            return self._refused(self.handle.parameter)
        handle: Any = self.handle_of(name or self._worn)
        weight: Tensor = handle.as_stored(handle.weight()) if name is None else handle.read(self.adapter_of(name))
        return weight

    @property
    def bias(self) -> Tensor | None:
        return self._bias_on(self.base)

    def _bias_on(self, holder: nn.Module) -> Tensor | None:
        """The bias of the layer; of a weight that hangs on a module, that of ``holder``."""
        found: list[Tensor | None] = []
        for name in self.acting_names():
            handle: Any = self.handle_of(name or self._worn)
            handle = handle.on(holder) if isinstance(handle, HeldBase) else handle
            found.append(handle.bias if name is None else self.adapter_of(name).bias_of(handle))
        if any(bias is not found[0] for bias in found):
            assert found[0] is not None
            return self._refused(found[0])
        return found[0]

    def __setattr__(self, name: str, value: Any) -> None:
        # What the frozen layer has belongs to it: its weight and bias, and numbers such as out_features.
        if not name.startswith("_") and name not in _OWN and _has(self.__dict__.get("_modules", {}).get("base"), name):
            if name == "weight":
                weight_of_own.tell_of_twice(self, value)
            setattr(self.base, name, value)
        else:
            super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        weight_of_own.require_not_its_weight(self, name, param)
        super().register_parameter(name, param)


_OWN = ("base", "adapters_disabled", "training", "forward")


def _has(module: nn.Module | None, name: str) -> bool:
    return module is not None and any(
        name in held for held in (module.__dict__, module._parameters, module._buffers, module._modules)
    )


class AdaptedParameter(AdaptedLayer):
    """A frozen weight that hangs directly on a module, and its adapter.

    It is a child of that module, which stays what it is, except that its attribute shows the effective weight
    (`trimtab.surgery.holding`). Nothing calls it.
    """

    base: HeldWeight

    if TYPE_CHECKING:

        @property
        def handle(self) -> HeldBase: ...

    def read(self, holder: nn.Module) -> Tensor:
        """What the attribute of ``holder`` shows; it may be a copy that shares this child (DataParallel's replicas)."""
        name, *others = self.acting_names()
        if others:
            return self._refused(self.handle.on(holder).parameter)
        handle: Any = self.handle_of(name or self._worn)
        handle = handle.on(holder)
        if name is None:
            stored: Tensor = handle.as_stored(handle.weight())
            return stored
        shown: Tensor | None = handle.reading(self.adapter_of(name))
        return handle.read(self.adapter_of(name)) if shown is None else shown

    def read_bias(self, holder: nn.Module) -> Tensor | None:
        """The same for the bias that is trained beside the weight."""
        return self._bias_on(holder)

    def around_forward(self, holder: nn.Module) -> AbstractContextManager[object]:
        """The context in which the forward pass of ``holder`` runs."""
        name, *others = self.acting_names()
        if name is None or others:
            return nullcontext()
        handle: Any = self.handle_of(name)
        around: AbstractContextManager[object] = handle.on(holder).around_forward(self.adapter_of(name))
        return around


class AdaptedBlock(Adapted):
    """A frozen block with an adapter that changes the hidden state in its output.

    The change is made in a hook on the block. So other hooks, such as those that record hidden states, get the changed
    output; and PyTorch's fused encoder layer, which would bypass the block, is not used while the hook is there.
    """

    if TYPE_CHECKING:

        @property
        def handle(self) -> BlockBase: ...

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        groups = self.row_groups()
        return self.base(*args, **kwargs) if groups is None else self._by_rows(groups, args, kwargs)


class AdaptedModule(Adapted):
    """Any module, and an adapter that trains its own tensors.

    The module runs its own forward pass with the trained tensors, and they are what is read under their names. Any
    other attribute is looked up on the module.
    """

    if TYPE_CHECKING:

        @property
        def handle(self) -> ModuleBase: ...

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if (groups := self.row_groups()) is not None:
            return self._by_rows(groups, args, kwargs)
        if self.off:
            return self.base(*args, **kwargs)
        if "_hf_hook" in self.base.__dict__:
            bases.stay(self.base)  # accelerate would put the module's own tensors over the trained ones
        return self.current_adapter(self.handle, args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and any(_trains(self.adapter_of(one), name) for one in self._slots):
            raise weight_of_own.trained_already(self, name)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in self.__dict__.get("_modules", (name,)):
            acting = self.acting_names()
            trained = [one for one in acting if one is not None and _trains(self.adapter_of(one), name)]
            if trained and len(acting) > 1:
                return self._refused(getattr(self.base, name))
            if trained:
                return self.adapter_of(trained[0]).tensor(name, self.handle_of(trained[0]))
        return super().__getattr__(name)


def _trains(adapter: Any, name: str) -> bool:
    """Whether ``adapter`` has a trained tensor in the place of the module's own ``name``."""
    return hasattr(type(adapter), "tensor") and name in adapter


def bare(module: nn.Module) -> nn.Module:
    """``module`` itself, or the frozen module in it if it is adapted."""
    return module.base if isinstance(module, Adapted) else module


def block_lists(model: nn.Module) -> Iterator[nn.ModuleList]:
    """The lists of repeated blocks in ``model``: lists of modules of one class, outside of any other such list."""
    for module in model.children():
        if isinstance(module, nn.ModuleList) and len({own_class(bare(child)) for child in module}) == 1:
            yield module
        else:
            yield from block_lists(module)


def bare_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under the name that it would have without adapters and wrappers, once for each of its names; and
    every weight that hangs directly on one (``HeldWeight``), under the name of its parameter.

    An adapted module takes the place of the module that it adapts. What torch wraps around a module (for compilation,
    sharding, several devices) is not listed.
    """
    return _bare_modules(model, "", {})


def _bare_modules(
    model: nn.Module, name: str, held: dict[tuple[int, str], nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """``held`` keeps one stand-in for each weight that hangs on a module with several names."""
    model = unwrapped(model)
    yield name, model
    prefix, inside = f"{name}." if name else "", unwrapped(bare(model))
    children = {attribute: child for attribute, child in inside._modules.items() if child is not None}
    adapted = {child.base.attribute: child for child in children.values() if isinstance(child, AdaptedParameter)}
    for weight in bases.held_weights(inside):
        if weight.attribute not in adapted:
            yield prefix + weight.attribute, held.setdefault((id(inside), weight.attribute), weight)
    # Whatever kind of tensor such a weight is by now: one that was sharded is none that a base knows.
    yield from ((prefix + attribute, child) for attribute, child in adapted.items())
    for attribute, child in children.items():
        if not isinstance(child, AdaptedParameter):
            yield from _bare_modules(child, prefix + attribute, held)


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Every adapted module of ``model`` once, under its first name, in the model's order."""
    seen = set()
    for name, module in bare_modules(model):
        if isinstance(module, Adapted) and id(module) not in seen:
            seen.add(id(module))
            yield name, module


def carriers(model: nn.Module) -> Iterator[Adapted]:
    """Every adapted module of ``model`` once, in no order that is promised: quicker than ``adapted_modules``."""
    ahead: list[nn.Module | None] = [model]
    seen = set()
    while ahead:
        module = ahead.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        if isinstance(module, Adapted):
            yield module
            ahead.append(module._modules["base"])
        elif module._modules:
            ahead += module._modules.values()


def owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Every place where a module hangs, as (full name, parent, attribute, child). A shared child has several places."""
    for prefix, parent in model.named_modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                yield (f"{prefix}.{attribute}" if prefix else attribute), parent, attribute, child


def weights_elsewhere(model: nn.Module, parameter: nn.Parameter, inside: set[int]) -> bool:
    """Whether any module whose id is not in ``inside`` holds ``parameter``."""
    return any(
        held is parameter
        for module in model.modules()
        if id(module) not in inside
        for held in module._parameters.values()
    )


def require_adapted(model: nn.Module, verb: str) -> list[tuple[str, Adapted]]:
    """Every adapted module of ``model``, which may be wrapped, with its name.

    Raises SurgeryError if there is none, or if ``model`` itself is one, which cannot be replaced in place.
    """
    if isinstance(model, Adapted):
        raise SurgeryError(f"{verb}: this is one adapted layer; give the model that holds it")
    adapted = list(adapted_modules(model))
    if not adapted:
        raise SurgeryError(
            f"{verb}: the model has no adapters; attach some first (trimtab.attach or trimtab.load_adapter)"
        )
    return adapted
