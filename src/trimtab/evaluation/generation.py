"""Lets a model write open answers.

Generation is greedy and uses the model's logits alone; sampling, penalties and limits that came with the model are put
aside. It stops at an end token or after a number of tokens.

Rows are generated in batches, padded on the left. A row is rounded differently in another batch, which could decide
between two tokens that are nearly equal. At such a step the row's logits are computed again from its own tokens,
without padding and cache, so that what is written does not depend on the batch.
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
from trimtab.errors import DataError, ModelError
from trimtab.models.causal_head import Head
from trimtab.models.chat_template import spelled_end, turn_end
from trimtab.processes import divided

STATIC_WIDTH = 64
"""Prompts are filled up to a multiple of so many tokens for a static cache: few sizes, so that little is compiled."""


@dataclass(frozen=True)
class Generated:
    """What the model wrote after one prompt.

    Attributes:
        text: without special tokens and outer white space.
        usable: whether it is not empty and ended before the limit of tokens.
    """

    text: str
    usable: bool


def same_answer(one: str, other: str) -> bool:
    """Whether the two match exactly, apart from upper and lower case and the amount of white space."""
    return one.casefold().split() == other.casefold().split()


def generate_answers(
    head: Head,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    max_length: int | None = None,
    static_cache: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Generated]:
    """Generate an answer to the prompt of each example.

    Called inside ``evaluating(head.model)``.

    Args:
        head: the model.
        tokenizer: its fast tokenizer.
        examples: rows with a prompt.
        max_new_tokens: the limit; an answer that reaches it without an end token is not usable.
        batch_size: rows generated together; it changes the speed and nothing else.
        max_length: most tokens of a prompt and ``max_new_tokens`` together; longer prompts lose their beginning.
        static_cache: see `greedy`.
        progress: called with the number of rows done and of all rows.

    Raises DataError if a prompt is empty, or if ``max_length`` leaves no room for one; ModelError if the model has no
    static cache.
    """
    prefix = len(encode_prompt("", tokenizer))
    prompts = [_prompt(example, tokenizer, prefix, max_length, max_new_tokens) for example in examples]
    ends = end_tokens(head.model, tokenizer)
    spelled = spelled_end(tokenizer)
    answers: dict[int, Generated] = {}

    def write(batch: list[int]) -> Any:
        return _generate(head, [prompts[index] for index in batch], ends, max_new_tokens, static_cache).tolist()

    for batch, written in divided(by_length([len(ids) + max_new_tokens for ids in prompts], batch_size), write):
        for index, new in zip(batch, written, strict=True):
            stop = next((at for at, token in enumerate(new) if token in ends), None)
            text = tokenizer.decode(new[:stop], skip_special_tokens=True).strip().removesuffix(spelled).rstrip()
            answers[index] = Generated(text, stop is not None and text != "")
        if progress is not None:
            progress(len(answers), len(prompts))
    return [answers[index] for index in range(len(prompts))]


def _prompt(example: Example, tokenizer: Any, prefix: int, max_length: int | None, max_new_tokens: int) -> list[int]:
    ids = encode_prompt(example.prompt, tokenizer)
    if not ids:
        raise DataError(f"{example.place}: the prompt is empty, so there is nothing to answer; give the row a prompt.")
    if max_length is None:
        return ids
    room = max_length - max_new_tokens
    if room <= prefix:
        raise DataError(
            f"{example.place}: {max_new_tokens} new tokens leave no room for a prompt in {max_length} tokens; allow "
            "fewer."
        )
    excess = max(0, len(ids) - room)
    return ids[:prefix] + ids[prefix + excess :]


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """All tokens that end an answer: the tokenizer's, which training puts after a text; the one with which the chat
    template ends a turn, which training on conversations teaches; and the model's own."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    turn = turn_end(tokenizer)
    known = [tokenizer.eos_token_id, turn.token if turn is not None else None, *own]
    return sorted({int(token) for token in known if token is not None})


def _generate(head: Head, prompts: list[list[int]], ends: list[int], max_new_tokens: int, static_cache: bool) -> Tensor:
    """The new tokens of each prompt, filled up after its first end token."""
    model = head.model
    place, multiple = model.get_input_embeddings().weight.device, STATIC_WIDTH if static_cache else 1
    ids, mask = padded_left(prompts, ends[0] if ends else 0, place, multiple)
    settled = LogitsProcessorList([_SettleTies(head, prompts, ids.shape[1], set(ends))])
    limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "static_cache": static_cache}
    return greedy(model, ids, mask, ends=ends, processors=settled, **limits)


def padded_left(
    rows: Sequence[Sequence[int]], fill: int, device: torch.device, multiple_of: int = 1
) -> tuple[Tensor, Tensor]:
    """int64 ids ``[rows, longest]`` and their mask (1 where there is a token), to generate from."""
    width = -(-max(map(len, rows)) // multiple_of) * multiple_of
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
    static_cache: bool = False,
) -> Tensor:
    """The tokens ``[rows, at most max_new_tokens]`` that ``model`` writes, filled up after an end token.

    Args:
        model: a transformers causal language model; its own generation settings are put aside meanwhile.
        ids: ``[rows, tokens]``, padded on the left.
        mask: of the same shape, 1 where there is a token.
        max_new_tokens: the limit.
        ends: tokens that end a row; without any, every row is written up to the limit.
        processors: change the logits before the best token is taken.
        static_cache: keep keys and values in tensors of a fixed size. On a GPU transformers then compiles the step of a
            token, and replays it from a CUDA graph.

    Raises ModelError if ``model`` has no such cache.
    """
    if static_cache and not getattr(model, "_can_compile_fullgraph", False):
        raise ModelError(f"evaluation.static_cache: a {type(model).__name__} has no static cache; set it to false")
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        cache_implementation="static" if static_cache else None,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
    )
    # generate() would take everything that this leaves open, such as penalties, from the model's own settings.
    kept, model.generation_config = model.generation_config, config
    hook = model.get_output_embeddings().register_forward_pre_hook(contiguous_input)
    try:
        output: Tensor = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=processors
        )
    finally:
        hook.remove()
        model.generation_config = kept
    return output[:, ids.shape[1] :]


def contiguous_input(_head: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Make the output head's input contiguous.

    After a prompt it is a slice, the last position of each row. From a slice and a frozen weight ``linear`` makes a
    batched product with a copy of the weight for every row, 57 MB each in SmolLM2-135M.
    """
    return given[0].contiguous(), *given[1:]


class _SettleTies(LogitsProcessor):
    """Computes the logits of a row again, from that row alone, where its best two tokens are nearly equal."""

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
