"""bitsandbytes' ``Linear4bit``: 4 bits a weight, one scale for 64 (QLoRA, arXiv 2305.14314, section 3).

    W.flat[j] = code[index[j]] * scale[j // 64]        code: 16 values, quantiles of a normal distribution

With double quantisation the scales themselves are stored in 8 bits, 256 to a block. (``fp4`` differs in ``code`` only,
and is read as well.)

A processor with AVX512-BF16 is a trap: there the layer's own forward pass repacks the weight in place the first time
that it is evaluated, and what is dequantised after that is another matrix. A base switches that off for its layer, and
undoes the repacking where it has happened already. The scales were rounded to bfloat16 by it, and stay so.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.bases import _base, _quantised

BLOCKSIZE = 64


class NF4Base(_quantised.QuantisedBase):
    """A 4-bit linear layer."""

    package = "bitsandbytes"
    extra = "quantised"
    bits = 4

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]

    @staticmethod
    def knows(module: nn.Module) -> bool:
        is_layer = _base.is_instance_by_name(module, "bitsandbytes.nn.modules", "Linear4bit")
        return is_layer and _state(module) is not None

    @property
    def dtype(self) -> torch.dtype:
        """That of the weight that was quantised."""
        dtype: torch.dtype = _state(self.module).dtype
        return dtype

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
        dense: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            stored.unsqueeze(1), scales, state.blocksize, state.quant_type, shape=shape, dtype=state.dtype
        )
        return dense.flatten()[:count].view(-1, in_features).to(dtype)

    def stored(self) -> tuple[Tensor, ...]:
        return self.parameter, _state(self.module).absmax

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        before = _state(self.module)
        self.module.weight = _parameter(
            weight,
            before.dtype,
            quant_type=before.quant_type,
            blocksize=before.blocksize,
            nested=before.nested,
            module=self.module,
        )

    @classmethod
    def quantised(cls, weight: Tensor, bias: nn.Parameter | Tensor | None, dtype: torch.dtype) -> nn.Module:
        layer: nn.Module = _layer_class()(dtype, _parameter(weight, dtype), bias)
        return layer

    @classmethod
    def describe(cls, model: Any, dtype: torch.dtype, left: list[str]) -> None:
        from transformers import BitsAndBytesConfig

        model.config.quantization_config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=left or None,
        )

    @classmethod
    def stored_bytes(cls, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Half a byte a weight, a byte of scale for each 64 of them, a float32 for each 256 of these scales; then two
        tables and an offset."""
        count = shape[0] * shape[1]
        blocks = -(-count // BLOCKSIZE)
        return -(-count // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)


def _state(module: nn.Module) -> Any:
    """bitsandbytes' record of how the weight was quantised; kept at the layer too, where the weight may have lost
    it."""
    return getattr(module.weight, "quant_state", None) or module.quant_state


def _scales(state: Any) -> Tensor:
    """One float32 scale a block."""
    scales: Tensor = state.absmax
    if state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        scales = (dequantize_blockwise(scales, state.state2) + state.offset).float()
    return scales


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
    *,
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
    recorded = {
        "shape": weight.shape,
        "dtype": dtype,
        "blocksize": blocksize,
        "code": get_4bit_type(quant_type, device=weight.device),
        "quant_type": quant_type,
    }
    if nested:
        offset = scales.mean()
        scales, blocks = quantize_blockwise(scales - offset, blocksize=256)
        recorded |= {"offset": offset, "state2": blocks}
    state = QuantState(absmax=scales, **recorded)
    if module is not None:
        module.quant_state = state
    parameter: nn.Parameter = Params4bit(
        stored,
        requires_grad=False,
        quant_state=state,
        blocksize=blocksize,
        compress_statistics=nested,
        quant_type=quant_type,
        module=module,
        bnb_quantized=True,
    )
    return parameter


@cache
def _layer_class() -> Any:
    from bitsandbytes.nn import Linear4bit

    class NF4Linear(Linear4bit):
        """bitsandbytes' 4-bit layer, which here multiplies with its dequantised weight."""

        __qualname__ = "NF4Linear"

        def __init__(self, dtype: torch.dtype, weight: nn.Parameter, bias: Tensor | None) -> None:
            state = weight.quant_state  # type: ignore[attr-defined]
            out_features, in_features = state.shape
            super().__init__(  # type: ignore[no-untyped-call]
                in_features, out_features, bias=False, compute_dtype=dtype, quant_type=state.quant_type, device="meta"
            )
            self.weight, self.bias, self.quant_state = weight, bias, state  # type: ignore[assignment]
            weight.module = self  # type: ignore[attr-defined]

        def forward(self, x: Tensor) -> Tensor:
            return NF4Base(self).multiply(x)

    return NF4Linear


def __getattr__(name: str) -> Any:
    """``NF4Linear`` is made when it is first asked for (by ``quantised``, or by pickle): to derive from bitsandbytes'
    layer takes bitsandbytes."""
    if name == "NF4Linear":
        return _layer_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
