"""Rows one behind the other in place of padded ones: a batch is a single long row, and nothing of it is padding.

Each row begins at position 0 again. From that transformers' masks know where one ends: no token attends to another
row's. What flash attention wants to know besides, the places where rows begin, goes along where it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from trimtab.data.rows import EncodedRow
from trimtab.models.causal_head import IGNORED, label_positions

LAYOUT = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""The keys of a batch that say how its rows lie in it; the model is called with them."""


@dataclass(frozen=True)
class PackingCollator:
    """Lays rows one behind the other: int64 tensors ``[1, tokens]`` by name, among them ``position_ids``; and
    where the labels are (`label_positions`).

    The first token of a row carries no label: what stands before it is the end of another row.

    Attributes:
        prompts: add ``prompt_labels``: labels for the tokens that carry no loss, except the first of each row.
        flash: add where rows begin and how long the longest is, as flash attention takes it.
    """

    prompts: bool = False
    flash: bool = False

    def __call__(self, rows: Sequence[EncodedRow]) -> dict[str, Any]:
        lengths = [len(row["input_ids"]) for row in rows]
        starts = [0, *accumulate(lengths)]
        ids = torch.cat([torch.as_tensor(row["input_ids"], dtype=torch.int64) for row in rows])
        labels = torch.cat([torch.as_tensor(row["labels"], dtype=torch.int64) for row in rows])
        begin = torch.tensor(starts[:-1])
        batch: dict[str, Any] = {"input_ids": ids[None]}
        if self.prompts:
            prompts = torch.where(labels == IGNORED, ids, IGNORED)
            prompts[begin] = IGNORED
            batch["prompt_labels"], batch["prompt_positions"] = prompts[None], label_positions(prompts[None])
        labels[begin] = IGNORED
        batch["labels"], batch["label_positions"] = labels[None], label_positions(labels[None])
        batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
        if self.flash:
            places = torch.tensor(starts, dtype=torch.int32)
            batch |= {"cu_seq_lens_q": places, "cu_seq_lens_k": places}
            batch |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        return batch
