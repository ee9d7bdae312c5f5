"""The serial adapter block: a bottleneck MLP behind a block (Houlsby et al. 2019, arXiv 1902.00751, section 2.1).

    h' = h + up . act(down . h + down_bias) + up_bias        h [..., out]: the block's output

The paper puts one behind the attention and one behind the MLP of each layer, before the residual connection:
``match: ["*.self_attn", "*.mlp"]`` in a Llama. It also trains the layer norms, and draws ``up`` near zero; here ``up``
is zero. It lengthens the path through the model: two more products wait for each block, in training and at inference.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from trimtab.bases import BlockBase
from trimtab.methods import _block


class Options(_block.BlockOptions):
    """What the serial form can be told."""

    activation: Literal["relu", "gelu", "silu"] = Field(
        "gelu", description="The nonlinearity between the projections; gelu as in the authors' code."
    )


class SerialAdapter(_block.BlockMethod):
    """``down [bottleneck, out]``, ``down_bias``, ``up [out, bottleneck]`` and ``up_bias``, for a block that gives
    ``[..., out]``."""

    options_type = Options

    def __init__(self, base: BlockBase, options: Options) -> None:
        width = options.width or base.shape[0]
        super().__init__(base, options, (width, width))

    def forward(self, x: Tensor | None, h: Tensor) -> Tensor:
        return h + self.update(h, h)
