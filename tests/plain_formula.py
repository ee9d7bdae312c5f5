"""The formulas once more, in float64 and in plain steps: what the tests hold the library against.

Written from the papers' formulas (LoRA 2106.09685, rsLoRA 2312.03732, DoRA 2402.09353, MoRA 2405.12130, the adapter
blocks 1902.00751 and 2110.04366) and not from the library, of which nothing is imported here. Slow on purpose: rows
one by one, rotations as whole matrices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

KNOWN = ("lora", "dora", "mora", "full", "serial", "parallel")


def low_rank(a: Tensor, b: Tensor, options: Mapping[str, Any]) -> Tensor:
    """``s B A``: a sum of outer products."""
    rank = a.shape[0]
    alpha = options.get("alpha") or 2 * rank
    scale = alpha / math.sqrt(rank) if options.get("rank_stabilised") else alpha / rank
    total = torch.zeros(b.shape[0], a.shape[1], dtype=torch.float64)
    for j in range(rank):
        total = total + scale * torch.outer(b[:, j], a[j])
    return total


def rotation(side: int, position: int) -> Tensor:
    """The matrix that turns ``side`` features, feature f paired with feature f + side / 2, by rotary angles."""
    turned = torch.zeros(side, side, dtype=torch.float64)
    for f in range(side // 2):
        angle = position * 10000.0 ** (-2 * f / side)
        g = f + side // 2
        turned[f, f], turned[f, g] = math.cos(angle), -math.sin(angle)
        turned[g, f], turned[g, g] = math.sin(angle), math.cos(angle)
    return turned


def square_sharing(m: Tensor, shape: tuple[int, int]) -> Tensor:
    """MoRA, equation 6: ``dV[o, i] = M[o mod k, i mod k]``."""
    k = m.shape[0]
    rows = [m[o % k] for o in range(shape[0])]
    return torch.stack([torch.stack([row[i % k] for i in range(shape[1])]) for row in rows])


def square_rotation(m: Tensor, shape: tuple[int, int]) -> Tensor:
    """MoRA, equation 9, with no input left out: which chunk of the input feeds which block of the output, one by
    one."""
    k = m.shape[0]
    blocks, chunks = math.ceil(shape[0] / k), math.ceil(shape[1] / k)
    nothing = torch.zeros(k, k, dtype=torch.float64)
    rows = []
    for block in range(blocks):
        row = []
        for chunk in range(chunks):
            feeds = chunk % blocks == block if chunks >= blocks else block % chunks == chunk
            row.append(m @ rotation(k, chunk) if feeds else nothing)
        rows.append(torch.cat(row, dim=1))
    return torch.cat(rows)[: shape[0], : shape[1]]


def update(method: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """``dV [out, in]`` from the trained tensors of a method, all float64."""
    shape = (weight.shape[0], weight.shape[1])
    if method in ("lora", "dora"):
        return low_rank(tensors["A"], tensors["B"], options) if "A" in tensors else torch.zeros_like(weight)
    if method == "mora":
        form = square_sharing if options.get("form") == "sharing" else square_rotation
        return form(tensors["M"], shape)
    if method == "full":
        return tensors["weight"] - weight
    raise KeyError(method)


def ratios(total: Tensor, magnitude: Tensor | None, axis: str = "output", detach: bool = True) -> Tensor | None:
    """``m / n`` row by row (or column by column) of ``W + dV``; 0 for a row of zeros."""
    if magnitude is None:
        return None
    found = []
    for number, row in enumerate(total if axis == "output" else total.t()):
        norm = row.square().sum().sqrt() if bool(row.any()) else None
        if norm is None:
            found.append(torch.zeros((), dtype=torch.float64))
        else:
            found.append(magnitude[number] / (norm.detach() if detach else norm))
    return torch.stack(found)


def effective(total: Tensor, magnitude: Tensor | None, axis: str = "output", detach: bool = True) -> Tensor:
    """``m (W + dV) / ||W + dV||``, or ``W + dV`` without a magnitude."""
    found = ratios(total, magnitude, axis, detach)
    if found is None:
        return total
    return total * (found.unsqueeze(1) if axis == "output" else found.unsqueeze(0))


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + bias``, all float64."""
    y = x @ weight.t()
    return y if bias is None else y + bias


def activation(kind: str, z: Tensor) -> Tensor:
    """max(z, 0), z times the normal distribution function, or z times the logistic function."""
    if kind == "relu":
        return z * (z > 0)
    return z * (0.5 * (1 + torch.erf(z / math.sqrt(2))) if kind == "gelu" else 1 / (1 + torch.exp(-z)))


def bottleneck(kind: str, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """``up act(down x + down_bias) + up_bias``, all float64."""
    narrow = x @ tensors["down"].t() + tensors["down_bias"]
    return activation(kind, narrow) @ tensors["up"].t() + tensors["up_bias"]


def block(method: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], x: Tensor, h: Tensor) -> Tensor:
    """What an adapter block makes of the output ``h`` of a block with the input ``x``, all float64."""
    if method == "serial":
        return h + bottleneck(options.get("activation", "gelu"), tensors, h)
    if method == "parallel":
        return h + options.get("scale", 4.0) * bottleneck(options.get("activation", "relu"), tensors, x)
    raise KeyError(method)
