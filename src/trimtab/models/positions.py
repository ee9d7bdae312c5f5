"""How long a text a model can read.

Some models have a table with a row for each position (GPT-2, OPT), and cannot read past its end. Others turn or bias
their attention by distances (Llama, Bloom): they read a text of any length, if badly where it goes far beyond what they
were trained on.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import nn

from trimtab.surgery.adapted import bare

# MPT makes the biases of so many distances at each pass, and its attention has no more.
_MADE_IN_PASSING = ("mpt",)
# A table may have a few rows more than there are positions; OPT has two.
_SPARE = 8


@dataclass(frozen=True)
class Positions:
    """Of one model.

    Attributes:
        trained: how many it was made for, as its configuration says; None where that says nothing.
        table: how many it has rows for, and cannot read beyond; None where there is no such table.
    """

    trained: int | None = None
    table: int | None = None

    def limit(self, wanted: int | None = None) -> int | None:
        """Most tokens of a text: ``wanted``, as far as the model can read; by default what it was made for, and None
        if that is not known."""
        if wanted is None:
            return self.table or self.trained
        return wanted if self.table is None else min(wanted, self.table)


def positions_of(model: Any) -> Positions:
    """Those of a transformers model, which may be on the meta device."""
    config = model.config.get_text_config()
    said = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    trained = next((value for value in said if isinstance(value, int) and value > 0), None)
    if trained is None:
        return Positions()
    limits = [trained] if config.model_type in _MADE_IN_PASSING else []
    words = words_of(model)
    for module in model.modules():
        is_table = isinstance(module, nn.Embedding) and module is not words
        if is_table and 0 <= module.num_embeddings - trained <= _SPARE:
            # Positions are counted from behind the padding index (RoBERTa).
            before = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(min(trained, module.num_embeddings - before))
        for name, buffer in module._buffers.items():
            # Rotations (GPT-J) or a mask (GPT-Neo) for each position; a cache of them grows where it has to.
            if buffer is not None and buffer.dim() > 1 and trained in buffer.shape and "cache" not in name:
                limits.append(trained)
    return Positions(trained, min(limits, default=None))


def words_of(model: Any) -> nn.Module | None:
    """The embedding of the tokens of ``model``; None for one that has no table of them, as of pictures or Canine."""
    with suppress(NotImplementedError):
        return bare(model.get_input_embeddings())
    return None
