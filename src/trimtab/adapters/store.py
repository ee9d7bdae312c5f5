"""Save and load the adapter of a model: PEFT's layout wherever PEFT can express it, our own file otherwise."""

from __future__ import annotations

import tempfile
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from trimtab import bases, methods
from trimtab.adapters import native, peft
from trimtab.adapters.record import Stored, name_on_disk
from trimtab.adapters.safe_read import shown
from trimtab.errors import AdapterError, PlanError, nearest
from trimtab.surgery.adapted import Adapted, adapted_modules, bare_modules
from trimtab.surgery.attach import AttachReport, describe, install, remove_adapters, require_adapted
from trimtab.surgery.plan import Rule, Target

# Two saves into one folder, from threads of one process, come one after the other.
_SAVING = threading.Lock()
# Options that change how training goes on from here, and not what the adapter computes. Alpha and rank_stabilised are
# compared as the scale that they make.
_TRAINING_ONLY = {
    "dropout", "detach_norm", "dtype", "keep_product", "init", "init_std", "alpha", "rank_stabilised"
}  # fmt: skip


def save_adapter(model: nn.Module, folder: Path | str) -> Path:
    """Write the adapters of ``model`` into ``folder`` (made if need be) and return it.

    LoRA and DoRA are written as PEFT writes them (``adapter_config.json``, ``adapter_model.safetensors``), if one
    PEFT configuration can say it all and PEFT computes the same from it. Anything else (MoRA, full, a mix of methods,
    the magnitude alone or over the input axis, a layer that hangs in two places, a magnitude over rows of zeros) is
    written as ``trimtab.json`` and ``trimtab_adapter.safetensors``, which PEFT does not take for an adapter of its
    own. Files of the other layout that an earlier save left in the folder are removed.

    The new files are complete before the old ones are touched; a save that fails before that leaves the old adapter
    as it was. One that is cut off while they are moved leaves a folder without a configuration, which neither
    ``load_adapter`` nor PEFT takes for an adapter.

    Raises:
        SurgeryError: the model has no adapters.
        AdapterError: the folder cannot be written.
    """
    adapted = {name_on_disk(name): module for name, module in require_adapted(model, "save_adapter")}
    target = Path(folder)
    writer, other = (peft, native) if peft.can_express(model, adapted) else (native, peft)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with _SAVING, tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as fresh:
            writer.save(model, adapted, Path(fresh))
            # A configuration never stands beside the tensors of another save: it goes first and comes last.
            for configuration, _ in (writer.FILES, other.FILES):
                (target / configuration).unlink(missing_ok=True)
            for name in reversed(writer.FILES):
                (Path(fresh) / name).replace(target / name)
            (target / other.FILES[1]).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{target}: the adapter cannot be saved here ({error})") from error
    return target


def load_adapter(model: nn.Module, folder: Path | str) -> AttachReport:
    """Attach the adapter stored in ``folder``, ours or PEFT's own, to ``model`` in place.

    A model that already carries adapters on the same modules, which compute the same from the same tensors, takes the
    stored values; any other adapters are an error.

    Raises:
        AdapterError: no adapter there, a damaged or unsupported one, or one that was made for another model. The
            model is then unchanged.
    """
    place = Path(folder)
    stored = read_adapter(place)
    known = _modules(model)
    carried = bool(dict(adapted_modules(model)))
    if carried:
        _check_same(place, model, stored)
    else:
        _check_modules(place, known, stored)
    rules, number = _rules(stored)
    if not carried:
        try:
            install(model, _targets(known, stored, number), rules)
        except PlanError as error:
            raise AdapterError(f"{place}: this adapter does not fit the model: {error}") from None
    try:
        present = {name: module for name, module in _modules(model).items() if isinstance(module, Adapted)}
        _check_tensors(place, present, stored)
        with torch.no_grad():
            for name, entry in stored.items():
                present[name].rule = number[name]
                for key, parameter in present[name].adapter.named_parameters():
                    parameter.copy_(entry.tensors[key])
    except BaseException:
        if not carried:
            remove_adapters(model)
        raise
    return describe(model, rules)


def read_adapter(folder: Path | str) -> dict[str, Stored]:
    """What the adapter in ``folder``, ours or PEFT's own, holds of each module.

    Raises:
        AdapterError: no adapter there, or a damaged, unsupported or empty one.
    """
    place = Path(folder)
    stored: dict[str, Stored] = _reader(place).load(place)
    if not stored:
        raise AdapterError(f"{place}: the adapter is empty")
    return stored


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module under each of its names, as they are on disk."""
    return {name_on_disk(name): module for name, module in bare_modules(model)}


def _find(module: nn.Module, entry: Stored) -> bases.Base | None:
    """A handle on ``module`` of the kind that the stored method sits on."""
    return bases.find(module, methods.method_class(entry.method).sits_on)


def _reader(place: Path) -> Any:
    """The module that reads the layout of the adapter in ``place``."""
    try:
        if not place.is_dir():
            what = "a file" if place.exists() else "no such folder"
            raise AdapterError(f"{place}: {what}; expected a folder with {peft.FILES[0]} or {native.FILES[0]}")
        readers = [reader for reader in (native, peft) if (place / reader.FILES[0]).is_file()]
    except OSError as error:
        raise AdapterError(f"{place}: cannot be looked into ({error})") from None
    if len(readers) > 1:
        raise AdapterError(
            f"{place}: two adapters in one folder ({native.FILES[0]} and {peft.FILES[0]}); remove the files of one"
        )
    if not readers:
        left = [reader.FILES[1] for reader in (native, peft) if (place / reader.FILES[1]).is_file()]
        hint = f". There is {left[0]} without its configuration: a save that was cut off" if left else ""
        raise AdapterError(f"{place}: no adapter here; expected {peft.FILES[0]} (PEFT) or {native.FILES[0]}{hint}")
    return readers[0]


def _rules(stored: dict[str, Stored]) -> tuple[tuple[Rule, ...], dict[str, int]]:
    """One rule for all modules of one method and options, and the number of each module's rule."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, entry in stored.items():
        groups[entry.method, entry.options.model_dump_json()].append(name)
    rules, number = [], {}
    for count, ((method, _), names) in enumerate(groups.items(), 1):
        said: dict[str, Any] = stored[names[0]].options.model_dump(exclude_unset=True)
        rules.append(Rule(match=names, method=method, **said))
        number.update(dict.fromkeys(names, count))
    return tuple(rules), number


def _targets(known: dict[str, nn.Module], stored: dict[str, Stored], number: dict[str, int]) -> list[Target]:
    """Exactly the stored modules. Their names are not matched as globs: a name may hold any sign."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, module in known.items():
        names[id(module)].append(name)
    targets = []
    for name, entry in stored.items():
        handle = _find(known[name], entry)
        assert handle is not None
        targets.append(
            Target(tuple(names[id(known[name])]), known[name], handle, number[name], entry.method, entry.options)
        )
    return targets


def _check_modules(place: Path, known: dict[str, nn.Module], stored: dict[str, Stored]) -> None:
    """Raise AdapterError if some stored module is not in the model, or of a kind that cannot be adapted."""
    missing = [name for name in stored if name not in known or not name]
    if missing:
        near = nearest(missing[0], known)
        hint = f" The model has, for instance, {', '.join(near)}." if near else ""
        raise AdapterError(
            f"{place}: this adapter was made for another model: {len(missing)} of its {len(stored)} modules are "
            f"not in this one, such as {shown(missing[0])}.{hint} The model is unchanged"
        )
    unknown = [name for name, entry in stored.items() if _find(known[name], entry) is None]
    if unknown:
        block = methods.method_class(stored[unknown[0]].method).sits_on == "block"
        what = "no blocks in this model" if block else "of a kind that no base knows"
        kinds = "" if block else f" Known kinds: {', '.join(bases.names('weight'))}."
        raise AdapterError(
            f"{place}: {len(unknown)} of the adapter's modules are {what}, such as {unknown[0]}, a "
            f"{type(known[unknown[0]]).__name__}.{kinds} The model is unchanged"
        )


def _check_same(place: Path, model: nn.Module, stored: dict[str, Stored]) -> None:
    """Raise AdapterError unless the model carries adapters on the stored modules that compute the same."""

    def outputs(options: methods.Options) -> Any:
        return options.model_dump(exclude=_TRAINING_ONLY), getattr(options, "scale", None)

    present = {name_on_disk(name): module for name, module in adapted_modules(model)}
    wrong = sorted(set(present) ^ set(stored)) or [
        name for name, module in present.items() if outputs(module.adapter.options) != outputs(stored[name].options)
    ]
    if wrong:
        raise AdapterError(
            f"{place}: the model already carries other adapters (they differ at {len(wrong)} modules, such as "
            f"{shown(wrong[0])}); call trimtab.merge(model) or trimtab.detach(model) first"
        )


def _check_tensors(place: Path, present: dict[str, Adapted], stored: dict[str, Stored]) -> None:
    """Raise AdapterError unless every trained tensor is stored, in its shape, and nothing else is."""
    problems = []
    first: dict[int, str] = {}
    for name, entry in stored.items():
        expected = {key: list(value.shape) for key, value in present[name].adapter.named_parameters()}
        got = {key: list(value.shape) for key, value in entry.tensors.items()}
        for key in sorted(expected.keys() | got.keys()):
            if expected.get(key) != got.get(key):
                problems.append(
                    f"{name}.{shown(key)}: expected {expected.get(key, 'nothing')}, got {got.get(key, 'nothing')}"
                )
        # MoRA's square says little about the weight: that of a model of nearly the same size fits.
        adapter, handle = present[name].adapter, present[name].handle
        shape = (adapter.out_features, adapter.in_features)
        if entry.shape is not None and entry.shape != shape:
            problems.append(f"{name}: made for a {handle.kind} of {list(entry.shape)}, the model's is {list(shape)}")
        if entry.base is not None and not (
            isinstance(handle, bases.WeightBase) and torch.equal(entry.base.to(handle.dtype), handle.parameter.cpu())
        ):
            problems.append(f"{name}: trained on another weight than the model's")
        # Modules that share a weight share an adapter, too.
        twin = first.setdefault(id(present[name].adapter), name)
        if twin != name and not _equal(entry, stored[twin]):
            problems.append(f"{name}: shares its weight with {twin}, and the two have different adapters")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise AdapterError(
            f"{place}: this adapter was made for another model: {'; '.join(problems[:3])}{more}. The model is unchanged"
        )


def _equal(one: Stored, other: Stored) -> bool:
    return (
        one.options == other.options
        and one.tensors.keys() == other.tensors.keys()
        and all(torch.equal(value, other.tensors[key]) for key, value in one.tensors.items())
    )
