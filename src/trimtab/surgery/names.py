"""Several adapters on one model, each under its name: which there are, which is active, and how one is removed."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from trimtab.errors import SurgeryError, did_you_mean
from trimtab.surgery.adapted import Adapted, adapted_modules, bare_modules, carriers, require_adapted
from trimtab.surgery.install import remove_adapter
from trimtab.surgery.wrappers import synchronised_by, unwrapped, without_wrappers


def adapters(model: nn.Module) -> list[str]:
    """The names of the adapters that ``model`` carries, in the order in which they came; empty if there are none."""
    order = {name: slot.order for module in carriers(model) for name, slot in module.adapter_slots.items()}
    return sorted(order, key=order.__getitem__)


def active_adapter(model: nn.Module) -> str | None:
    """The name of the adapter that ``model`` computes and trains with. None where it has none, or none is active.

    Inside ``disable_adapter`` and ``per_row`` it is the one that is active again afterwards. Raises SurgeryError if
    parts of the model were switched apart.
    """
    names = {module.active_name: None for module in carriers(model)}
    if len(names) > 1:
        said = ", ".join("none" if name is None else f"'{name}'" for name in names)
        raise SurgeryError(
            f"active_adapter: parts of this model have different active adapters ({said}). Ask one part, or call "
            "trimtab.set_adapter on the whole model"
        )
    return next(iter(names), None)


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make the adapter ``name`` the one that ``model`` computes with; None: the bare model, with no adapter.

    It is the one that is trained from then on: its tensors ask for gradients as they did when it was last active, and
    those of the others ask for none. Nothing is copied or moved. A module that this adapter does not have does what it
    did without adapters.

    Raises SurgeryError if the model carries no adapter of that name; or, in several processes, if what keeps them alike
    has taken the model already, and knows only the tensors that were trained then.
    """
    carrying = list(carriers(model))
    if not carrying or not (name is None or any(name in module.adapter_slots for module in carrying)):
        known_adapter(model, name, "set_adapter")
    if (wrapper := synchronised_by(model)) is not None and name != active_adapter(model):
        raise SurgeryError(
            f"set_adapter: {wrapper} has taken the model already, and keeps only those tensors alike in all processes "
            f"that were trained then. Switch before it is called; or, to compute without training, switch the model "
            "inside of it (model.module), and switch back"
        )
    for module in carrying:
        module.switch_adapter(name)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove the adapter ``name`` from ``model``, and leave the others as they are.

    If it was the active one, no adapter is active any more: the model is the bare one until ``set_adapter`` names
    another. If it was the last one, the model is what ``trimtab.detach`` leaves. Raises SurgeryError if the model
    carries no adapter of that name.
    """
    model = unwrapped(model)
    require_adapted(model, "delete_adapter")
    known_adapter(model, name, "delete_adapter")
    remove_adapter(model, name)


def known_adapter(model: nn.Module, name: str | None, verb: str) -> str:
    """``name``, or the active adapter's if it is None. Raises SurgeryError if ``model`` carries none of that name, or
    none is active."""
    present = adapters(model)
    if not present:
        raise SurgeryError(
            f"{verb}: the model has no adapters; attach some first (trimtab.attach or trimtab.load_adapter)"
        )
    said = ", ".join(f"'{one}'" for one in present)
    if name is None:
        if (name := active_adapter(model)) is None:
            raise SurgeryError(
                f"{verb}: no adapter is active; the model carries {said}. Name one, or call trimtab.set_adapter first"
            )
        return name
    if name not in present:
        raise SurgeryError(
            f"{verb}: the model carries no adapter '{name}', but {said}.{did_you_mean(str(name), present)}"
        )
    return name


def require_new_name(model: nn.Module, name: object, verb: str) -> None:
    """Raise SurgeryError unless ``name`` can be that of one more adapter of ``model``."""
    if not isinstance(name, str) or not name or name != name.strip() or not name.isprintable():
        raise SurgeryError(
            f"{verb}: expected the name of an adapter, some printable characters without a space at either end, got "
            f"{name!r}"
        )
    if name in adapters(model):
        having = [place for place, module in adapted_modules(model) if name in module.adapter_slots]
        raise SurgeryError(
            f"{verb}: the model already has adapters on {len(having)} modules, such as "
            f"{having[0] or 'the model itself'}, under the name '{name}'. Give another name; or call "
            f"trimtab.delete_adapter(model, {name!r}), trimtab.merge(model) or trimtab.detach(model) first"
        )
    if adapters(model) and (trained := trained_beside(model)):
        raise SurgeryError(
            f"{verb}: {len(trained)} tensors outside of the adapters are trained themselves, such as {trained[0]}: "
            "with one more adapter they would be frozen, and have one value for all. Train them by a rule of method "
            "full, so that each adapter has its own; or save what there is, and freeze them (requires_grad_(False))"
        )


def trained_beside(model: nn.Module) -> list[str]:
    """The names of the tensors of ``model`` that are trained and belong to no adapter: unfrozen by hand."""
    own = {id(one) for module in carriers(model) for adapter in module.every_adapter() for one in adapter.parameters()}
    return [
        without_wrappers(model, name)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in own
    ]


def entries(model: nn.Module, name: str) -> dict[str, Adapted]:
    """Every module that the adapter ``name`` has, by its first name, in the model's order, as if the module had this
    adapter alone."""
    return {place: module.entry_of(name) for place, module in adapted_modules(model) if name in module.adapter_slots}


def entries_by_every_name(model: nn.Module, name: str) -> dict[str, Adapted]:
    """``entries`` under all names of the modules; one of several names is one entry."""
    return {place: module for place, module in seen_by(model, name) if isinstance(module, Adapted)}


def seen_by(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """``bare_modules`` as they are for the adapter ``name``: adapted where it is, and frozen elsewhere."""
    made: dict[int, nn.Module] = {}
    for place, module in bare_modules(model):
        if isinstance(module, Adapted) and id(module) not in made:
            made[id(module)] = module.entry_of(name) if name in module.adapter_slots else module.base
        yield place, made.get(id(module), module)
