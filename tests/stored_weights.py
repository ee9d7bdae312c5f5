"""The weight of a layer in float64, computed from the bytes that it stores, for every kind of base.

Written from the formats and not from the library, of which nothing is imported here: tests that hold a product against
a reference take its weight from here, so that a fault in how a base reads its weight is seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# QLoRA (arXiv 2305.14314), appendix E: the 16 values of NF4, from the one of index 0 to that of index 15.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
NF4_BLOCK, SCALE_BLOCK = 64, 256


def stored_weight(module: Any) -> Tensor:
    """``[out, in]`` in float64."""
    kind = {base.__name__ for base in type(module).__mro__}
    if "Linear8bitLt" in kind:
        return int8(module.weight.data, module.weight.SCB)
    if "Linear4bit" in kind:
        return nf4(module.weight)
    if type(module.weight.data).__name__ == "Int8Tensor":
        stored = module.weight.data
        assert stored.scale.shape == (stored.qdata.shape[0], 1), "one scale a row"
        return stored.qdata.double() * stored.scale.double()
    weight = module.weight.detach().double()
    return weight.t() if kind & {"Conv1D", "Embedding"} else weight.flatten(1)


def int8(stored: Tensor, largest: Tensor) -> Tensor:
    """LLM.int8() (arXiv 2208.07339): ``q / 127`` of the largest absolute value of its row."""
    rows = [stored[number].double() * (largest[number].double() / 127) for number in range(len(stored))]
    return torch.stack(rows)


def nf4(weight: Any) -> Tensor:
    """QLoRA, section 3: two indices a byte, the first in the high half; each is a value of the table times the scale of
    its block of 64. Double quantisation: the scale is in turn a value of the 8-bit table, times the scale of its block
    of 256, plus the mean of all scales."""
    state = weight.quant_state
    indices = torch.tensor([half for byte in weight.data.flatten().tolist() for half in (byte // 16, byte % 16)])
    count = state.shape[0] * state.shape[1]
    values = torch.tensor(NF4, dtype=torch.float64)[indices[:count]]
    numbers = range(-(-count // NF4_BLOCK))
    table, outer, mean = dynamic_8bit(), state.state2.absmax.double(), state.offset.double()
    scales = torch.stack([table[int(state.absmax[one])] * outer[one // SCALE_BLOCK] + mean for one in numbers])
    return (values * scales.repeat_interleave(NF4_BLOCK)[:count]).reshape(*state.shape)


def dynamic_8bit() -> Tensor:
    """The signed dynamic 8-bit type of 8-bit optimisers (arXiv 2110.02861, section 2), ascending: with ``e``
    of 0 to 6 as the exponent, the middles of the 2^e equal parts of [0.1, 1], times 10^(e - 6), of both signs; 0; 1."""
    values = [0.0, 1.0]
    for exponent in range(7):
        parts = 2**exponent
        middles = [0.1 + 0.9 * (part + 0.5) / parts for part in range(parts)]
        values += [sign * middle * 10.0 ** (exponent - 6) for middle in middles for sign in (1, -1)]
    return torch.tensor(sorted(values), dtype=torch.float64)
