"""Whether a request can be answered at all, and how many tokens it may write."""

from __future__ import annotations

import math

from trimtab.serving.requests import BadRequest, Limits, Request, TooLong

_NEW_TOKENS = 4096  # where neither the request, the server nor the model knows a limit


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
    length = len(asked.prompt)
    most = min((one for one in (positions, limits.tokens, limits.batch_tokens) if one is not None), default=None)
    if most is None:
        return count or _NEW_TOKENS
    if length >= most:
        raise TooLong(
            f"the prompt has {length:,} tokens, and {most:,} are the most for a prompt and its answer; shorten it"
        )
    return min(count or most, most - length)
