"""What a client gets: answers, pieces of a stream, and errors, in the shapes of OpenAI's API."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.errors import AdapterError, MachineError, TrimtabError
from trimtab.serving import requests
from trimtab.serving.bodies import FieldError
from trimtab.serving.requests import Chosen, Likely, Model, Piece
from trimtab.serving.tool_calls import ToolCall

Json = dict[str, Any]

_REASONS = {"stop": "stop", "length": "length", "tool_calls": "tool_calls", "cancelled": "stop"}


class HttpError(TrimtabError):
    """A refusal with the status that HTTP has for it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> Json:
        """As OpenAI's clients read it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def http_error(error: Exception, *, retry_after: int = 1) -> HttpError:
    """The refusal that ``error`` means. What is none of ours is told without its words, which may quote anything."""
    said = str(error)
    if isinstance(error, HttpError):
        return error
    if isinstance(error, FieldError):
        return HttpError(400, said, param=error.param, code=error.code)
    if isinstance(error, requests.TooLong):
        return HttpError(400, said, code="context_length_exceeded")
    if isinstance(error, requests.UnknownModel):
        return HttpError(404, said, param="model", code="model_not_found")
    if isinstance(error, requests.QueueFull):
        return HttpError(429, said, code="queue_full", headers={"Retry-After": str(retry_after)})
    if isinstance(error, requests.OutOfTime):
        return HttpError(504, said, code="out_of_time")
    if isinstance(error, requests.EngineClosed):
        return HttpError(503, said, code="closing", headers={"Retry-After": str(retry_after)})
    if isinstance(error, requests.RequestFailed | MachineError):
        return HttpError(500, said, code="failed")
    if isinstance(error, AdapterError):
        return HttpError(400, said, param="path", code="bad_adapter")
    if isinstance(error, TrimtabError):
        return HttpError(400, said)
    return HttpError(500, "the server failed at this request; its terminal says more", code="failed")


def model_entry(model: Model, base: str) -> Json:
    """A model in the list of ``/v1/models``."""
    parent = {"parent": base} if model.adapter else {}
    return {"id": model.name, "object": "model", "created": int(model.since), "owned_by": "trimtab", **parent}


def usage(prompt: int, written: int) -> Json:
    """The numbers of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


@dataclass
class Row:
    """One answer as it comes: what has been said, and what is told of its tokens."""

    text: str = ""
    chosen: list[Chosen] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    reason: str | None = None
    prompt_tokens: int = 0
    written: int = 0

    def take(self, piece: Piece) -> None:
        """Count ``piece``; its text is for the caller to add."""
        self.chosen += piece.chosen
        self.reason = piece.finish_reason or self.reason
        self.prompt_tokens, self.written = piece.prompt_tokens, piece.completion_tokens

    @property
    def finish_reason(self) -> str | None:
        """In OpenAI's words."""
        if self.calls and self.reason == "stop":
            return "tool_calls"
        return _REASONS.get(self.reason, self.reason) if self.reason else None


class ChatReply:
    """The shape of a chat's answer, whole or in chunks."""

    def __init__(self, number: str, model: str, *, logprobs: bool) -> None:
        self._number = number
        self._head = {"id": f"chatcmpl-{number}", "created": int(time.time()), "model": model}
        self._logprobs = logprobs

    def whole(self, rows: Sequence[Row], total: Json) -> Json:
        """The body of an answer that does not stream."""
        choices = [
            {
                "index": index,
                "message": self._message(index, row),
                "logprobs": _chat_logprobs(row.chosen) if self._logprobs else None,
                "finish_reason": row.finish_reason,
            }
            for index, row in enumerate(rows)
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": total}

    def _message(self, index: int, row: Row) -> Json:
        message: Json = {"role": "assistant", "content": row.text or (None if row.calls else "")}
        if row.calls:
            message["tool_calls"] = [self._call(index, at, one) for at, one in enumerate(row.calls)]
        return message

    def _call(self, index: int, at: int, call: ToolCall) -> Json:
        number = f"call_{self._number}_{index}_{at}"
        return {"id": number, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}

    def chunk(self, choices: list[Json], total: Json | None, *, with_usage: bool) -> Json:
        """One chunk of a stream."""
        told = {"usage": total} if with_usage else {}
        return {**self._head, "object": "chat.completion.chunk", "choices": choices, **told}

    def first(self, index: int) -> Json | None:
        """What a choice begins with, before anything is said."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def part(self, index: int, row: Row, said: Sequence[str | ToolCall], chosen: Sequence[Chosen]) -> Json | None:
        """What is new in a choice."""
        delta: Json = {}
        if text := "".join(one for one in said if isinstance(one, str)):
            delta["content"] = text
        if calls := [one for one in said if isinstance(one, ToolCall)]:
            first = len(row.calls) - len(calls)
            delta["tool_calls"] = [
                {"index": at, **self._call(index, at, one)} for at, one in enumerate(calls, start=first)
            ]
        logprobs = _chat_logprobs(chosen) if self._logprobs and chosen else None
        if not delta and logprobs is None and row.reason is None:
            return None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": row.finish_reason}


class CompletionReply:
    """The shape of a completion, whole or in chunks."""

    def __init__(self, number: str, model: str, *, logprobs: bool) -> None:
        self._head = {"id": f"cmpl-{number}", "object": "text_completion", "created": int(time.time()), "model": model}
        self._logprobs = logprobs

    def whole(self, rows: Sequence[Row], total: Json) -> Json:
        """The body of an answer that does not stream."""
        choices = [self._choice(index, row, row.text, row.chosen) for index, row in enumerate(rows)]
        return {**self._head, "choices": choices, "usage": total}

    def chunk(self, choices: list[Json], total: Json | None, *, with_usage: bool) -> Json:
        """One chunk of a stream."""
        return {**self._head, "choices": choices, **({"usage": total} if with_usage else {})}

    def first(self, index: int) -> Json | None:
        """Nothing is told before there is any text."""
        return None

    def part(self, index: int, row: Row, said: Sequence[str | ToolCall], chosen: Sequence[Chosen]) -> Json | None:
        """What is new in a choice."""
        text = "".join(one for one in said if isinstance(one, str))
        if not text and not chosen and row.reason is None:
            return None
        return self._choice(index, row, text, chosen)

    def _choice(self, index: int, row: Row, text: str, chosen: Sequence[Chosen]) -> Json:
        logprobs = _completion_logprobs(chosen) if self._logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": row.finish_reason}


Reply = ChatReply | CompletionReply


def _chat_logprobs(chosen: Sequence[Chosen]) -> Json:
    content = [{**_told(one), "top_logprobs": [_told(other) for other in one.top]} for one in chosen]
    return {"content": content, "refusal": None}


def _told(one: Likely) -> Json:
    return {"token": one.text, "logprob": _finite(one.logprob), "bytes": list(one.raw)}


def _completion_logprobs(chosen: Sequence[Chosen]) -> Json:
    tops: list[dict[str, float]] = [{_name(other): _finite(other.logprob) for other in one.top} for one in chosen]
    return {
        "tokens": [_name(one) for one in chosen],
        "token_logprobs": [_finite(one.logprob) for one in chosen],
        "top_logprobs": tops,
        "text_offset": [one.offset for one in chosen],
    }


def _name(one: Likely) -> str:
    """A token as a key: parts of characters are told by their bytes, as OpenAI does, or several would have one name."""
    if "\ufffd" not in one.text:
        return one.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in one.raw)


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for a token that cannot come."""
    return logprob if math.isfinite(logprob) else -9999.0


def event(body: Json | str) -> bytes:
    """A server-sent event."""
    text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"


def encoded(body: Json) -> bytes:
    """A body of JSON. Half a surrogate pair, which cannot be sent, is shown as a question mark."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def quoted_path(path: str) -> str:
    """A path as it stands in an access line, on one line whatever is in it."""
    shown = path if path.isprintable() else ascii(path)[1:-1]
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
