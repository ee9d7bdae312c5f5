"""Open answers: what does the model write, and is it the right answer?

Generation is greedy and follows nothing but the model's logits: sampling, penalties and limits that came with the model
are put aside. It stops at an end token or after a number of tokens.

Rows are generated together, padded on the left. In another batch the same row is rounded otherwise, and where two
tokens are as good as equal that would decide which is written. So at such a step the row's logits are computed once
more from its tokens alone, unpadded and without a cache; hence what is written does not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from trimtab.data.batches import by_length
from trimtab.data.rows import Example
from trimtab.data.tokens import encode_prompt
from trimtab.errors import DataError
from trimtab.surgery.serving import evaluating
from trimtab.tasks import Head


@dataclass(frozen=True)
class Generated:
    """What the model wrote after one prompt.

    Attributes:
        text: without special tokens and outer white space.
        usable: whether it is not empty and came to an end before the limit of tokens.
    """

    text: str
    usable: bool


def same_answer(one: str, other: str) -> bool:
    """Exact match, except for the amount of white space and for upper and lower case."""
    return one.casefold().split() == other.casefold().split()


def generate_answers(
    head: Head,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    max_length: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Generated]:
    """Generate an answer to the prompt of each example.

    Args:
        head: the model.
        tokenizer: its fast tokenizer.
        examples: rows with a prompt.
        max_new_tokens: the limit; an answer that reaches it without an end token is not usable.
        batch_size: rows generated together; decides nothing but speed.
        max_length: most tokens of a prompt and ``max_new_tokens``; longer prompts lose their beginning.
        progress: called with the number of rows done and of all rows.

    Raises:
        DataError: a prompt is empty, or ``max_length`` leaves no room for one.
    """
    prefix = len(encode_prompt("", tokenizer))
    prompts = [_prompt(example, tokenizer, prefix, max_length, max_new_tokens) for example in examples]
    ends = end_tokens(head.model, tokenizer)
    found: list[Generated | None] = [None] * len(prompts)
    done = 0
    with evaluating(head.model):
        for batch in by_length([len(ids) + max_new_tokens for ids in prompts], batch_size):
            written = _generate(head, [prompts[index] for index in batch], ends, max_new_tokens)
            for index, ids in zip(batch, written, strict=True):
                ended = ids[-1:] != [] and ids[-1] in ends
                text = tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True).strip()
                found[index] = Generated(text, ended and text != "")
            done += len(batch)
            if progress is not None:
                progress(done, len(prompts))
    return [answer for answer in found if answer is not None]


def _prompt(example: Example, tokenizer: Any, prefix: int, max_length: int | None, max_new_tokens: int) -> list[int]:
    ids = encode_prompt(example.prompt, tokenizer)
    place = f"{example.source}, row {example.number}"
    if not ids:
        raise DataError(f"{place}: the prompt is empty, so there is nothing to answer; give the row a prompt.")
    if max_length is None:
        return ids
    room = max_length - max_new_tokens
    if room <= prefix:
        raise DataError(
            f"{place}: {max_new_tokens} new tokens leave no room for a prompt in {max_length} tokens; allow fewer."
        )
    excess = max(0, len(ids) - room)
    return ids[:prefix] + ids[prefix + excess :]


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokenizer's end token, which training puts after an answer, and the model's own, such as a chat's."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({int(token) for token in [tokenizer.eos_token_id, *own] if token is not None})


def _generate(head: Head, prompts: list[list[int]], ends: list[int], max_new_tokens: int) -> list[list[int]]:
    """The new tokens of each prompt, up to and with its first end token."""
    model = head.model
    fill = ends[0] if ends else 0
    ids, mask = _padded_left(prompts, fill, model.get_input_embeddings().weight.device)
    settled = LogitsProcessorList([_SettleTies(head, prompts, ids.shape[1], set(ends))])
    new = greedy(model, ids, mask, max_new_tokens=max_new_tokens, ends=ends, processors=settled)
    return [_until_end(row, set(ends)) for row in new.tolist()]


def _padded_left(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 ids ``[rows, longest]`` and their mask (1 where there is a token), to generate from."""
    width = max(map(len, rows))
    ids = [[*[fill] * (width - len(row)), *row] for row in rows]
    mask = [[*[0] * (width - len(row)), *[1] * len(row)] for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def greedy(
    model: Any,
    ids: Tensor,
    mask: Tensor,
    *,
    max_new_tokens: int,
    ends: Sequence[int] = (),
    processors: LogitsProcessorList | None = None,
) -> Tensor:
    """What ``model`` writes by its logits alone: ``[rows, at most max_new_tokens]``, filled up after an end token.

    Args:
        model: a transformers causal language model; its own settings of generation are put aside for the while.
        ids: ``[rows, tokens]``, padded on the left.
        mask: of the same shape, 1 where there is a token.
        max_new_tokens: the limit.
        ends: tokens that end a row; none: every row is written up to the limit.
        processors: change the logits before the best is taken.
    """
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
    )
    # What this leaves open, generate() would fill in from the model's own settings, its penalties among them.
    kept, model.generation_config = model.generation_config, config
    hook = model.get_output_embeddings().register_forward_pre_hook(_contiguous)
    try:
        output: Tensor = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=processors
        )
    finally:
        hook.remove()
        model.generation_config = kept
    return output[:, ids.shape[1] :]


def _contiguous(_head: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The output head's input in one piece.

    After a prompt it is a slice, the last position of each row. From a slice and a frozen weight ``linear`` makes a
    batched product, with a copy of the weight for every row: 57 MB each in SmolLM2-135M.
    """
    return given[0].contiguous(), *given[1:]


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    stop = next((at + 1 for at, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


class _SettleTies(LogitsProcessor):
    """Replaces the logits of a row whose best two tokens are as good as equal by those of the row alone."""

    def __init__(self, head: Head, prompts: list[list[int]], width: int, ends: set[int]) -> None:
        self.head, self.prompts, self.width, self.ends = head, prompts, width, ends
        self.margin = head.tie_margin

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        best = scores.topk(2).values
        for row in (best[:, 0] - best[:, 1] < self.margin).nonzero().flatten().tolist():
            written = input_ids[row, self.width :].tolist()
            if self.ends.isdisjoint(written):
                alone = torch.tensor([self.prompts[row] + written], device=input_ids.device)
                last = torch.tensor([alone.shape[1] - 1], device=input_ids.device)
                scores[row] = self.head.logits_at(alone, last)[0].to(scores.dtype)
        return scores
