"""Whether a request can be answered at all, and how many tokens it may write."""

from __future__ import annotations

import math
from typing import Any

from trimtab.data.tokens import encode_prompt
from trimtab.serving.requests import BadRequest, Limits, Request, TooLong

_NEW_TOKENS = 4096  # where neither the request, the server nor the model knows a limit
_CHARACTERS = 16  # of one token, at most, in all texts but odd ones
_AT_THE_CUT = 64  # tokens that may be others where a text ends in its middle


def most_tokens(limits: Limits, positions: int | None) -> int | None:
    """How many tokens a prompt and its answer may have together; None: any number."""
    return min((one for one in (positions, limits.tokens, limits.batch_tokens) if one is not None), default=None)


def encoded(text: str, tokenizer: Any, most: int | None) -> list[int]:
    """The tokens of a prompt, as in training. A text that has far more than ``most`` of them is read no further than it
    takes to know that.

    Raises TooLong for such a text, and BadRequest for one without any token.
    """
    length = _CHARACTERS * (most or len(text))
    while most is not None and length < len(text):
        if len(encode_prompt(text[:length], tokenizer)) > most + _AT_THE_CUT:
            raise _too_long(f"more than {most:,}", most)
        length *= 4
    if not (ids := encode_prompt(text, tokenizer)):
        raise BadRequest("the prompt is empty: there is nothing to go on from")
    return ids


def new_tokens_allowed(asked: Request, limits: Limits, *, vocabulary: int, positions: int | None) -> int:
    """How many tokens the answer may have: what is asked for, as far as the model's positions and the server's limits
    go. Raises BadRequest, or TooLong where not even one token has room."""
    count = asked.max_new_tokens
    wrong = [
        (not asked.prompt, "prompt: there are no tokens to go on from"),
        (
            not all(0 <= one < vocabulary for one in asked.prompt),
            f"prompt: expected tokens from 0 to {vocabulary - 1:,}",
        ),
        (count is not None and count < 1, f"max_new_tokens: expected at least 1, got {count}"),
        (not 0 <= asked.temperature < math.inf, f"temperature: expected a number from 0 on, got {asked.temperature}"),
        (not 0 < asked.top_p <= 1, f"top_p: expected a number above 0 and up to 1, got {asked.top_p}"),
        (asked.top_k < 0, f"top_k: expected 0 (all) or more, got {asked.top_k}"),
        (asked.logprobs is not None and asked.logprobs < 0, f"logprobs: expected 0 or more, got {asked.logprobs}"),
        (not all(asked.stop), "stop: an empty text is found everywhere; leave it out"),
        (asked.seconds is not None and not asked.seconds > 0, f"seconds: expected some, got {asked.seconds}"),
    ]
    for is_wrong, message in wrong:
        if is_wrong:
            raise BadRequest(message)
    length, most = len(asked.prompt), most_tokens(limits, positions)
    if most is None:
        return count or _NEW_TOKENS
    if length >= most:
        raise _too_long(f"{length:,}", most)
    return min(count or most, most - length)


def _too_long(length: str, most: int) -> TooLong:
    return TooLong(f"the prompt has {length} tokens, and {most:,} are the most for a prompt and its answer; shorten it")
