"""The parallel adapter block: a bottleneck MLP beside a block (He et al. 2022, arXiv 2110.04366, section 3.3).

    h' = h + s (up . act(down . x + down_bias) + up_bias)        x [..., in], h [..., out]: the block's input and output

The paper's scaled parallel adapter stands beside the MLP of each layer (``match: "*.mlp"`` in a Llama).
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from trimtab.bases import BlockBase
from trimtab.errors import SurgeryError
from trimtab.methods import _block


class Options(_block.BlockOptions):
    """What the parallel form can be told."""

    scale: float = Field(4.0, gt=0, description="s: what the update is multiplied by. The paper's best: 4.")


class ParallelAdapter(_block.BlockMethod):
    """``down [bottleneck, in]``, ``down_bias``, ``up [out, bottleneck]`` and ``up_bias``, for a block that takes
    ``[..., in]`` and gives ``[..., out]``."""

    options_type = Options
    options: Options

    def __init__(self, base: BlockBase, options: Options) -> None:
        super().__init__(base, options, (options.width, options.width) if options.width else base.shape)

    def forward(self, x: Tensor | None, h: Tensor) -> Tensor:
        if x is None:
            raise SurgeryError(
                "a parallel adapter block found no input beside which to stand: the block was called without a tensor "
                "as its first argument. Match another block, or use method serial"
            )
        return torch.add(h, self.update(x, h).to(h.dtype), alpha=self.options.scale)
