"""A run's adapter as plain LoRA, for the programs that know no other method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import SurgeryError
from trimtab.export._subject import Subject
from trimtab.surgery.adapted import adapted_modules
from trimtab.surgery.conversion_report import ConversionReport
from trimtab.surgery.convert import convert_to_lora
from trimtab.surgery.names import entries, known_adapter

RANK = 32
"""Of the LoRA that another method becomes, where nothing is said."""


@dataclass(frozen=True)
class Factors:
    """The update ``scale * B @ A`` of one module: ``A`` ``[rank, in]`` and ``B`` ``[out, rank]``."""

    module: str
    adapter: Any
    handle: Any

    @property
    def A(self) -> Tensor:  # noqa: N802 -- as the paper calls it
        found: Tensor = self.adapter.A.detach()
        return found

    @property
    def B(self) -> Tensor:  # noqa: N802
        found: Tensor = self.adapter.B.detach()
        return found

    @property
    def scale(self) -> float:
        return float(self.adapter.options.scale)

    @property
    def rank(self) -> int:
        return self.A.shape[0]


def is_plain(model: Any) -> bool:
    """Whether every adapter of ``model`` is LoRA without a magnitude."""
    return all(one.method == "lora" and one.adapter.magnitude is None for one in _entries(model))


def _entries(model: Any) -> list[Any]:
    return list(entries(model, known_adapter(model, None, "export")).values())


@dataclass(frozen=True)
class Plain:
    """What became of a run's adapter.

    Attributes:
        done: what was done, a sentence each.
        notes: what the user should know of it, a sentence each.
        report: of the conversion; None where there was nothing to convert.
    """

    done: list[str]
    notes: list[str] = field(default_factory=list)
    report: ConversionReport | None = None


def make_plain(subject: Subject, *, one_scale: bool = False) -> Plain:
    """Turn the adapter of ``subject.model`` into plain LoRA, if it is something else, or of a higher rank than is
    wished for; or, with ``one_scale``, if its modules are scaled differently. With rows, the error is weighed by what
    they feed to each module. Raises as ``convert_to_lora`` does."""
    wishes, model = subject.wishes, subject.model
    ranks = [getattr(one.adapter.options, "rank", 0) for one in _entries(model)]
    lower = wishes.error is not None or (wishes.rank is not None and wishes.rank < max(ranks))
    plain = is_plain(model)
    scales = {one.adapter.options.scale for one in _entries(model)} if plain else set()
    if plain and not lower and not (one_scale and len(scales) > 1):
        return Plain([])
    if blocks := [name for name, one in adapted_modules(model) if one.handle.kind == "block"]:
        raise SurgeryError(
            f"the adapter of {blocks[0]} sits on a block, between whose products an activation stands: no LoRA can say "
            "that, and no weight can take it in"
        )
    rank = wishes.rank if wishes.rank is not None or wishes.error is not None else max(ranks) if plain else RANK
    inputs = subject.weighing()
    report = convert_to_lora(model, rank, inputs, error=wishes.error, progress=subject.progress)
    return Plain(_done(report, inputs), _notes(report, wishes.error), report)


def _done(report: ConversionReport, inputs: Sequence[object] | None) -> list[str]:
    methods = ", ".join(sorted({one.method for one in report.modules.values()}))
    ranks = sorted(set(report.ranks.values()))
    said = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}, by module"
    weighed = "" if inputs is None else f", weighed by {len(inputs)} rows"
    worst = report.modules[report.worst]
    answers = "" if report.output_error is None else f", of their answers to the rows {report.output_error:.1e}"
    return [
        f"converted {len(report.modules)} modules ({methods}) to plain LoRA of {said}{weighed}",
        f"relative error of the change of the weights {report.error:.1e}{answers}; the worst module is "
        f"{report.worst} with {worst.judged:.1e} (first singular value left out: {worst.bound:.1e})",
        "ranks that an error would need, as a median and at most: "
        + "; ".join(f"{error:g}: {_ranks(report, error)}" for error in (0.1, 0.05, 0.01)),
    ]


def _ranks(report: ConversionReport, error: float) -> str:
    ranks = sorted(report.rank_for(error).values())
    return f"{ranks[len(ranks) // 2]}, {ranks[-1]}"


def _notes(report: ConversionReport, error: float | None) -> list[str]:
    notes = []
    if report.kept:
        name, why = next(iter(report.kept.items()))
        notes.append(
            f"{len(report.kept)} modules are no LoRA and are handed over as they are, which PEFT reads and vLLM and "
            f"llama.cpp do not: {name}: {why}"
        )
    missed = {} if error is None else {name: one for name, one in report.modules.items() if one.judged > error * 1.001}
    if missed:
        worst = max(missed, key=lambda name: missed[name].judged)
        notes.append(
            f"{len(missed)} modules miss the error of {error:g} at the highest rank that --rank allows, such as "
            f"{worst} with {missed[worst].judged:.1e}, which would need rank {missed[worst].rank_for(error or 1)}"
        )
    return notes


def plain_factors(model: Any, what: str) -> list[Factors]:
    """The factors of every module of ``model``, which is plain LoRA. Raises SurgeryError for what ``what``, the format,
    cannot hold: a trained bias, a layer that is not one matrix, an adapter that two modules share."""
    found = []
    for name, one in entries(model, known_adapter(model, None, "export")).items():
        adapter: Any = one.adapter
        if one.method != "lora":
            raise SurgeryError(
                f"{name}: this {type(one.base).__name__} is trained itself, which cannot be said in {what}; export "
                "--to merged holds it"
            )
        if adapter.bias is not None:
            raise SurgeryError(f"{name}: a trained bias cannot be said in {what}; export --to merged holds it")
        shapes = (adapter.A.ndim, adapter.B.ndim, len(one.handle.shape))
        if shapes != (2, 2, 2) or tuple(one.handle.shape) != (adapter.B.shape[0], adapter.A.shape[1]):
            shape = " x ".join(map(str, one.handle.shape))
            raise SurgeryError(
                f"{name}: an adapter on a weight of {shape} numbers cannot be said in {what}; export --to merged holds "
                "it"
            )
        if not (torch.isfinite(adapter.A).all() and torch.isfinite(adapter.B).all()):
            raise SurgeryError(f"{name}: the adapter holds NaN or infinity, so there is nothing to hand over")
        found.append(Factors(name, adapter, one.handle))
    return found
