"""One request while it is answered: which token comes next, what text that is, and whether it is the end."""

from __future__ import annotations

import random
import time
from collections.abc import Collection
from typing import Any

from torch import Tensor

from trimtab.data.detokenizer import Detokenizer, before_stops
from trimtab.serving.requests import Chosen, FinishReason, Likely, OutOfTime, Piece, RequestFailed
from trimtab.serving.sampling import draw
from trimtab.serving.ticket import Ticket

_SPACE = "\u2581"  # how SentencePiece writes a space


class Row:
    """A request in the queue and in the batch.

    Args:
        ticket: where its pieces go.
        adapter: the adapter that it goes through; None: the bare model.
        tokenizer: whose text the tokens are.
        ends: tokens that end an answer.
        stops: texts before which it ends.
        limit: most new tokens.
        seconds: that it may take from now; None: any number.
    """

    def __init__(
        self,
        ticket: Ticket,
        adapter: str | None,
        tokenizer: Any,
        *,
        ends: Collection[int],
        stops: Collection[str],
        limit: int,
        seconds: float | None,
    ) -> None:
        self.ticket, self.request, self.adapter = ticket, ticket.request, adapter
        self.limit, self.ids = limit, [*ticket.request.prompt]
        self.submitted = time.monotonic()
        self.first_token: float | None = None
        self.over: FinishReason | None = None
        self.failed: Exception | None = None
        self._deadline = None if seconds is None else self.submitted + seconds
        self._ends, self._stops = frozenset(ends), stops
        before = self.request.prompt if self.request.same_text else ()
        self._tokenizer, self._text = tokenizer, Detokenizer(tokenizer, ends, before)
        self._numbers = random.Random(self.request.seed)
        self._held, self._length = "", 0  # text that may be the beginning of a stop string; all that came before it
        self._spaces = self.request.spaces  # that are left out yet
        self._chosen: list[Chosen] = []  # tokens that were not told yet

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt)

    @property
    def written(self) -> int:
        """How many tokens it has written."""
        return len(self.ids) - self.prompt_tokens

    @property
    def most_tokens(self) -> int:
        """How many tokens it may come to, prompt and answer."""
        return self.prompt_tokens + self.limit

    @property
    def is_over(self) -> bool:
        return self.over is not None or self.failed is not None

    def choose(self, logits: Tensor, best: int) -> None:
        """Take the next token by ``logits`` [vocabulary], of which ``best`` is the greatest, and tell what text is
        sure. The row may be over then."""
        asked, token = self.request, best
        if asked.temperature > 0:
            number = self._numbers.random()
            token = draw(logits, number, temperature=asked.temperature, top_p=asked.top_p, top_k=asked.top_k)
        self.ids.append(token)
        if self.first_token is None:
            self.first_token = time.monotonic()
        ends = token in self._ends and not asked.ignore_end
        if asked.logprobs is not None and not ends:
            self._chosen.append(self._likely(logits, token, asked.logprobs))
        if ends:
            self._tell(self._text.finish(), "stop")
        elif self.written >= self.limit:
            self._tell(self._text.add(token) + self._text.finish(), "length")
        else:
            self._tell(self._text.add(token), None)

    def check(self) -> bool:
        """End the row if its client has left or its time is over; whether it is over."""
        if not self.is_over:
            if self.ticket.cancelled:
                self.cut("cancelled")
            elif self._deadline is not None and time.monotonic() > self._deadline:
                if self.written:
                    self.cut("time")
                else:
                    waited = time.monotonic() - self.submitted
                    self.fail(OutOfTime(f"no token came within {waited:.1f} s: the server has too much to do"))
        return self.is_over

    def cut(self, reason: FinishReason) -> None:
        """End the row as it is."""
        if not self.is_over:
            self._tell(self._text.finish(), reason)

    def fail(self, error: Exception) -> None:
        """End the row with an error."""
        if not self.is_over:
            self.failed = error
            self.ticket.put(error)

    def _tell(self, text: str, over: FinishReason | None) -> None:
        """Tell ``text`` with what was held back, up to a stop string, or to what may become one."""
        if self._spaces and text:
            left = text.lstrip(" ")
            text, self._spaces = text[min(self._spaces, len(text) - len(left)) :], 0
        self._held += text
        sure, stopped = before_stops(self._held, self._stops, last=over is not None)
        over = "stop" if stopped else over
        told, self._held = self._held[:sure], self._held[sure:]
        self._length += sure
        # Tokens of a stop string are told as little as its text.
        chosen = tuple(one for one in self._chosen if one.offset < self._length or (over and not stopped))
        self._chosen = [one for one in self._chosen if one.offset >= self._length]
        self.over = over
        if told or over:
            counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.written}
            self.ticket.put(Piece(told, chosen, over, **counts))

    def _likely(self, logits: Tensor, token: int, count: int) -> Chosen:
        said = logits.float().log_softmax(-1)
        values, ids = said.topk(min(count, said.shape[-1]))
        top = [self._as_said(one, value) for one, value in zip(ids.tolist(), values.tolist(), strict=True)]
        own = self._as_said(token, float(said[token]))
        offset = self._length + len(self._held)
        return Chosen(own.token, own.text, own.raw, own.logprob, top=tuple(top), offset=offset)

    def _as_said(self, token: int, logprob: float) -> Likely:
        text = token_text(self._tokenizer, token, first=not self._text.began)
        return Likely(token, text, token_bytes(self._tokenizer, token, text), logprob)


def take(rows: list[Row], logits: Tensor) -> None:
    """Let each row choose by its own of ``logits`` [rows, vocabulary]. A row whose logits are no numbers, or whose
    tokens are no text, fails, and no other."""
    best = logits.max(-1)
    values, tokens = best.values.tolist(), best.indices.tolist()
    for row, own, value, token in zip(rows, logits, values, tokens, strict=True):
        if value != value or value in (float("inf"), float("-inf")):
            row.fail(
                RequestFailed("the model computed NaN or infinity for this request, so there is no likeliest token")
            )
            continue
        try:
            row.choose(own, token)
        except Exception as error:  # such as a tokenizer's, at a token that it does not know
            row.fail(RequestFailed(f"the text of this request's answer cannot be told: {error!r}"))


def token_text(tokenizer: Any, token: int, *, first: bool) -> str:
    """The text of a token; ``first``: where a text begins, at which some decoders drop a space."""

    def decoded(*tokens: int) -> str:
        return str(tokenizer.decode([*tokens], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    text = decoded(token)
    if first or text.startswith(" ") or not (tokenizer.convert_ids_to_tokens(token) or "").startswith(_SPACE):
        return text
    return decoded(token, token).removeprefix(text)


def token_bytes(tokenizer: Any, token: int, text: str) -> bytes:
    """The bytes of a token, which may be a part of a character."""
    if "\ufffd" not in text:
        return text.encode()
    piece = tokenizer.convert_ids_to_tokens(token) or ""
    if piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:-1], 16)])
    if piece and all(one in _BYTES for one in piece):
        return bytes(_BYTES[one] for one in piece)
    return text.encode()


def _byte_signs() -> dict[str, int]:
    """The signs by which byte-level tokenizers write bytes (GPT-2): printable ones stand for themselves, and the others
    for the signs from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + at): byte for at, byte in enumerate(others)}}


_BYTES = _byte_signs()
