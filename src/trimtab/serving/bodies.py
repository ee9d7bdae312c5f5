"""What a client may ask for, as OpenAI's clients write it: read strictly, and what we cannot do is refused in words.

Fields that other servers have and this one has not are of two kinds. What cannot change an answer here (`IGNORED`) is
passed over, since clients send it by habit. What would change it is refused, unless its value means "off".
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from trimtab.errors import did_you_mean
from trimtab.serving.requests import BadRequest, Request

IGNORED = frozenset(
    {
        *("user", "store", "metadata", "service_tier", "safety_identifier", "parallel_tool_calls"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
    }
)
"""Bookkeeping of a service that is not ours: it changes nothing of an answer."""

_OFF: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "functions": ([],),
    "function_call": ("none",),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "moderation": (),
}
"""Fields that would change an answer and that we cannot follow; and the values that ask for nothing."""

_INSTEAD = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "best_of": "use n, and choose by logprobs",
    "response_format": "ask for the form in the messages",
}

MOST_ROWS = 128
"""Most answers of one request: prompts times ``n``."""

MOST_SEED = 2**63 - 1

AnyBody = TypeVar("AnyBody", bound=BaseModel)


class StreamOptions(BaseModel):
    """How a stream is written."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # of OpenAI's own; there is nothing to hide on a machine of one's own


class Asking(BaseModel):
    """The fields that both endpoints have."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ROWS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=MOST_SEED)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None

    @field_validator("stop")
    @classmethod
    def _some_text(cls, stop: str | list[str] | None) -> str | list[str] | None:
        texts = [stop] if isinstance(stop, str) else stop or []
        if len(texts) > 16 or any(not text or len(text) > 1000 for text in texts):
            raise ValueError("expected a text of 1 to 1,000 letters, or a list of at most 16 of them")
        return stop

    @property
    def count(self) -> int:
        """Answers for each prompt."""
        return self.n or 1

    @property
    def wanted(self) -> int | None:
        """The most tokens of an answer; None where the client leaves it to the server."""
        return self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens are told at each place; None: no log-probabilities at all."""
        return None

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def spaces(self, place: int) -> int:
        """How many spaces the text of a prompt ends with."""
        return 0

    def requests(self, prompts: list[list[int]], seconds: float | None) -> list[Request]:
        """What the engine is asked: ``count`` answers for each prompt, each by a seed of its own."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return [
            Request(
                self.model,
                tuple(prompt),
                max_new_tokens=self.wanted,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else self.top_p,
                top_k=max(0, self.top_k or 0),  # -1 is "all" for vLLM, 0 for us
                seed=None if self.seed is None else (self.seed + place * self.count + number) % 2**63,
                stop=stop,
                logprobs=self.likeliest,
                ignore_end=bool(self.ignore_eos),
                seconds=seconds,
                same_text=isinstance(self, CompletionAsking),
                spaces=self.spaces(place),
            )
            for place, prompt in enumerate(prompts)
            for number in range(self.count)
        ]


class ChatAsking(Asking):
    """``POST /v1/chat/completions``."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def wanted(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionAsking(Asking):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def wanted(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default

    @property
    def likeliest(self) -> int | None:
        return self.logprobs

    def spaces(self, place: int) -> int:
        prompt = self.prompts[place]
        return len(prompt) - len(prompt.rstrip(" ")) if isinstance(prompt, str) else 0

    @property
    def prompts(self) -> list[str | list[int]]:
        """One text, or list of tokens, for each prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[one for one in self.prompt if isinstance(one, int)]]
        return [one for one in self.prompt if not isinstance(one, int)]


class AddAdapter(BaseModel):
    """``POST /v1/adapters``."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    name: str
    path: str


class LoadLora(BaseModel):
    """``POST /v1/load_lora_adapter``, as vLLM has it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    lora_name: str
    lora_path: str


class UnloadLora(BaseModel):
    """``POST /v1/unload_lora_adapter``, as vLLM has it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    lora_name: str
    lora_int_id: int | None = None  # vLLM's own number, which has no meaning here


class FieldError(BadRequest):
    """A field of a body is not what it can be."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


def read_body(kind: type[AnyBody], raw: bytes) -> AnyBody:
    """The body ``raw`` as ``kind``. Raises FieldError, which names the field, what was expected and what came."""
    try:
        asked = kind.model_validate_json(raw)
    except ValidationError as error:
        problems = [problem for problem in error.errors(include_url=False) if problem["type"] != "json_invalid"]
        if not problems:
            raise FieldError(f"the body is no JSON: {error.errors()[0]['ctx']['error']}") from None
        raise _explained(problems) from None
    except (ValueError, RecursionError) as error:
        raise FieldError(f"the body is no JSON: {error}") from None
    if isinstance(asked, Asking):
        _check(asked)
    return asked


def _check(asked: Asking) -> None:
    for name, value in (asked.model_extra or {}).items():
        _check_other(type(asked), name, value)
    if asked.stream_options is not None and not asked.stream:
        raise FieldError("stream_options: goes with stream: true", "stream_options")
    if isinstance(asked, ChatAsking) and asked.top_logprobs and not asked.logprobs:
        raise FieldError("top_logprobs: goes with logprobs: true", "top_logprobs")


def _check_other(kind: type[Asking], name: str, value: Any) -> None:
    if value is None or name in IGNORED or value in _OFF.get(name, ()):
        return
    if name in _OFF:
        instead = f"; {_INSTEAD[name]}" if name in _INSTEAD else ""
        raise FieldError(f"{name}: not supported here, so it would be passed over without a word{instead}", name)
    known = {*kind.model_fields, *_OFF, *IGNORED}
    raise FieldError(f"{name[:100]}: unknown field.{did_you_mean(name, known)}", name[:100], "unknown_parameter")


_EXPECTED = {
    "missing": "missing",
    "string_type": "expected text",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "bool_type": "expected true or false",
    "list_type": "expected a list",
    "dict_type": "expected an object",
    "model_type": "expected an object",
    "model_attributes_type": "expected an object",
    "greater_than": "expected more than {gt}",
    "greater_than_equal": "expected at least {ge}",
    "less_than": "expected less than {lt}",
    "less_than_equal": "expected at most {le}",
    "literal_error": "expected {expected}",
    "extra_forbidden": "unknown field",
}
_FORMS = {
    "stop": "expected a text, or a list of texts",
    "prompt": "expected a text, a list of texts, a list of token ids, or a list of such lists",
    "tool_choice": "expected 'auto' or 'none'",
}
"""Fields that may be one of several things: pydantic tells a problem with each of them."""


def _explained(problems: list[Any]) -> FieldError:
    problem = problems[0]
    keys = [str(key) for key in problem["loc"] if not str(key).startswith(("list[", "str", "literal[", "dict["))]
    if not keys:
        return FieldError("the body must be a JSON object")
    name = keys[0]
    if name in _FORMS and problem["type"] not in ("missing", "value_error"):
        return FieldError(f"{name}: {_FORMS[name]}, got {_shown(problem['input'])}", name)
    said = _EXPECTED.get(problem["type"])
    bounds = {key: _plain(one) for key, one in problem.get("ctx", {}).items()}
    said = said.format(**bounds) if said else problem["msg"].removeprefix("Value error, ")
    got = "" if problem["type"] in ("missing", "extra_forbidden") else f", got {_shown(problem['input'])}"
    return FieldError(f"{'.'.join(keys)[:200]}: {said}{got}", name[:100])


def _plain(bound: Any) -> Any:
    """A bound without the zeros that it has as a float."""
    return int(bound) if isinstance(bound, float) and bound.is_integer() else bound


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= 80 else f"{text[:77]}..."
