"""bitsandbytes' ``Linear4bit``: 4 bits a weight, one scale for 64 (QLoRA, arXiv 2305.14314, section 3).

    W.flat[j] = code[index[j]] * scale[j // 64]        code: 16 values, quantiles of a normal distribution

With double quantisation the scales themselves are stored in 8 bits, 256 to a block. (``fp4`` differs in ``code`` only,
and is read as well.)

A processor with AVX512-BF16 is a trap: there the layer's own forward pass repacks the weight in place the first time
that it is evaluated, and what is dequantised after that is another matrix. A base switches that off for its layer, and
turns a weight back that was repacked earlier; its scales were rounded to bfloat16 then, and stay so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.bases import _quantised

BLOCKSIZE = 64


class Base(_quantised.Quantised):
    """A 4-bit linear layer."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]

    @staticmethod
    def knows(module: nn.Module) -> bool:
        return _quantised.is_kind(module, "bitsandbytes.nn.modules", "Linear4bit") and _state(module) is not None

    @property
    def dtype(self) -> torch.dtype:
        """That of the weight that was quantised."""
        return _state(self.module).dtype

    @property
    def step(self) -> int:
        return _quantised.aligned_rows(self.shape[1], _state(self.module).blocksize)

    def rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        _unpack(self.module)
        state, in_features = _state(self.module), self.shape[1]
        start, count = rows.start * in_features, (rows.stop - rows.start) * in_features
        scales = _scales(state)[start // state.blocksize : -(-(start + count) // state.blocksize)]
        stored = self.parameter.data.view(torch.uint8).flatten()[start // 2 : (start + count + 1) // 2]
        # Block by block, and not in the weight's shape: where 32 divides a row and the block does not, what
        # bitsandbytes 0.50 makes of it on AVX-512 is wrong by a fifth of the norm.
        whole = count % state.blocksize == 0
        shape = (count // state.blocksize, state.blocksize) if whole else (1, count + count % 2)
        found = torch.ops.bitsandbytes.dequantize_4bit.default(
            stored.unsqueeze(1), scales, state.blocksize, state.quant_type, shape, state.dtype
        )
        return found.flatten()[:count].view(-1, in_features).to(dtype)

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        before = _state(self.module)
        self.module.weight = _parameter(
            weight, before.dtype, before.quant_type, before.blocksize, before.nested, self.module
        )


def _state(module: nn.Module) -> Any:
    """bitsandbytes' record of how the weight was quantised; kept at the layer too, where the weight may have lost
    it."""
    return getattr(module.weight, "quant_state", None) or module.quant_state


def _scales(state: Any) -> Tensor:
    """One float32 scale a block."""
    if not state.nested:
        return state.absmax
    from bitsandbytes.functional import dequantize_blockwise

    return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()


def _unpack(module: Any) -> None:
    """Turn back a weight that bitsandbytes has repacked for its product on AVX512-BF16."""
    state = _state(module)
    if getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        state.original_nested = False  # or it would quantise the scales once more
        module.weight.data, _ = _convert_weight_packed_for_cpu_inverse(module.weight.data, state)
        state.absmax = state.absmax.t().flatten().float()  # they lie column by column in the repacked form


def _parameter(
    weight: Tensor,
    dtype: torch.dtype,
    quant_type: str = "nf4",
    blocksize: int = BLOCKSIZE,
    nested: bool = True,
    module: Any = None,
) -> nn.Parameter:
    """``weight [out, in]`` in ``dtype`` quantised, a part at a time: all at once would take 16 bytes a weight and
    more."""
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_blockwise
    from bitsandbytes.nn import Params4bit

    parts = [
        torch.ops.bitsandbytes.quantize_4bit.default(part.to(dtype), blocksize, quant_type, torch.uint8)
        for part in weight.flatten().split(_quantised.BLOCK)
    ]
    stored, scales = torch.cat([part for part, _ in parts]), torch.cat([scales for _, scales in parts])
    said = {
        "shape": weight.shape,
        "dtype": dtype,
        "blocksize": blocksize,
        "code": get_4bit_type(quant_type, device=weight.device),
        "quant_type": quant_type,
    }
    if nested:
        offset = scales.mean()
        scales, blocks = quantize_blockwise(scales - offset, blocksize=256)
        said |= {"offset": offset, "state2": blocks}
    state = QuantState(absmax=scales, **said)
    if module is not None:
        module.quant_state = state
    return Params4bit(
        stored,
        requires_grad=False,
        quant_state=state,
        blocksize=blocksize,
        compress_statistics=nested,
        quant_type=quant_type,
        module=module,
        bnb_quantized=True,
    )


def quantised(weight: Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> nn.Module:
    """An nf4 layer with doubly quantised ``weight [out, in]`` and ``bias``, for ``dtype``. Needs bitsandbytes."""
    from trimtab.bases._bitsandbytes import NF4

    return NF4(dtype, _parameter(weight, dtype), bias)
