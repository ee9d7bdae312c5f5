"""Encoded rows become padded batches. Rows of similar length share a batch, which keeps the padding small."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler

from trimtab.data.rows import EncodedRow
from trimtab.models.causal_head import IGNORED, label_positions

TOKENS = 8192
"""Most tokens, padding included, of a batch that is evaluated, however many rows the caller allows."""

MEGA = 50
"""Batches whose rows are sorted by length together: enough to save padding, and few enough that the order of the rows
stays random."""


@dataclass(frozen=True)
class Collator:
    """Pads rows on the right to the longest of the batch, and returns int64 tensors ``[rows, tokens]`` by name.

    By default there is no attention mask: no token of a causal model attends to padding on its right.

    Attributes:
        pad_id: the token that fills ``input_ids``; labels are filled with -100.
        multiple_of: round the width up to a multiple of this.
        mask: add ``attention_mask`` (1 where there is a token), for models that are not causal and for generation.
        prompts: add ``prompt_labels``: labels for the tokens that carry no loss, except the first of each row.
        positions: add ``label_positions`` (and ``prompt_positions``): where these are (`label_positions`).
    """

    pad_id: int
    multiple_of: int = 1
    mask: bool = False
    prompts: bool = False
    positions: bool = False

    def __call__(self, rows: Sequence[EncodedRow]) -> dict[str, torch.Tensor]:
        lengths = [len(row["input_ids"]) for row in rows]
        width = -(-max(lengths) // self.multiple_of) * self.multiple_of
        ids = torch.full((len(rows), width), self.pad_id, dtype=torch.int64)
        labels = torch.full((len(rows), width), IGNORED, dtype=torch.int64)
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            ids[index, :length] = torch.as_tensor(row["input_ids"])
            labels[index, :length] = torch.as_tensor(row["labels"])
        batch = {"input_ids": ids, "labels": labels}
        if self.mask or self.prompts:
            filled = torch.arange(width) < torch.tensor(lengths)[:, None]
        if self.mask:
            batch["attention_mask"] = filled.long()
        if self.prompts:
            batch["prompt_labels"] = torch.where(filled & (labels == IGNORED), ids, IGNORED)
            batch["prompt_labels"][:, 0] = IGNORED
        if self.positions:
            batch["label_positions"] = label_positions(labels)
            if self.prompts:
                batch["prompt_positions"] = label_positions(batch["prompt_labels"])
        return batch


class LengthGroupedBatches(Sampler[list[int]]):
    """Batches of row indices, grouped by length and shuffled anew each epoch, for ``DataLoader(batch_sampler=...)``.

    Every epoch has each row once. Rows are shuffled, sorted by length within groups of ``MEGA`` batches, cut into
    batches, and the batches are shuffled. In epoch 0 the batch with the most padded tokens comes first, so that a lack
    of memory shows at once. The order depends on ``seed`` and the epoch alone, so a run resumes by setting the epoch
    and skipping the batches that are done, as transformers' Trainer does.

    Args:
        lengths: tokens of each row.
        batch_size: rows in a batch; the last one may be smaller.
        seed: any integer.
        drop_last: leave that smaller batch out.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0, *, drop_last: bool = False) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, but is {batch_size}")
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0) whose order the next iteration has."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) // self.batch_size if self.drop_last else -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        chance = random.Random(f"{self.seed} {self.epoch}")
        order = list(range(len(self.lengths)))
        chance.shuffle(order)
        batches: list[list[int]] = []
        group = MEGA * self.batch_size
        for start in range(0, len(order), group):
            rows = sorted(order[start : start + group], key=lambda row: self.lengths[row], reverse=True)
            batches += [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]
        if self.drop_last and batches and len(batches[-1]) < self.batch_size:
            batches.pop()
        chance.shuffle(batches)
        if self.epoch == 0 and batches:
            padded = [len(batch) * max(self.lengths[row] for row in batch) for batch in batches]
            batches.insert(0, batches.pop(padded.index(max(padded))))
        return iter(batches)


def by_length(lengths: Sequence[int], batch_size: int, most: int = TOKENS) -> list[list[int]]:
    """Cut row indices into batches, the longest rows first, so that a lack of memory shows at once.

    A batch has at most ``batch_size`` rows, and fewer where it would hold more than ``most`` tokens, but at least one.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, but is {batch_size}")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches: list[list[int]] = []
    while order:
        rows = max(1, min(batch_size, most // max(1, lengths[order[0]])))
        batches.append(order[:rows])
        order = order[rows:]
    return batches
