"""DoRA: LoRA on the direction, and a trained magnitude (Liu et al. 2024, arXiv 2402.09353, sections 4.1 and 4.3).

    W' = m * (W + s B A) / ||W + s B A||        m starts at ||W||, the norm is a constant in the backward pass

It is LoRA with the magnitude switched on; the two share their code and their options.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from trimtab.methods import lora


class Options(lora.Options):
    """What DoRA can be told: LoRA's options, with the magnitude always on."""

    magnitude: Literal[True] = Field(True, description="Always on: without a magnitude the method is called lora.")

    def said(self) -> dict[str, Any]:
        """As for LoRA, without the magnitude, about which there is no choice."""
        return self.model_dump(exclude_unset=True, exclude={"magnitude"})


class DoRA(lora.LoRA):
    """``A [rank, in]``, ``B [out, rank]`` and ``magnitude`` (``[out]``, or ``[in]`` for ``magnitude_axis: input``)."""

    options_type = Options
