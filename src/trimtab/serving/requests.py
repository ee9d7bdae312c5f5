"""What the engine is asked, what it answers, and what it counts: the words between the engine and the HTTP server.

ticket = engine.submit(Request("legal", prompt=ids, max_new_tokens=64, stop=("\\n\\n",)))
for piece in ticket:                  # or: async for piece in ticket
    print(piece.text, end="")
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from trimtab.errors import TrimtabError

FinishReason = Literal["stop", "length", "time", "cancelled"]
"""Why an answer is over: an end token or a stop string; the limit of tokens, or the model's last position; the limit of
time; or the client, or the server's own end."""


class ServingError(TrimtabError):
    """A request cannot be answered; the message says why.

    ServingError
     |- BadRequest        a number or a text in the request is not what it can be
     |   `- TooLong       it has more tokens than the model or the server takes
     |- UnknownModel      there is no model of that name
     |- QueueFull         too many requests wait already: come again
     |- OutOfTime         its time was over before its first token
     |- RequestFailed     the model failed at it, or its adapter could not be read
     `- EngineClosed      the engine is closing, closed, or broken
    """


class BadRequest(ServingError):  # noqa: N818 -- the words of HTTP
    """A number or a text in the request is not what it can be."""


class TooLong(BadRequest):
    """It has more tokens than the model, or the server, takes."""


class UnknownModel(ServingError):  # noqa: N818
    """There is no model of that name."""


class QueueFull(ServingError):  # noqa: N818
    """Too many requests wait already."""


class OutOfTime(ServingError):  # noqa: N818
    """The request's time was over before its first token was written."""


class RequestFailed(ServingError):  # noqa: N818
    """The model failed at this request, or at the batch that it was in; others may go well."""


class EngineClosed(ServingError):  # noqa: N818
    """The engine is closing, closed, or broken, and takes no more requests."""


@dataclass(frozen=True)
class Request:
    """What a model is asked to go on from, and how its tokens are chosen.

    Attributes:
        model: a name out of ``Engine.models()``.
        prompt: the tokens to go on from, at least one.
        max_new_tokens: the longest answer; None: up to the model's last position or the server's limit.
        temperature: 0 takes the likeliest token, always; higher is freer.
        top_p: above temperature 0, only the likeliest tokens that have this share together are drawn from.
        top_k: above temperature 0, only so many of the likeliest tokens are drawn from; 0: all.
        seed: of the draws. The answer does not depend on who else is in the batch, up to rounding. None: by chance.
        stop: texts before which the answer ends; they are not part of it.
        logprobs: None for none; else the chosen tokens' log-probabilities come along, and those of so many of the
            likeliest tokens at each place. They are the model's own, whatever the temperature.
        ignore_end: go on over end tokens, up to the limit (to measure speed).
        seconds: the time the request may take in all; None: the server's limit.
        same_text: the answer goes on in the text of the prompt, so that a space at its beginning is part of it; else it
            is a text of its own.
        spaces: so many that the prompt's text ends with are none of its tokens, since a word has its own; as many are
            left out where the answer begins.
    """

    model: str
    prompt: tuple[int, ...]
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_end: bool = False
    seconds: float | None = None
    same_text: bool = False
    spaces: int = 0


@dataclass(frozen=True)
class Likely:
    """A token that could come, and its log-probability. ``raw``: its bytes, where ``text`` is but a part of a character
    (then it shows ``\\ufffd``)."""

    token: int
    text: str
    raw: bytes
    logprob: float


@dataclass(frozen=True)
class Chosen(Likely):
    """The token that was taken, and the likeliest ones at its place, the likeliest first. ``offset``: where its text
    begins in the answer's."""

    top: tuple[Likely, ...] = ()
    offset: int = 0


@dataclass(frozen=True)
class Piece:
    """A part of an answer, as soon as it is sure. Joined, the texts are the whole answer, which never ends inside of a
    character, and never shows a part of a stop string that comes.

    Attributes:
        text: new text; it may be empty in the last piece.
        chosen: the tokens that the text came from, if the request asks for log-probabilities.
        finish_reason: in the last piece; None in all others.
        prompt_tokens: how many tokens were read.
        completion_tokens: how many were written so far, an end token among them.
    """

    text: str
    chosen: tuple[Chosen, ...] = ()
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Model:
    """What can be asked under a name.

    Attributes:
        name: under which it is asked.
        adapter: whether it is an adapter; else the bare model.
        folder: where it was read from.
        since: seconds since 1970 when it was added.
        loaded: whether its tensors are in memory now; the bare model's always are.
        nbytes: what its tensors take there, as far as that is known.
    """

    name: str
    adapter: bool
    folder: str
    since: float
    loaded: bool = True
    nbytes: int = 0


@dataclass(frozen=True)
class Limits:
    """What the engine takes on.

    Attributes:
        rows: requests that are answered at one time, in one batch.
        queue: requests that may wait beside them.
        tokens: most tokens of a prompt and its answer together; None: the model's positions.
        batch_tokens: most tokens, prompts and answers together, of all rows at one time: what bounds the memory of
            their caches. A request that would go beyond waits, and one that alone is above is refused.
        seconds: of one request, from its submission to its last token; None: no limit.
        adapters: most adapters in memory at one time; None: all that there are.
        adapter_bytes: most bytes of all adapters in memory together; None: no limit.
        grace: seconds that running requests get to finish when the engine is closed.
    """

    rows: int = 16
    queue: int = 128
    tokens: int | None = None
    batch_tokens: int | None = None
    seconds: float | None = None
    adapters: int | None = None
    adapter_bytes: int | None = None
    grace: float = 10.0


@dataclass(frozen=True)
class Histogram:
    """Observations by size: ``counts[i]`` of them are at most ``bounds[i]`` (and above the bound before), and the last
    count is of those above all bounds."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True)
class Stats:
    """The engine at one moment.

    Attributes:
        state: ``ready``; ``closing``, once ``close`` was called; ``closed``; ``broken``, after it could not go on.
        queued: requests that wait.
        running: requests that are being answered.
        prompt_tokens, completion_tokens: all that were read and written so far.
        tokens_per_second: written in the last ten seconds or so, per second.
        finished: how many requests ended, by finish reason, and ``error`` for those that failed.
        refused: how many were not taken, by what was raised, such as ``QueueFull``.
        steps: passes of the model so far.
        first_token: seconds from submission to the first token.
        duration: seconds from submission to the end.
        adapters_known, adapters_loaded, adapter_bytes: how many there are, how many of them in memory, and their bytes.
        adapter_loads, adapter_evictions: how often one was read from its folder, and how often one left memory.
    """

    state: Literal["ready", "closing", "closed", "broken"]
    queued: int
    running: int
    prompt_tokens: int
    completion_tokens: int
    tokens_per_second: float
    finished: dict[str, int]
    refused: dict[str, int]
    steps: int
    first_token: Histogram
    duration: Histogram
    adapters_known: int
    adapters_loaded: int
    adapter_bytes: int
    adapter_loads: int
    adapter_evictions: int
    notes: tuple[str, ...] = field(default=())
    """What a user should know, such as that rows of this model cannot share a batch."""
