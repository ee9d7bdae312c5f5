"""What carries adapters: a frozen module, the adapters that it has under several names, and which of them is active."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

from torch import nn

from trimtab import bases
from trimtab.bases import Base
from trimtab.errors import SurgeryError
from trimtab.methods import Method
from trimtab.surgery.mixing import mixed_block
from trimtab.surgery.row_plan import Group, RowPlan


class Slot(NamedTuple):
    """What an adapted module has under the name of one adapter."""

    handle: Base
    method: str
    rule: int
    place: str
    """The child that holds the trained tensors."""
    order: int
    """Of the adapter among those of the model, by when they came."""


DEFAULT = "default"
"""The name of an adapter that is given none."""


def place_of(name: str) -> str:
    """The child of an adapted module that holds the tensors of the adapter ``name``."""
    return "adapter" if name == DEFAULT else f"adapter_{quote(name, safe='').replace('.', '%2E')}"


def is_of_peft(module: nn.Module) -> bool:
    """Whether ``module`` is one of PEFT's layers, which have adapters of their own."""
    return bases.is_instance_by_name(module, "peft.tuners.tuners_utils", "BaseTunerLayer")


class Carrier(nn.Module):
    """A frozen module ``base``, and beside it the adapters that it has under several names. At most one is active, and
    what kind of adapted module this is follows from it. Attributes that it lacks are looked up on the module."""

    adapter: Method
    """The tensors of the adapter that is called ``default``; of what ``entry_of`` gives, those of its only one."""
    _rows: RowPlan | None = None  # which rows go through which adapter, inside of ``per_row``
    adapters_disabled = False
    """Whether the module does for a while what it did without adapters (``trimtab.disable_adapter``)."""

    def __init__(self, name: str, slot: Slot, adapter: Method) -> None:
        super().__init__()
        self.base = slot.handle.module
        self.training = self.base.training  # the modules inside a block may be in another mode
        self._slots: Mapping[str, Slot] = {}
        self._active: str | None = None
        self._worn = name  # the slot that says what kind of module this is: the active one, if there is one
        self._resting: dict[str | None, list[str]] = {}  # what an adapter that is not active trains when it is
        self._hook: Any = None
        self.put_adapter(name, slot, adapter)
        self.switch_adapter(name)

    def __getstate__(self) -> dict[str, Any]:
        # What disable_adapter or per_row does to this module ends with their context, and would never end for a copy.
        return {name: one for name, one in self.__dict__.items() if name not in ("_rows", "adapters_disabled")}

    @staticmethod
    def kind_for(handle: Base) -> type[Carrier]:
        """The kind of module that an adapter on the module of ``handle`` asks for."""
        raise NotImplementedError

    def put_adapter(self, name: str, slot: Slot, adapter: Method) -> None:
        """Give the module an adapter under one more name. It is not active yet."""
        self._modules[slot.place] = adapter
        self._slots = {**self._slots, name: slot}

    def put_hook(self) -> None:
        """Put the hook of an adapter on a block onto the frozen module, if there is one."""
        if self._hook is None and any(slot.handle.kind == "block" for slot in self._slots.values()):
            self._hook = self.base.register_forward_hook(self._change, with_kwargs=True)

    def drop_adapter(self, name: str) -> None:
        """Remove the adapter ``name``, which is not the only one."""
        del self._modules[self._slots[name].place]
        self._slots = {other: slot for other, slot in self._slots.items() if other != name}
        self._resting.pop(name, None)
        self._worn = next(iter(self._slots))
        if self._hook is not None and not any(slot.handle.kind == "block" for slot in self._slots.values()):
            self._hook.remove()
            self._hook = None
        self.switch_adapter(None if self._active == name else self._active)

    def switch_adapter(self, name: str | None) -> None:
        """Make the adapter ``name`` the active one, whether or not this module is among those that it has. What it
        trains is trained from then on, and no other."""
        own = self.__dict__  # nn.Module's way of setting an attribute would take most of the time of a switch
        slots: Mapping[str | None, Slot] = own["_slots"]
        before = own["_active"]
        if before != name:
            if (slot := slots.get(before)) is not None:
                tensors = self._adapter(slot)._parameters
                own["_resting"][before] = [key for key, one in tensors.items() if one is not None and one.requires_grad]
                for key in own["_resting"][before]:
                    tensors[key].requires_grad = False  # type: ignore[union-attr]
                own["_shared"] = self._adapter(slot).rest()
            own["_active"] = name
            if (slot := slots.get(name)) is not None:
                tensors = self._adapter(slot)._parameters
                for key in own["_resting"].pop(name, ()):
                    tensors[key].requires_grad = True  # type: ignore[union-attr]
                self._adapter(slot).resume(own.pop("_shared", None))
        own["_worn"] = name if name in slots else next(iter(slots))
        if not isinstance(self, kind := self.kind_for(slots[own["_worn"]].handle)):
            self.__class__ = kind

    @property
    def off(self) -> bool:
        """Whether the module does what it did without adapters."""
        return self.adapters_disabled or self._worn != self._active

    @property
    def active_name(self) -> str | None:
        """The name of the model's active adapter, which need not have this module."""
        return self._active

    @property
    def adapter_slots(self) -> Mapping[str, Slot]:
        """What the module has under each name."""
        return self._slots

    def _adapter(self, slot: Slot) -> Method:
        return self.__dict__["_modules"][slot.place]  # type: ignore[no-any-return]

    def adapter_of(self, name: str) -> Any:
        """The tensors of the adapter ``name`` on this module."""
        return self._adapter(self._slots[name])

    def acting_names(self) -> list[str | None]:
        """The adapters by which the module computes for the batch at hand, each once; None for no adapter."""
        groups = self.row_groups()
        return [None if self.off else self._active] if groups is None else [group.name for group in groups]

    @property
    def current_adapter(self) -> Any:
        """The active adapter's tensors on this module; those of another one where it has none here."""
        return self._modules[self._slots[self._worn].place]

    def every_entry(self) -> list[Any]:
        """``entry_of`` each name, in order."""
        return [self.entry_of(name) for name in self._slots]

    def every_adapter(self) -> list[Method]:
        """The tensors of all adapters on this module, in order."""
        return [self._adapter(slot) for slot in self._slots.values()]

    @property
    def method(self) -> str:
        return self._slots[self._worn].method

    @property
    def rule(self) -> int:
        return self._slots[self._worn].rule

    def renumber_rule(self, name: str, rule: int) -> None:
        """Note another number of the rule by which the adapter ``name`` came onto this module."""
        self._slots = {**self._slots, name: self._slots[name]._replace(rule=rule)}

    def entry_of(self, name: str) -> Any:
        """This module as it would be with the adapter ``name`` alone, as its ``adapter``; it hangs nowhere."""
        slot = self._slots[name]
        alone = slot._replace(handle=self.handle_of(name), place=place_of(DEFAULT))
        return self.kind_for(alone.handle)(DEFAULT, alone, self._adapter(slot))

    @property
    def handle(self) -> Base:
        """The handle of the active adapter, or of another one where it has none here."""
        return self.handle_of(self._worn)

    def handle_of(self, name: str) -> Base:
        """The handle on the module that is under the adapter ``name`` now. In a replica of ``nn.DataParallel`` that is
        another one than this was made for. Raises SurgeryError if no base knows it."""
        slot = self._slots[name]
        handle, adapter = slot.handle, self._modules[slot.place]
        if handle.module is not self._modules["base"]:
            handle = self._handle_anew(name, slot)
        if adapter.unset:  # type: ignore[union-attr]
            adapter.settle(handle)  # type: ignore[union-attr,operator]
        return handle

    def _handle_anew(self, name: str, slot: Slot) -> Base:
        base, kind = self._modules["base"], type(slot.handle)
        assert base is not None
        handle = kind(base) if type(base) is type(slot.handle.module) else bases.find(base, slot.handle.kind)
        if handle is None:
            if is_of_peft(base):
                raise SurgeryError(
                    f"PEFT put one of its layers under an adapter of method {slot.method}, and froze that adapter "
                    "(get_peft_model, or peft_config=... of a trainer). The model has adapters to train already: "
                    "leave PEFT's out; or trimtab.merge(model) first, and let PEFT adapt the result"
                )
            raise SurgeryError(
                f"the module under an adapter of method {slot.method} was replaced by a {type(base).__name__}, which "
                "no base knows; put back one of a kind that the adapter can sit on"
            )
        self._slots = {**self._slots, name: slot._replace(handle=handle)}
        return handle

    def remove(self) -> nn.Module:
        """The frozen module, after removing whatever the adapters put onto it."""
        if self._hook is not None:
            self._hook.remove()
        return self.base

    def row_groups(self) -> list[Group] | None:
        """The rows of the batch by adapter, inside of ``per_row``; else None."""
        return None if self._rows is None or self.adapters_disabled else self._rows.groups(self._slots)

    def _change(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """What a block with an adapter gives: its own ``output``, changed."""
        names = self.acting_names()
        on_blocks = [name for name in names if name is not None and self._slots[name].handle.kind == "block"]
        if not on_blocks:
            return output
        handle: Any = self.handle_of(on_blocks[0])
        x = handle.input(args, kwargs)
        if len(names) == 1:
            return handle.changed(output, lambda hidden: self.adapter_of(on_blocks[0])(x, hidden))
        plan, groups, adapters = self._rows, self.row_groups(), {name: self.adapter_of(name) for name in on_blocks}
        return handle.changed(output, lambda hidden: mixed_block(plan, groups, adapters, x, hidden))  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        named = (
            f"{'' if name == DEFAULT else f'{name}: '}method={one.method}, rule={one.rule}"
            for name, one in self._slots.items()
        )
        return "; ".join(named)
