"""A run that begins with an adapter that is there, in place of a fresh one: ``adapter: FOLDER`` in its YAML."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.adapters.placing import format_of, local_folder, read_adapter
from trimtab.adapters.store import load_adapter
from trimtab.adapters.stored_head import read_head
from trimtab.errors import AdapterError, PlanError
from trimtab.reading import open_file
from trimtab.surgery.adapted import bare_modules
from trimtab.surgery.attach_report import AttachReport
from trimtab.surgery.plan import Rule


def begin_from(name: str, model: nn.Module, planned: AttachReport | None, more: Sequence[Rule] = ()) -> AttachReport:
    """Let ``model`` begin from the adapter ``name``, whose tensors are trained on. A model without weights, on the meta
    device, shows what would become of it.

    Args:
        planned: what the plan of the configuration has attached already; None: the adapter says it itself.
        more: rules that the adapter has to obey besides.

    Raises:
        AdapterError: there is no such adapter, or it was made for another model.
        PlanError: the adapter is not what the plan, or a rule besides, says.
    """
    try:
        stored = load_adapter(model, name)
    except AdapterError as error:
        if planned is None or "already carries other adapters" not in str(error):
            raise
        differ = str(error).partition("(they ")[2].partition(")")[0]
        raise PlanError(
            f"plan: it says other than the adapter that the run begins from, {name} (they {differ}). Leave plan out, "
            "and it is the adapter's; or begin without adapter"
        ) from None
    if planned is not None:
        return planned
    trained = [known for module in stored.modules for known in (module.name, *module.aliases)]
    for rule in more:
        if not any(fnmatch(module, glob) for module in trained for glob in rule.match):
            raise PlanError(
                f"adapter: {name} does not train {', '.join(rule.match)}, which this run needs it to: the rows of "
                "model.add_tokens, or the head of its task. Begin from an adapter that was trained so, or without "
                "adapter"
            )
    return _shortened(model, stored)


def _shortened(model: nn.Module, report: AttachReport) -> AttachReport:
    """``report`` with a pattern for the modules of a rule, ``*.q_proj``, where it means them and no others."""
    known = {name for name, _ in bare_modules(model)}
    rules = []
    for number, rule in enumerate(report.rules, start=1):
        mine = {name for module in report.modules if module.rule == number for name in (module.name, *module.aliases)}
        globs = sorted({f"*.{name.rpartition('.')[2]}" for name in mine})
        meant = {name for name in known if any(fnmatch(name, glob) for glob in globs)}
        rules.append(rule.model_copy(update={"match": tuple(globs)}) if meant == mine else rule)
    return replace(report, rules=tuple(rules))


def labels_of_head(name: str) -> tuple[str, ...]:
    """The labels of the head that is stored with an adapter, in their order; none where it says none (PEFT's own).

    Raises AdapterError if there is no adapter, or a damaged one.
    """
    folder = local_folder(name)
    description, tensors = (folder / file for file in format_of(folder).files)
    head = read_head(description, tensors)
    return head.labels if head is not None else ()


def trains_base(name: str) -> bool:
    """Whether the adapter trains tensors of the model itself."""
    return any(entry.method_class.trains_base for entry in read_adapter(name).values())


def adapter_digest(name: str) -> str:
    """The SHA-256 of the adapter's files, by which it is known again. Raises AdapterError if there is none."""
    folder = local_folder(name)
    digest = hashlib.sha256()
    try:
        for file in format_of(folder).files:
            with open_file(folder / file) as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    except OSError as error:
        raise AdapterError(f"{folder}: the adapter cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def base_of(name: str) -> str | None:
    """The model that the adapter says it was made for, if it says one."""
    from trimtab.files import read_json

    try:
        said: Any = read_json(local_folder(name) / "adapter_config.json").get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    return Path(said).name if isinstance(said, str) and said else None
