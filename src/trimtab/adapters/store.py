"""Saves and loads the adapters of a model, in the first format that can express them."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from trimtab import bases
from trimtab.adapters.fitting import fitted_to
from trimtab.adapters.formats import all_formats
from trimtab.adapters.placing import local_folder, read_as, replacing
from trimtab.adapters.record import StoredAdapter
from trimtab.adapters.safe_read import shown
from trimtab.adapters.unfrozen import Unfrozen, statistics, unfrozen
from trimtab.adapters.whole import written_by_one
from trimtab.bases import WeightBase
from trimtab.errors import AdapterError, PlanError, TrimtabWarning, machine_refusal
from trimtab.ops.spread import alone, write
from trimtab.surgery.adapted import Adapted, bare_modules, require_adapted
from trimtab.surgery.attach_report import AttachReport, describe
from trimtab.surgery.carrier import DEFAULT
from trimtab.surgery.install import install, remove_adapter, switch
from trimtab.surgery.names import (
    active_adapter,
    adapters,
    entries,
    entries_by_every_name,
    known_adapter,
    require_new_name,
    seen_by,
    set_adapter,
)
from trimtab.surgery.plan import Rule, Target
from trimtab.surgery.sharded import put_away, require_open, require_same_mesh, whole_tensors
from trimtab.surgery.wrappers import unwrapped


class OthersThereError(AdapterError):
    """The model carries other adapters than the stored ones under their name; ``how`` says in words how they differ."""

    def __init__(self, place: Path, how: str) -> None:
        self.how = how
        super().__init__(
            f"{place}: the model already carries other adapters under this name ({how}); give another name, or call "
            "trimtab.merge(model) or trimtab.detach(model) first"
        )


def save_adapter(
    model: nn.Module, folder: Path | str, name: str | None = None, *, state_dict: Mapping[str, Tensor] | None = None
) -> Path:
    """Write the adapter ``name`` of ``model`` (None: the active one) into ``folder``, which is made if there is none,
    and return it. The name itself is not written: whoever loads the folder gives it one.

    LoRA and DoRA are written as PEFT writes them (``adapter_config.json``, ``adapter_model.safetensors``), provided
    that one PEFT configuration can describe all of them and that PEFT computes the same from it. Everything else (MoRA,
    full, a mix of methods, the magnitude alone or over the input axis, a layer that hangs in two places, a magnitude
    over rows of zeros) is written as ``trimtab.json`` and ``trimtab_adapter.safetensors``, which PEFT does not mistake
    for an adapter of its own. Files of another format from an earlier save are removed.

    The old files stay until the new ones are complete, so a save that fails before that keeps the old adapter. A save
    that is killed while files are moved is finished by the next ``load_adapter`` or ``save_adapter``; until then the
    folder is without a configuration, so that PEFT does not take it for an adapter.

    What is trained outside of the adapters, because it was unfrozen by hand after ``attach`` (a head, a norm, a bias),
    is written with them, and so are the statistics of batch norms that have counted since. ``load_adapter`` reads it as
    an adapter of method full.

    Tensors that are sharded over several processes are gathered, for which all of them must call this (the first one
    writes, and all come back when it has); or they are taken from ``state_dict``, the model's own with whole tensors,
    where the caller has gathered it.

    Raises:
        SurgeryError: the model has no adapters, or none of that name; or no name is given and none is active.
        AdapterError: the folder cannot be written, or a tensor is trained itself that no adapter's folder can hold.
    """
    model = unwrapped(model)
    require_adapted(model, "save_adapter")
    name = known_adapter(model, name, "save_adapter")
    adapted = entries(model, name)
    for module in adapted.values():
        module.adapter.settle(module.handle)
        if any(tensor.is_meta for tensor in module.adapter.stored_tensors().values()):
            raise AdapterError(
                f"{folder}: the adapter is on the meta device, without numbers that could be saved. Load the model's "
                "weights and the adapter first"
            )
    target = Path(folder)
    put_away(model)
    with written_by_one(model, given=state_dict is not None) as writes, whole_tensors(model, state_dict, kept=writes):
        if not writes:
            return target
        try:
            with replacing(target) as fresh, alone():
                adapted |= {place: one.entry for place, one in unfrozen(model, name).items()}
                writer = next(one for one in all_formats() if one.can_express(model, adapted))
                writer.save(model, adapted, fresh)
        except (OSError, SafetensorError) as error:
            refusal = machine_refusal(error, target) or f"{target}: {error}"
            raise AdapterError(f"the adapter cannot be saved here: {refusal}") from error
    return target


def load_adapter(model: nn.Module, folder: Path | str, name: str = DEFAULT) -> AttachReport:
    """Attach the adapter stored in ``folder``, ours or PEFT's own, to ``model`` in place, under ``name``, and make it
    the active one. The name of a folder that is not there is taken for a hub id, ``OWNER/NAME``.

    If ``model`` has an adapter ``name`` already, it takes over the stored values, and so do tensors that were unfrozen
    by hand. It must sit on the same modules, and compute the same from the same tensors. Adapters of other names stay
    beside it. On a model without memory (the meta device) there is room for the shapes alone, and a warning says so.

    Raises AdapterError if there is no adapter, or one that is damaged, not supported, or made for another model, and
    SurgeryError as ``attach`` does. The model is then unchanged.
    """
    place = local_folder(folder)
    outer, model = model, unwrapped(model)
    before = active_adapter(model)
    put_away(model)
    if name not in adapters(model):
        require_new_name(model, name, "load_adapter")
    form, stored = read_as(place)
    known = dict(seen_by(model, name))
    stored = fitted_to(model, known, place, stored)
    if left_out := form.left_out(place, known, stored):
        more = f" and {len(left_out) - 1} more" if left_out[1:] else ""
        warnings.warn(
            f"{place}: nothing is stored of {left_out[0]}{more}, which its description names. They stay as they are",
            TrimtabWarning,
            stacklevel=2,
        )
    rules, number = _rules(stored)
    if carried := entries(model, name):
        with whole_tensors(model):
            by_hand = statistics(model, name, stored) | unfrozen(model, name)
        _check_same(place, carried | {key: one.entry for key, one in by_hand.items() if one.trained}, stored, by_hand)
        _fill(model, name, place, stored, by_hand)
        for module_name, module in bare_modules(model):
            if isinstance(module, Adapted) and name in module.adapter_slots:
                module.renumber_rule(name, number[module_name])
        if name != before:
            set_adapter(model, name)
    else:
        require_open(outer, str(place), "Load the adapter", AdapterError)
        require_same_mesh(model, "load_adapter")
        try:
            install(model, _targets(place, known, stored, rules, number), name)
        except PlanError as error:
            raise AdapterError(f"{place}: this adapter does not fit the model: {error}") from None
        try:
            _fill(model, name, place, stored, {})
        except BaseException:
            remove_adapter(model, name)
            switch(model, before)
            raise
    return describe(model, rules, name)


def _fill(
    model: nn.Module, adapter: str, place: Path, stored: dict[str, StoredAdapter], by_hand: dict[str, Unfrozen]
) -> None:
    """Copy ``stored`` into the ``adapter`` of ``model``, and into what is trained or counted beside it."""
    present = entries_by_every_name(model, adapter)
    seen = present | {name: one.entry for name, one in by_hand.items()}
    stored = {name: entry.on(seen[name].handle) for name, entry in stored.items()}
    _check_tensors(place, seen, stored)
    with torch.no_grad():
        for name, entry in stored.items():
            if name in by_hand:
                by_hand[name].load(entry.tensors)
                continue
            present[name].adapter.forget()
            for key, tensor in present[name].adapter.stored_tensors().items():
                write(tensor, entry.tensors[key])
    if nowhere := [name for name in stored if any(one.is_meta for one in seen[name].adapter.stored_tensors().values())]:
        warnings.warn(
            f"load_adapter: {len(nowhere)} modules of the model, such as {nowhere[0]}, are on the meta device, without "
            f"memory, so that they have the shapes of {place} and not its numbers. Load it again once the model has "
            "its weights",
            TrimtabWarning,
            stacklevel=3,
        )


def _rules(stored: dict[str, StoredAdapter]) -> tuple[tuple[Rule, ...], dict[str, int]]:
    """One rule for each method with its options, and the number of each module's rule."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, entry in stored.items():
        groups[entry.method, entry.options.model_dump_json()].append(name)
    rules, number = [], {}
    for count, ((method, _), names) in enumerate(groups.items(), 1):
        rules.append(Rule(match=names, method=method, **stored[names[0]].options.said()))
        number.update(dict.fromkeys(names, count))
    return tuple(rules), number


def _targets(
    place: Path,
    known: dict[str, nn.Module],
    stored: dict[str, StoredAdapter],
    rules: tuple[Rule, ...],
    number: dict[str, int],
) -> list[Target]:
    """The stored modules as targets. Their names are not matched as globs, since they may contain any character.

    Raises AdapterError if some module is of a kind that cannot be adapted, and PlanError if an adapter cannot be one of
    its layer.
    """
    names: dict[int, list[str]] = defaultdict(list)
    for name, module in known.items():
        names[id(module)].append(name)
    targets = []
    unknown = []
    for name, entry in stored.items():
        module, rule = known[name], rules[number[name] - 1]
        handle = bases.find(module, rule.sits_on)
        if handle is None:
            unknown.append((name, rule))
            continue
        try:
            entry.require_fit(handle)
        except PlanError as error:
            raise PlanError(f"{name}: {error}") from None
        targets.append(
            Target(
                tuple(names[id(module)]),
                module,
                handle,
                rule=number[name],
                method=entry.method,
                adapter_class=rule.method_class.class_for(handle),
                options=entry.options,
                apart=entry.apart,
            )
        )
    if unknown:
        name, rule = unknown[0]
        what, kinds = "of a kind that no base knows", f" Known kinds: {', '.join(bases.names('weight'))}."
        if rule.sits_on == "block":
            what, kinds = "no blocks in this model", ""
        raise AdapterError(
            f"{place}: {len(unknown)} of the adapter's modules are {what}, such as {name}, a "
            f"{bases.named(known[name])}.{kinds} The model is unchanged"
        )
    return _with_their_own(targets, stored)


def _with_their_own(targets: list[Target], stored: dict[str, StoredAdapter]) -> list[Target]:
    """``targets``, one for each of ``stored``; those that share a weight have each an adapter of its own if they were
    stored with different ones, as PEFT trains them."""
    first: dict[int, StoredAdapter] = {}
    differ = set()
    for target, entry in zip(targets, stored.values(), strict=True):
        if isinstance(target.base, WeightBase) and not target.adapter_class.trains_base:
            mine, key = entry.on(target.base), id(target.base.identity)
            twin = first.setdefault(key, mine)
            if mine.tensors.keys() != twin.tensors.keys() or not all(
                mine.shares(one, twin, one) for one in twin.tensors
            ):
                differ.add(key)
    return [replace(target, apart=True) if id(target.base.identity) in differ else target for target in targets]


def _check_same(
    place: Path, present: dict[str, Adapted], stored: dict[str, StoredAdapter], by_hand: dict[str, Unfrozen]
) -> None:
    """Raise OthersThereError unless the model's adapters sit on the stored modules and have the stored options. Among
    ``by_hand`` may be statistics that only one of the two has counted."""
    wrong = sorted((set(present) - set(stored)) | (set(stored) - set(present) - set(by_hand))) or [
        name for name, module in present.items() if module.adapter.options.computes() != stored[name].options.computes()
    ]
    if wrong:
        raise OthersThereError(place, f"they differ at {len(wrong)} modules, such as {shown(wrong[0])}")


def _check_tensors(place: Path, present: dict[str, Adapted], stored: dict[str, StoredAdapter]) -> None:
    """Raise AdapterError unless exactly the trained tensors are stored, in their shapes and for these weights."""
    problems = []
    first: dict[int, tuple[str, str]] = {}
    for name, entry in stored.items():
        expected = {key: _described(value) for key, value in present[name].adapter.stored_tensors().items()}
        got = {key: _described(value) for key, value in entry.tensors.items()}
        for key in sorted(expected.keys() | got.keys()):
            if expected.get(key) != got.get(key):
                problems.append(
                    f"{name}.{shown(key)}: expected {expected.get(key, 'nothing')}, got {got.get(key, 'nothing')}"
                )
        # Trained tensors may also fit a weight of another shape; a small square matrix, for instance, fits many.
        adapter, handle = present[name].adapter, present[name].handle
        shape = (adapter.out_features, adapter.in_features)
        if entry.shape is not None and entry.shape != shape:
            problems.append(f"{name}: made for a {handle.kind} of {list(entry.shape)}, the model's is {list(shape)}")
        if not entry.was_made_for(handle):
            problems.append(f"{name}: trained on another weight than the model's")
        # Modules that share a weight share its trained tensors, too.
        for key, tensor in adapter.stored_tensors().items():
            twin, other = first.setdefault(id(tensor), (name, key))
            if twin != name and not entry.shares(key, stored[twin], other):
                problems.append(f"{name}: shares its weight with {twin}, and the two have different adapters")
                break
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise AdapterError(
            f"{place}: this adapter was made for another model: {'; '.join(problems[:3])}{more}. The model is unchanged"
        )


def _described(tensor: Tensor) -> str:
    """The shape of ``tensor``, and its dtype where that is none of the usual ones."""
    return f"{list(tensor.shape)}{'' if tensor.is_floating_point() else f' of {tensor.dtype}'}"
