"""What the adapter blocks share: a bottleneck MLP on a hidden state.

    f(h) = up . act(down . h + down_bias) + up_bias        down [bottleneck, in], up [out, bottleneck]

``up`` and both biases are zero at the start, so that f is, too; ``down`` is drawn as LoRA's A is in the ecosystem. It
cannot be folded into a weight, since the activation stands between its two products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from trimtab.bases import BlockBase
from trimtab.errors import SurgeryError
from trimtab.methods import _method
from trimtab.ops.dropout import dropout

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


class BlockOptions(_method.Options):
    """What an adapter block can be told."""

    bottleneck: int = Field(
        64,
        ge=1,
        description="Features between the two projections: higher learns more and costs more. (The hidden size over "
        "it is what some call the reduction factor.)",
    )
    activation: Literal["relu", "gelu", "silu"] = Field("relu", description="The nonlinearity between the projections.")
    width: int | None = Field(
        None, ge=1, description="Features of the hidden state. Default: read off the block's linear layers."
    )


class BlockMethod(_method.Method):
    """``down [bottleneck, in]``, ``down_bias [bottleneck]``, ``up [out, bottleneck]`` and ``up_bias [out]``.

    A method file defines ``forward(x, h)``: what becomes of the block's output ``h [..., out]``, given its input ``x``,
    which is None where the call had none.
    """

    sits_on = "block"
    options_type = BlockOptions
    options: BlockOptions
    rate_groups: Mapping[str, _method.RateGroup] = {"down_bias": "bias", "up_bias": "bias"}

    def __init__(self, base: BlockBase, options: BlockOptions, shape: tuple[int, int]) -> None:
        super().__init__(base, options, shape)

        def zeros(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(size, dtype=self.dtype, device=base.device))

        self.down = zeros(options.bottleneck, self.in_features)
        self.down_bias = zeros(options.bottleneck)
        self.up = zeros(self.out_features, options.bottleneck)
        self.up_bias = zeros(self.out_features)
        self.start("down", self.down.detach())

    def start(self, name: str, tensor: Tensor) -> None:
        if name == "down":
            nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
        else:
            super().start(name, tensor)

    def update(self, h: Tensor, output: Tensor) -> Tensor:
        """``f(h) [..., out]``, computed in the dtype of ``h``, to be added to ``output``.

        Raises SurgeryError if either is not as wide as this adapter was made for.
        """
        if (output.shape[-1], h.shape[-1]) != (self.out_features, self.in_features):
            raise SurgeryError(
                f"an adapter block made for hidden states of {self.in_features} -> {self.out_features} features met "
                f"{h.shape[-1]} -> {output.shape[-1]}. Set 'width' on its rule to what the block gives"
            )
        if self.options.dropout and self.training:
            h = dropout(h, self.options.dropout)
        narrow = F.linear(h, self.down.to(h.dtype), self.down_bias.to(h.dtype))
        active = _ACTIVATIONS[self.options.activation](narrow)
        return F.linear(active, self.up.to(h.dtype), self.up_bias.to(h.dtype))
