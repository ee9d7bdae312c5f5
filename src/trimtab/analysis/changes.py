"""How far each weight of a tuned model moved from its base, in magnitude and in direction.

    dM = mean |m_t - m_0|        dD = mean (1 - cos(V_t, W_0))        over the rows of a weight

Source: DoRA (arXiv 2402.09353, section 3.2), where the correlation of the two tells full fine-tuning (negative) from
LoRA (positive). The size and the effective rank of the update, and the rows that moved most, are computed as well.
Weights are read one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from trimtab import bases
from trimtab.analysis.correlation import pearson
from trimtab.analysis.tuned import Tuned, find_tuned
from trimtab.errors import ModelError, did_you_mean
from trimtab.models.load import empty_model
from trimtab.models.locate import Source
from trimtab.models.model_files import ModelFiles
from trimtab.ops.decomposition import row_changes
from trimtab.surgery.adapted import bare_modules
from trimtab.surgery.targets import block_number

KEPT_SINGULAR_VALUES = 16


@dataclass(frozen=True)
class Extreme:
    """The row of a weight with the largest value of some measure, and that value."""

    row: int
    value: float


@dataclass(frozen=True)
class Change:
    """One weight of one tuned state, compared with the base."""

    tuned: str
    """The folder that the user named."""
    state: str
    """The checkpoint in it, or its own name."""
    step: int | None
    method: str
    module: str
    kind: str
    """The last part of the module's name, such as q_proj."""
    block: int | None
    norm: float
    """Root mean square of the norms of the base's rows: ``||W_0|| / sqrt(out)``, with the Frobenius norm."""
    delta_magnitude: float
    """dM."""
    delta_direction: float
    """dD."""
    relative: float
    """``||W_t - W_0|| / ||W_0||``, with the Frobenius norm."""
    most_grown: Extreme
    """The largest ``|m_t - m_0|``."""
    most_turned: Extreme
    """The largest ``1 - cos``."""
    effective_rank: float | None
    """Of the update; None if singular values were not asked for."""
    singular_values: tuple[float, ...]
    """The largest of the update, in descending order."""


def analyse(
    base: Source,
    tuned: Sequence[Path],
    *,
    match: str = "*",
    spectra: bool = True,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Iterator[Change]:
    """Yield every changed weight of every state in ``tuned``, in order.

    Args:
        base: the model that was tuned.
        tuned: model folders, adapters or runs.
        match: glob over module names.
        spectra: also compute singular values, which takes most of the time on large weights.
        progress: called with the number of weights done and of all.
        note: called with a sentence about what is left out, once for each of ``tuned``.

    Raises:
        ModelError: a folder is no tuned form of the base, or no weight matches.
        AdapterError: an adapter cannot be read.
    """
    layers = _layers(base)
    weights = ModelFiles(base).weights
    note = note or (lambda _: None)
    states = [(str(place), state) for place in tuned for state in find_tuned(place, layers, note)]
    left_out = {place: state.left_out for place, state in states if state.left_out}
    for place, names in left_out.items():
        note(f"{place}: {len(names)} adapters on blocks, such as {names[0]}, change no weight and are left out")
    work = [(place, state, name) for place, state in states for name in state.methods if fnmatchcase(name, match)]
    if not work:
        known = {name for _, state in states for name in state.methods}
        raise ModelError(f"no tuned weight matches '{match}'.{did_you_mean(match, known)}")
    for done, (place, state, name) in enumerate(work, 1):
        key = layers[name].tensor_name(name)
        if key not in weights:
            raise ModelError(f"{weights.folder}: the base has no weight {key}.")
        before = layers[name].as_weight(weights[key]).flatten(0, -2)
        yield _change(place, state, name, before if state.dtype is None else before.to(state.dtype), spectra)
        if progress is not None:
            progress(done, len(work))


def _layers(base: Source) -> dict[str, bases.WeightBase]:
    """Every weight of a kind that a base knows, except the output head's, by the name of its target."""
    model = empty_model(base)
    head = model.get_output_embeddings()
    return {
        name: handle
        for name, module in bare_modules(model)
        if module is not head and (handle := bases.find(module)) is not None
    }


@torch.no_grad()
def _change(place: str, state: Tuned, name: str, before: Tensor, spectra: bool) -> Change:
    after = state.weight(name, before)
    grown, turned = row_changes(before, after)
    update = after.double() - before.double()
    values = _singular_values(update) if spectra else None
    numbered = block_number(name)
    whole = float(before.double().norm())
    return Change(
        tuned=place,
        state=state.label,
        step=state.step,
        method=state.methods[name],
        module=name,
        kind=name.rsplit(".", 1)[-1],
        block=None if numbered is None else numbered[1],
        norm=whole / math.sqrt(before.shape[0]),
        delta_magnitude=float(grown.mean()),
        delta_direction=float(turned.mean()),
        relative=float(update.norm()) / max(whole, torch.finfo(torch.float64).tiny),
        most_grown=_extreme(grown),
        most_turned=_extreme(turned),
        effective_rank=None if values is None else effective_rank(values),
        singular_values=() if values is None else tuple(values[:KEPT_SINGULAR_VALUES].tolist()),
    )


def _extreme(values: Tensor) -> Extreme:
    row = int(values.argmax())
    return Extreme(row, float(values[row]))


def _singular_values(update: Tensor) -> Tensor:
    """All singular values of ``update [out, in]``, in descending order.

    They are the roots of the eigenvalues of the smaller Gram matrix, which is faster than a decomposition. Values below
    1e-8 of the largest are lost in its rounding, and are set to 0.
    """
    gram = update @ update.t() if update.shape[0] <= update.shape[1] else update.t() @ update
    squares = torch.linalg.eigvalsh(gram).flip(0)
    return torch.where(squares > 1e-16 * squares[0], squares, 0.0).clamp_min(0).sqrt()


def effective_rank(singular_values: Tensor) -> float:
    """``exp(-sum p log p)`` with ``p`` the singular values over their sum; 0 for no update.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    total = float(singular_values.sum())
    if total == 0:
        return 0.0
    shares = singular_values[singular_values > 0] / total
    return math.exp(-float((shares * shares.log()).sum()))


def correlation(changes: Sequence[Change]) -> float | None:
    """Pearson's correlation of dM and dD over ``changes``; None as in `pearson`."""
    return pearson([one.delta_magnitude for one in changes], [one.delta_direction for one in changes])
