"""The square update of MoRA (arXiv 2405.12130): a matrix ``M [k, k]`` between two fixed maps without parameters.

An input of ``in`` features is cut into ``chunks = ceil(in / k)`` pieces of ``k`` (the last one filled with zeros), an
output of ``out`` features into ``blocks = ceil(out / k)``. The maps meet in ``groups``:

    compress    x [..., in]         -> [..., groups, k]: (rotated) chunks added up, chunk j into group j mod groups
    multiply    M on every group
    spread      [..., groups, k]    -> [..., out]: laid side by side and repeated until ``out`` is full

Sharing (equation 6; the authors' type 1) has one group and turns nothing: ``dV[o, i] = M[o mod k, i mod k]``.
Rotation (equation 9; type 6) has ``min(blocks, chunks)`` groups and turns chunk j by the rotary angles of position j,
so every input is used and every output is reached.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.ops.cost import Work, full_digits_for_few, passes_on
from trimtab.ops.expert_rows import StackMap
from trimtab.ops.kernels import turning_for
from trimtab.ops.kernels.contract import BackwardPass
from trimtab.ops.linear_map import LinearMap
from trimtab.ops.traced import seen_through
from trimtab.ops.update import Update

# Passes over one element, in the units of trimtab.ops.cost: turning M for a chunk, repeating it, and adding a product
# to some of the columns.
_TURNING, _REPEATING, _STRIDED = 8.0, 2.0, 1.6


@dataclass(frozen=True)
class Square(Update):
    """Multiplies with the square update. Tensors: ``(M,)``. ``turn``: rotation (True) or sharing (False). Of a stack of
    weights, M has its axis in front."""

    in_features: int
    out_features: int
    side: int
    turn: bool
    _known: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def chunks(self) -> int:
        return math.ceil(self.in_features / self.side)

    @property
    def groups(self) -> int:
        return min(math.ceil(self.out_features / self.side), self.chunks) if self.turn else 1

    @property
    def rounds(self) -> int:
        """How many chunks a group has at most."""
        return math.ceil(self.chunks / self.groups)

    @property
    def times(self) -> int:
        """How often the groups are laid side by side until ``out`` is full; the last time perhaps only in part."""
        return math.ceil(self.out_features / (self.groups * self.side))

    def columns(self) -> Iterator[slice]:
        """The input features of each chunk."""
        for start in range(0, self.in_features, self.side):
            yield slice(start, min(start + self.side, self.in_features))

    def spans(self, group: int) -> Iterator[slice]:
        """The output features that ``group`` feeds: k of them, or what is left of them, each time."""
        for start in range(group * self.side, self.out_features, self.groups * self.side):
            yield slice(start, min(start + self.side, self.out_features))

    def _rotate(self, pieces: Tensor, sign: int) -> Tensor:
        """Turn ``pieces [..., chunks, k]`` by ``sign`` times the rotary angles of their chunk's position."""
        cosine, sine = self._turns(pieces)
        return torch.addcmul(pieces * cosine, self._swapped(pieces), sine, value=-sign)

    def _turns(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``[chunks, k]`` of the rotary angles, those of the second half of the sines negative; kept,
        where nobody looks on who would not let go of them. ``row * cosine + swapped(row) * sine`` turns back."""
        if torch.compiler.is_compiling() or seen_through():
            return self._cosine_and_sine(like)
        key = (like.dtype, like.device, torch.is_inference_mode_enabled())  # that mode's are no good for training
        if key not in self._known:
            self._known[key] = self._cosine_and_sine(like)
        return self._known[key]

    def _cosine_and_sine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        work = torch.float64 if like.dtype == torch.float64 else torch.float32
        position = torch.arange(self.chunks, device=like.device, dtype=work)
        frequency = 10000.0 ** (-2.0 * torch.arange(self.side // 2, device=like.device, dtype=work) / self.side)
        angle = torch.outer(position, frequency)
        cosine, sine = angle.cos().to(like.dtype), angle.sin().to(like.dtype)
        return torch.cat([cosine, cosine], 1), torch.cat([sine, -sine], 1)

    def _swapped(self, rows: Tensor) -> Tensor:
        """``rows [..., k]`` with their halves exchanged."""
        return rows.roll(self.side // 2, -1)

    def compress(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., groups, k]``."""
        if (missing := self.chunks * self.side - self.in_features) > 0:
            x = F.pad(x, (0, missing))
        pieces: Tensor = x.unflatten(-1, (self.chunks, self.side))
        if self.turn:
            pieces = self._rotate(pieces, 1)
        if self.rounds == 1:
            return pieces
        if (missing := self.rounds * self.groups - self.chunks) > 0:
            pieces = F.pad(pieces, (0, 0, 0, missing))
        rounds: Tensor = pieces.unflatten(-2, (self.rounds, self.groups))
        return rounds.sum(-3)

    def expand(self, groups: Tensor) -> Tensor:
        """The transpose of ``compress``: ``[..., groups, k] -> [..., in]``."""
        repeated = groups.unsqueeze(-3).expand(*groups.shape[:-2], self.rounds, *groups.shape[-2:])
        pieces = repeated.flatten(-3, -2)[..., : self.chunks, :]
        if self.turn:
            pieces = self._rotate(pieces, -1)
        return pieces.flatten(-2)[..., : self.in_features]

    def spread(self, groups: Tensor) -> Tensor:
        """``[..., groups, k] -> [..., out]``."""
        row: Tensor = groups.flatten(-2)
        if self.times == 1:
            row = row[..., : self.out_features]
            return row
        return row.repeat(*[1] * (row.dim() - 1), self.times)[..., : self.out_features]

    def gather(self, grad: Tensor) -> Tensor:
        """The transpose of ``spread``: ``[..., out] -> [..., groups, k]``."""
        padded = F.pad(grad, (0, self.times * self.groups * self.side - self.out_features))
        sides = (self.groups, self.side)
        pieces: Tensor = padded.unflatten(-1, sides if self.times == 1 else (self.times, *sides))
        return pieces if self.times == 1 else pieces.sum(-3)

    def _laid_together(self, grad: Tensor) -> Tensor:
        """``gather`` with the groups of a row one after the other: ``[tokens, groups * k]``, or as few as there are
        outputs."""
        if self.times == 1:
            return grad
        first, *others = grad.split(self.groups * self.side, 1)
        total: Tensor = first.clone()
        for piece in others:
            total[:, : piece.shape[1]].add_(piece)
        return total

    def delta(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Row ``o`` is row ``o mod k`` of M, turned back for every chunk that feeds the row's group."""
        (matrix,) = tensors
        if matrix.dim() > 2:
            return torch.stack([self.delta((one,)) for one in matrix])
        pieces = matrix.unsqueeze(1).expand(self.side, self.chunks, self.side)
        if self.turn:
            pieces = self._rotate(pieces, -1)
        group_of_chunk = torch.arange(self.chunks, device=matrix.device) % self.groups
        feeds = group_of_chunk == torch.arange(self.groups, device=matrix.device).unsqueeze(1)  # [groups, chunks]
        placed = pieces.unsqueeze(0) * feeds[:, None, :, None].to(matrix.dtype)  # [groups, k, chunks, k]
        rows = placed.flatten(2).flatten(0, 1)[:, : self.in_features]
        return rows.repeat(math.ceil(self.out_features / (self.groups * self.side)), 1)[: self.out_features]

    def delta_gradient(self, grad: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The transpose of ``delta``."""
        gathered = self.gather(grad.t()).permute(1, 2, 0)  # [groups, k, in]
        padded = F.pad(gathered, (0, self.chunks * self.side - self.in_features))
        pieces = padded.unflatten(2, (self.chunks, self.side))
        group_of_chunk = torch.arange(self.chunks, device=grad.device) % self.groups
        fed = pieces[group_of_chunk, :, torch.arange(self.chunks, device=grad.device)]  # [chunks, k, k]
        fed = fed.transpose(0, 1)
        return ((self._rotate(fed, 1) if self.turn else fed).sum(1),)

    def work(self, tokens: int, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Work:
        """(Products with k rows are no longer thin.)"""
        elements, rows = self.out_features * self.in_features, self.side * self.in_features
        fold, thickness = (
            elements * (1 + 2 / self.groups),
            self.side / passes_on(tensors[0].device).ranks[dtype.itemsize],
        )
        maps = tokens * (2 * self.in_features + 3 * self.out_features)
        if not self.turn:
            product = maps + tokens * self.side * thickness
            return Work(product, product, fold + _REPEATING * rows)
        turning, each = _TURNING * rows, tokens * _STRIDED * (1 + thickness)
        product = maps + tokens * self.in_features * thickness
        if tokens >= self.side:
            fed = min(self.groups * self.side, self.out_features)
            spreading = 0 if self.times == 1 else tokens * (fed + self.out_features)
            product = turning + each * self.rounds * fed + spreading
        return Work(product, turning + each * self.in_features, turning + fold)

    def _parts(self, matrix: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, int, Tensor]]:
        """``dV`` without its zeros: ``(columns, group, rows [k, columns])`` for every chunk of the inputs and the group
        that it feeds, computed in float32 or wider and then rounded to ``dtype``."""
        matrix = matrix.to(torch.promote_types(dtype, torch.float32))
        if not self.turn:
            times = math.ceil(self.in_features / self.side)
            yield slice(0, self.in_features), 0, matrix.repeat(1, times)[:, : self.in_features].to(dtype)
            return
        cosine, sine = (table.unsqueeze(1) for table in self._turns(matrix))
        pieces = torch.addcmul(matrix * cosine, self._swapped(matrix), sine).to(dtype)  # [chunks, k, k]
        for chunk, columns in enumerate(self.columns()):
            yield columns, chunk % self.groups, pieces[chunk, :, : columns.stop - columns.start]

    def fold(self, weight: Tensor, ratio: Tensor | None, tensors: tuple[Tensor, ...]) -> Tensor:
        work = torch.promote_types(weight.dtype, torch.float32)
        # Only a part of the rows is fed by each chunk, so rounding goes with adding, unless a ratio is still to come.
        kept = weight.dtype if ratio is None else work
        total = weight.to(kept, copy=True)
        for columns, group, part in self._parts(tensors[0], work):
            for span in self.spans(group):
                total[span, columns].add_(part[: span.stop - span.start])
        if ratio is not None:
            total.mul_(ratio.unsqueeze(1))
        return total.to(weight.dtype)

    def squared_norms(self, weight: Tensor, squares: Tensor, matrix: Tensor) -> Tensor:
        """``||W + dV||^2`` per row ``[out]``: ``||W||^2 + <2 W + dV, dV>`` over those columns where dV is not zero.

        Computed in the dtype of ``squares``, which is ``||W||^2``. Rounding cannot take it below zero.
        """
        if matrix.dim() > 2:
            return torch.stack([self.squared_norms(*one) for one in zip(weight, squares, matrix, strict=True)])
        programs = turning_for(weight)
        if programs is not None and not (torch.is_grad_enabled() and matrix.requires_grad):
            cosine, sine = self._turns(squares) if self.turn else (None, None)
            found: Tensor | None = programs.squared_norms(weight, squares, matrix, cosine, sine, groups=self.groups)
            if found is not None:
                return found
        total = squares.clone()
        for columns, group, part in self._parts(matrix, squares.dtype):
            for span in self.spans(group):
                added = part[: span.stop - span.start]
                total[span].add_((added * (2 * weight[span, columns] + added)).sum(-1))
        return total.clamp_min_(0)

    def _groups_of(self, rows: Tensor) -> Tensor:
        """``rows`` compressed, with the groups of a row one after the other: ``[rows * groups, k]``."""
        return self.compress(rows.to(torch.promote_types(rows.dtype, torch.float32))).to(rows.dtype).flatten(0, 1)

    def _turns_rows(self, rows: Tensor) -> bool:
        """Whether the rows are turned, and M is one product for all of them, rather than M being turned for each chunk:
        that takes fewer operations, and on a processor longer."""
        return rows.device.type != "cpu" or turning_for(rows) is not None

    def _tables(self, rows: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Cosine and sine in full digits; none where nothing is turned."""
        full = torch.promote_types(rows.dtype, torch.float32)
        return self._turns(rows.new_empty(0, dtype=full)) if self.turn else (None, None)

    def gathered(self, rows: Tensor, order: Tensor | None = None) -> Tensor:
        """``rows`` compressed, or those that ``order`` names: ``[tokens, groups, k]``."""
        programs, found = turning_for(rows), None
        if programs is not None:
            asked = {"side": self.side, "groups": self.groups, "order": order}
            found = programs.compress(rows, *self._tables(rows), **asked)
        if found is None:
            found = self._groups_of(rows if order is None else rows[order]).unflatten(0, (-1, self.groups))
        gathered: Tensor = found
        return gathered

    def collected(self, grad: Tensor, order: Tensor | None = None) -> Tensor:
        """``gather`` of the rows of ``grad``, or of those that ``order`` names: ``[tokens, groups, k]``."""
        programs, found = turning_for(grad), None
        if programs is not None and (order is not None or self.times > 1):  # (else it is a view)
            found = programs.compress(grad, None, None, side=self.side, groups=self.groups, order=order)
        collected: Tensor = self.gather(grad if order is None else grad[order]) if found is None else found
        return collected

    def add_expanded(self, target: Tensor, inner: Tensor, order: Tensor | None = None) -> None:
        """Add the transpose of ``gathered`` to ``target [tokens, in]``, or to those rows of it that ``order`` names."""
        programs, given = turning_for(target), {"side": self.side, "order": order}
        if programs is not None and programs.add_expanded(target, inner, *self._tables(target), **given):
            return
        if order is None:
            target.add_(self.expand(inner))
        else:
            target.index_add_(0, order, self.expand(inner))

    def before_spread(self, rows: Tensor, tensors: tuple[Tensor, ...], through: LinearMap) -> Tensor | None:
        if isinstance(through, StackMap) or turning_for(rows) is None:
            return None
        return self.gathered(rows).matmul(tensors[0].to(rows.dtype).t()).flatten(1)

    def add_product(self, product: Tensor, rows: Tensor, tensors: tuple[Tensor, ...], through: LinearMap) -> None:
        (matrix,) = tensors
        if isinstance(through, StackMap):
            multiplied = through.repeated(self.groups).times(self._groups_of(rows), matrix.to(rows.dtype).mT)
            product.add_(self.spread(multiplied.unflatten(0, (-1, self.groups))))
            return
        if self._turns_rows(rows):
            product.add_(self.spread(self.gathered(rows).matmul(matrix.to(rows.dtype).t())))
            return
        if not self.turn or len(rows) < self.side:
            full = torch.promote_types(rows.dtype, torch.float32)
            work = full_digits_for_few(rows.shape[0], rows.dtype, rows.device)
            compressed = self.compress(rows.to(full if self.turn else work))
            product.add_(self.spread(compressed.to(work).matmul(matrix.to(work).t())))
            return
        # M has fewer rows than the batch, so M is turned, and each chunk's product is added to its group. Where a group
        # fills several places of the output, it is computed once.
        target = product if self.times == 1 else product.new_zeros(len(rows), self.groups * self.side)
        for columns, group, part in self._parts(matrix, rows.dtype):
            place = target[:, group * self.side : (group + 1) * self.side]
            place.addmm_(rows[:, columns], part[: place.shape[1]].t())
        if self.times > 1:
            for piece in product.split(target.shape[1], 1):
                piece.add_(target[:, : piece.shape[1]])

    def add_gradient(
        self,
        grad_rows: Tensor | None,
        after: BackwardPass,
        rows: Tensor,
        tensors: tuple[Tensor, ...],
        through: LinearMap,
    ) -> tuple[Tensor, ...]:
        (matrix,), grad = tensors, after.grad
        if isinstance(through, StackMap):
            each, gathered = through.repeated(self.groups), self.gather(grad).flatten(0, 1)
            if grad_rows is not None:
                multiplied = each.times(gathered, matrix.to(grad.dtype))
                grad_rows.add_(self.expand(multiplied.unflatten(0, (-1, self.groups))))
            return (each.outer(gathered, self._groups_of(rows)).to(matrix.dtype),)
        if self._turns_rows(rows):
            gathered = self.collected(grad)
            if grad_rows is not None:
                self.add_expanded(grad_rows, gathered.matmul(matrix.to(grad.dtype)))
            return (gathered.flatten(0, 1).t().mm(self.gathered(rows).flatten(0, 1)).to(matrix.dtype),)
        if not self.turn:
            gathered = self.gather(grad)
            if grad_rows is not None:
                grad_rows.add_(self.expand(gathered.matmul(matrix.to(grad.dtype))))
            return (gathered.flatten(0, -2).t().matmul(self.compress(rows).flatten(0, -2)).to(matrix.dtype),)
        places = self._laid_together(grad).split(self.side, 1)
        if grad_rows is not None:
            for columns, group, part in self._parts(matrix, grad.dtype):
                grad_rows[:, columns].addmm_(places[group], part[: places[group].shape[1]])
        # The products first, k x k each, and then the turning: it is the products that are small.
        plain = torch.zeros(
            self.side, self.side, dtype=torch.promote_types(grad.dtype, torch.float32), device=grad.device
        )
        crossed = torch.zeros_like(plain)
        cosine, sine = self._turns(plain)
        for chunk, columns in enumerate(self.columns()):
            product = places[chunk % self.groups].t().mm(rows[:, columns]).to(plain.dtype)
            corner = slice(0, product.shape[0]), slice(0, product.shape[1])
            plain[corner].addcmul_(product, cosine[chunk, corner[1]])
            crossed[corner].addcmul_(product, sine[chunk, corner[1]])
        return (plain.add_(self._swapped(crossed)).to(matrix.dtype),)
