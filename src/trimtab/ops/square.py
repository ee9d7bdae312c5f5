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
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Square:
    """Multiplies with the square update. Tensors: ``(M,)``. ``turn``: rotation (True) or sharing (False)."""

    in_features: int
    out_features: int
    side: int
    turn: bool

    @property
    def chunks(self) -> int:
        return math.ceil(self.in_features / self.side)

    @property
    def groups(self) -> int:
        return min(math.ceil(self.out_features / self.side), self.chunks) if self.turn else 1

    def _rotate(self, pieces: Tensor, sign: int) -> Tensor:
        """Turn ``pieces [..., chunks, k]`` by ``sign`` times the rotary angles of their chunk's position."""
        half = self.side // 2
        work = torch.float64 if pieces.dtype == torch.float64 else torch.float32
        position = torch.arange(self.chunks, device=pieces.device, dtype=work)
        frequency = 10000.0 ** (-2.0 * torch.arange(half, device=pieces.device, dtype=work) / self.side)
        angle = torch.outer(position, frequency)
        cosine, sine = angle.cos().to(pieces.dtype), (sign * angle.sin()).to(pieces.dtype)
        first, second = pieces[..., :half], pieces[..., half:]
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)

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

    def add_product(self, product: Tensor, x: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (matrix,) = tensors
        product.add_(self.spread(self.compress(x).matmul(matrix.to(x.dtype).t())))
        return ()

    def add_gradient(
        self, grad_x: Tensor | None, grad: Tensor, x: Tensor, kept: tuple[Tensor, ...], tensors: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        (matrix,) = tensors
        gathered = self.gather(grad)
        if grad_x is not None:
            grad_x.add_(self.expand(gathered.matmul(matrix.to(grad.dtype))))
        outer = gathered.flatten(0, -2).t().matmul(self.compress(x).flatten(0, -2))
        return (outer.to(matrix.dtype),)
