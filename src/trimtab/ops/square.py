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
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.ops.forms import FEW, RANKS_PER_PASS, Work


@dataclass(frozen=True)
class Square:
    """Multiplies with the square update. Tensors: ``(M,)``. ``turn``: rotation (True) or sharing (False)."""

    in_features: int
    out_features: int
    side: int
    turn: bool
    takes_ratio: ClassVar[bool] = False  # what is added up here has been scaled apart
    _known: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def chunks(self) -> int:
        return math.ceil(self.in_features / self.side)

    @property
    def groups(self) -> int:
        return min(math.ceil(self.out_features / self.side), self.chunks) if self.turn else 1

    def _rotate(self, pieces: Tensor, sign: int) -> Tensor:
        """Turn ``pieces [..., chunks, k]`` by ``sign`` times the rotary angles of their chunk's position."""
        cosine, sine = self._turns(pieces.dtype, pieces.device)
        first, second = pieces.chunk(2, dim=-1)
        return torch.cat(
            [
                torch.addcmul(first * cosine, second, sine, value=-sign),
                torch.addcmul(second * cosine, first, sine, value=sign),
            ],
            dim=-1,
        )

    def _turns(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``[chunks, k / 2]`` of the rotary angles; outside of a compiled graph kept."""
        if torch.compiler.is_compiling():
            return self._cosine_and_sine(dtype, device)
        key = (dtype, device, torch.is_inference_mode_enabled())  # what is made in that mode is no good for training
        if key not in self._known:
            self._known[key] = self._cosine_and_sine(dtype, device)
        return self._known[key]

    def _cosine_and_sine(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        work = torch.float64 if dtype == torch.float64 else torch.float32
        position = torch.arange(self.chunks, device=device, dtype=work)
        frequency = 10000.0 ** (-2.0 * torch.arange(self.side // 2, device=device, dtype=work) / self.side)
        angle = torch.outer(position, frequency)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def compress(self, x: Tensor) -> Tensor:
        """``[..., in] -> [..., groups, k]``."""
        pieces = F.pad(x, (0, self.chunks * self.side - self.in_features)).unflatten(-1, (self.chunks, self.side))
        if self.turn:
            pieces = self._rotate(pieces, 1)
        rounds = math.ceil(self.chunks / self.groups)
        pieces = F.pad(pieces, (0, 0, 0, rounds * self.groups - self.chunks))
        return pieces.unflatten(-2, (rounds, self.groups)).sum(-3)

    def expand(self, groups: Tensor) -> Tensor:
        """The transpose of ``compress``: ``[..., groups, k] -> [..., in]``."""
        rounds = math.ceil(self.chunks / self.groups)
        repeated = groups.unsqueeze(-3).expand(*groups.shape[:-2], rounds, *groups.shape[-2:])
        pieces = repeated.flatten(-3, -2)[..., : self.chunks, :]
        if self.turn:
            pieces = self._rotate(pieces, -1)
        return pieces.flatten(-2)[..., : self.in_features]

    def spread(self, groups: Tensor) -> Tensor:
        """``[..., groups, k] -> [..., out]``."""
        row = groups.flatten(-2)
        times = math.ceil(self.out_features / row.shape[-1])
        return row.repeat(*[1] * (row.dim() - 1), times)[..., : self.out_features]

    def gather(self, grad: Tensor) -> Tensor:
        """The transpose of ``spread``: ``[..., out] -> [..., groups, k]``."""
        width = self.groups * self.side
        times = math.ceil(self.out_features / width)
        padded = F.pad(grad, (0, times * width - self.out_features))
        if times == 1:
            return padded.unflatten(-1, (self.groups, self.side))
        return padded.unflatten(-1, (times, self.groups, self.side)).sum(-3)

    def delta(self, matrix: Tensor) -> Tensor:
        """``dV [out, in]``: row ``o`` is row ``o mod k`` of M, turned back for every chunk that feeds the row's
        group."""
        pieces = matrix.unsqueeze(1).expand(self.side, self.chunks, self.side)
        if self.turn:
            pieces = self._rotate(pieces, -1)
        group_of_chunk = torch.arange(self.chunks, device=matrix.device) % self.groups
        feeds = group_of_chunk == torch.arange(self.groups, device=matrix.device).unsqueeze(1)  # [groups, chunks]
        placed = pieces.unsqueeze(0) * feeds[:, None, :, None].to(matrix.dtype)  # [groups, k, chunks, k]
        rows = placed.flatten(2).flatten(0, 1)[:, : self.in_features]
        return rows.repeat(math.ceil(self.out_features / rows.shape[0]), 1)[: self.out_features]

    def work(self, tokens: int, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> Work:
        """What multiplying with the update costs: its maps pass over the batch more than once, and its products with k
        rows are no longer thin."""
        maps = tokens * (2 * self.in_features + 3 * self.out_features)
        products = tokens * self.side * (self.in_features if self.turn else self.side) / RANKS_PER_PASS[dtype.itemsize]
        elements = self.out_features * self.in_features
        return Work(
            maps + products, maps + products, elements * ((1.0 if dtype.itemsize >= 4 else 2.0) + 2 / self.groups)
        )

    def _parts(self, matrix: Tensor) -> Iterator[tuple[slice, int, Tensor]]:
        """``dV`` without its zeros: ``(columns, group, rows [k, columns])`` for the chunks that feed each group."""
        if not self.turn:
            times = math.ceil(self.in_features / self.side)
            yield slice(0, self.in_features), 0, matrix.repeat(1, times)[:, : self.in_features]
            return
        pieces = self._rotate(matrix.unsqueeze(1).expand(self.side, self.chunks, self.side), -1)
        for chunk in range(self.chunks):
            columns = slice(chunk * self.side, min((chunk + 1) * self.side, self.in_features))
            yield columns, chunk % self.groups, pieces[:, chunk, : columns.stop - columns.start]

    def _rows(self, weight: Tensor, group: int) -> Iterator[Tensor]:
        """The rows of ``weight [out, ...]`` that ``group`` feeds: ``[times, k, ...]`` and what is left over."""
        width = self.groups * self.side
        times = self.out_features // width
        if times:
            whole = weight[: times * width].unflatten(0, (times, self.groups, self.side))
            yield whole[:, group]
        rest = weight[times * width + group * self.side : times * width + (group + 1) * self.side]
        if len(rest):
            yield rest

    def fold(self, weight: Tensor, ratio: Tensor | None, tensors: tuple[Tensor, ...]) -> Tensor:
        """``c (W + dV)``, a new tensor ``[out, in]``, rounded once."""
        work = torch.promote_types(weight.dtype, torch.float32)
        total = weight.to(work, memory_format=torch.contiguous_format, copy=True)
        for columns, group, part in self._parts(tensors[0].to(work)):
            for rows in self._rows(total[:, columns], group):
                rows.add_(part[: rows.shape[-2]])
        if ratio is not None:
            total.mul_(ratio.unsqueeze(1))
        return total.to(weight.dtype)

    def squared_norms(self, weight: Tensor, squares: Tensor, matrix: Tensor) -> Tensor:
        """``||W + dV||^2`` per row ``[out]``: ``||W||^2 + <2 W + dV, dV>`` over those columns where dV is not zero.

        In the dtype of ``squares``, which is ``||W||^2`` computed once; never below zero, where rounding might take it.
        """
        total = squares.clone()
        for columns, group, part in self._parts(matrix.to(squares.dtype)):
            for rows, sums in zip(self._rows(weight[:, columns], group), self._rows(total, group), strict=True):
                added = part[: rows.shape[-2]]
                sums.add_((added * (2 * rows + added)).sum(-1))
        return total.clamp_min_(0)

    def add_product(self, product: Tensor, x: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (matrix,) = tensors
        if not self.turn or len(x) < self.side:
            full = torch.promote_types(x.dtype, torch.float32)
            work = full if len(x) <= FEW[x.dtype.itemsize] else x.dtype
            compressed = self.compress(x.to(full if self.turn else work))
            product.add_(self.spread(compressed.to(work).matmul(matrix.to(work).t())))
            return ()
        # M has fewer rows than the batch, so M is turned: chunk by chunk, each group's products laid on all the rows
        # that it feeds.
        inner: dict[int, Tensor] = {}
        for columns, group, part in self._low_parts(matrix, x.dtype):
            if group in inner:
                inner[group].addmm_(x[:, columns], part.t())
            else:
                inner[group] = x[:, columns].mm(part.t())
        for group, values in inner.items():
            for start in range(group * self.side, self.out_features, self.groups * self.side):
                rows = product[:, start : start + self.side]
                rows.add_(values[:, : rows.shape[1]])
        return ()

    def _low_parts(self, matrix: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, int, Tensor]]:
        """The parts, turned in full digits and then rounded to ``dtype``."""
        for columns, group, part in self._parts(matrix.to(torch.promote_types(dtype, torch.float32))):
            yield columns, group, part.to(dtype)

    def add_gradient(
        self,
        grad_x: Tensor | None,
        grad: Tensor,
        ratio: Tensor | None,
        x: Tensor,
        kept: tuple[Tensor, ...],
        tensors: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        (matrix,) = tensors
        gathered = self.gather(grad)
        if not self.turn:
            if grad_x is not None:
                grad_x.add_(self.expand(gathered.matmul(matrix.to(grad.dtype))))
            return (gathered.flatten(0, -2).t().matmul(self.compress(x).flatten(0, -2)).to(matrix.dtype),)
        if grad_x is not None:
            for columns, group, part in self._low_parts(matrix, grad.dtype):
                grad_x[:, columns].addmm_(gathered[:, group], part)
        # The products first, k x k each, and then the turning: it is the products that are small.
        work = torch.promote_types(grad.dtype, torch.float32)
        pieces = torch.zeros(self.side, self.chunks, self.side, dtype=work, device=grad.device)
        for chunk in range(self.chunks):
            fed = x[:, chunk * self.side : (chunk + 1) * self.side]
            pieces[:, chunk, : fed.shape[1]] = gathered[:, chunk % self.groups].t().matmul(fed)
        return (self._rotate(pieces, 1).sum(1).to(matrix.dtype),)
