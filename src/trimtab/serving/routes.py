"""The addresses of the server and what each of them does: OpenAI's API, adapters that come and go, health, metrics, and
the page to chat by."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from trimtab.errors import did_you_mean
from trimtab.serving.adapter_folder import AdapterFolder, checked_name
from trimtab.serving.answering import Answer, EventStream, submitted, unless_gone
from trimtab.serving.bodies import (
    AddAdapter,
    AnyBody,
    Asking,
    ChatAsking,
    CompletionAsking,
    FieldError,
    LoadLora,
    UnloadLora,
    read_body,
)
from trimtab.serving.chat_page import page, policy
from trimtab.serving.conversation import Conversations
from trimtab.serving.guards import Access, Guard, Seen, seen
from trimtab.serving.meters import CONTENT_TYPE, Meters
from trimtab.serving.replies import (
    ChatReply,
    CompletionReply,
    HttpError,
    Json,
    Reply,
    Row,
    encoded,
    http_error,
    model_entry,
)
from trimtab.serving.requests import Model, UnknownModel

if TYPE_CHECKING:
    from trimtab.serving.engine import Engine

_SECONDS_OF_BODY = 30.0


@dataclass(frozen=True)
class HttpLimits:
    """What the server takes from the network.

    Attributes:
        body: most bytes of a body.
        rows: most answers of one request; more can never be taken at once.
        seconds: of one request in the engine; None: no limit.
    """

    body: int = 2 * 2**20
    rows: int = 128
    seconds: float | None = 600.0


class Service:
    """The ASGI application over ``engine``.

    Args:
        engine: what answers.
        access: who may ask.
        limits: how much may be asked.
        adapters_from: the folder that adapters may be added from; None: from nowhere.
        told: given a line for each request that is over, without anything of what was said.

    Attributes:
        closing: set once no more requests are to be taken.
    """

    def __init__(
        self,
        engine: Engine,
        access: Access,
        limits: HttpLimits,
        *,
        adapters_from: AdapterFolder | None = None,
        told: Callable[[str], None],
    ) -> None:
        self.closing = False
        self._engine = engine
        self._access = access
        self._limits = limits
        self._folder = adapters_from
        self._meters = Meters(engine.stats)
        self._conversations = Conversations()
        # One at a time: a tokenizer is not made for several threads, and the model wants the other cores.
        self._writing = CapacityLimiter(1)
        self._changing = asyncio.Lock()
        guard = Guard(self._router(), access, self._meters, refusal=self.refusal, told=told)
        self._app: ASGIApp = guard
        if access.origins:
            self._app = CORSMiddleware(
                guard,
                allow_origins=access.origins,
                allow_methods=("GET", "POST", "DELETE"),
                allow_headers=("*",),
                expose_headers=("x-request-id", "retry-after"),
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self  # by which starlette knows that errors are told by whoever is in front
        await self._app(scope, receive, send)

    def refusal(self, error: Exception) -> HttpError:
        """What a client is told of ``error``; where it may come again, after how many seconds."""
        stats = self._engine.stats()
        each = stats.duration.total / stats.duration.count if stats.duration.count else 1.0
        ahead = each * (stats.queued + 1) / max(1, stats.running)
        return http_error(error, retry_after=min(60, max(1, math.ceil(ahead))))

    def _router(self) -> Router:
        routes = [
            Route("/", self._page, methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{name:path}", self._model, methods=["GET"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/adapters", self._add, methods=["POST"]),
            Route("/v1/adapters/{name:path}", self._drop, methods=["DELETE"]),
            Route("/v1/load_lora_adapter", self._load_lora, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self._unload_lora, methods=["POST"]),
        ]
        known = sorted({route.path for route in routes if "{" not in route.path})

        async def nowhere(scope: Scope, receive: Receive, send: Send) -> None:
            path = str(scope["path"])
            raise HttpError(404, f"there is no {path[:100]} here.{did_you_mean(path, known)}", code="unknown_url")

        return Router(routes, redirect_slashes=False, default=nowhere)

    # Reading -----------------------------------------------------------------------------------------------------

    def _see(self, request: HttpRequest) -> Seen:
        """Note the route of a request that has one."""
        mine = seen(request.scope)
        mine.route = request.scope["route"].path
        return mine

    async def _read(self, request: HttpRequest, kind: type[AnyBody]) -> AnyBody:
        """The body as ``kind``. Only JSON is read: what a form of a page on another site sends is not."""
        if self.closing:
            raise HttpError(503, "the server is closing", code="closing", headers={"Retry-After": "1"})
        content = request.headers.get("content-type", "")
        if content.partition(";")[0].strip().lower() != "application/json":
            raise HttpError(
                415, f"content-type: expected application/json, got {content[:80] or 'none'}", code="content_type"
            )
        if (packed := request.headers.get("content-encoding", "identity")).lower() != "identity":
            raise HttpError(415, f"content-encoding: bodies are read as they are, not as {packed[:80]!r}")
        return read_body(kind, await self._bytes(request))

    async def _bytes(self, request: HttpRequest) -> bytes:
        most = self._limits.body
        too_large = HttpError(
            413,
            f"the body has more than {most:,} bytes, the most that this server reads (--max-body)",
            code="body_too_large",
        )
        said = request.headers.get("content-length", "0")
        if said.isdecimal() and int(said) > most:
            raise too_large
        raw = bytearray()
        try:
            async with asyncio.timeout(_SECONDS_OF_BODY):
                async for some in request.stream():
                    raw += some
                    if len(raw) > most:
                        raise too_large
        except TimeoutError:
            raise HttpError(408, f"the body did not come within {_SECONDS_OF_BODY:g} seconds") from None
        return bytes(raw)

    def _known(self, name: str) -> Model:
        models = self._engine.models()
        for model in models:
            if model.name == name:
                return model
        names = [model.name for model in models]
        listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise UnknownModel(f"there is no model {name[:100]!r}.{did_you_mean(name, names)} There are: {listed}")

    # Answers -----------------------------------------------------------------------------------------------------

    async def _chat(self, request: HttpRequest) -> ASGIApp:
        mine = self._see(request)
        asked = await self._read(request, ChatAsking)
        model = self._known(asked.model)
        self._require_room(asked, 1)
        prompt = await run_sync(self._chat_prompt, asked, limiter=self._writing)
        reply = ChatReply(_short(mine.number), model.name, logprobs=asked.likeliest is not None)
        return await self._answered(request, asked, [prompt], reply)

    def _chat_prompt(self, asked: ChatAsking) -> list[int]:
        text = self._conversations.text(asked, self._engine.reads(asked.model).tokenizer)
        return self._engine.encode(text, asked.model)

    async def _completions(self, request: HttpRequest) -> ASGIApp:
        mine = self._see(request)
        asked = await self._read(request, CompletionAsking)
        model = self._known(asked.model)
        self._require_room(asked, len(asked.prompts))
        prompts = await run_sync(self._prompts, asked, limiter=self._writing)
        reply = CompletionReply(_short(mine.number), model.name, logprobs=asked.likeliest is not None)
        return await self._answered(request, asked, prompts, reply)

    def _prompts(self, asked: CompletionAsking) -> list[list[int]]:
        prompts = [self._engine.encode(one, asked.model) if isinstance(one, str) else one for one in asked.prompts]
        if not prompts:
            raise FieldError("prompt: expected at least one", "prompt")
        return prompts

    def _require_room(self, asked: Asking, prompts: int) -> None:
        """Raise FieldError for more answers than there can ever be, before a prompt is read."""
        if (count := prompts * asked.count) > self._limits.rows:
            raise FieldError(
                f"n: {count} answers in one request are more than this server ever takes at once ({self._limits.rows})",
                "n",
            )

    async def _answered(
        self, request: HttpRequest, asked: Asking, prompts: Sequence[list[int]], reply: Reply
    ) -> ASGIApp:
        tickets = submitted(self._engine, asked.requests(list(prompts), self._limits.seconds))
        mine = seen(request.scope)

        def counted(rows: Sequence[Row]) -> None:
            read, written = sum(row.prompt_tokens for row in rows), sum(row.written for row in rows)
            mine.about = f"{asked.model} {read}+{written} tokens"
            self._meters.tokens(asked.model, rows)

        answer = Answer(asked, tickets, reply, counted)
        if asked.stream:
            return EventStream(answer, self.refusal)
        try:
            return _json(await unless_gone(answer.whole(), request.receive))
        finally:
            answer.end()

    # Models ------------------------------------------------------------------------------------------------------

    async def _models(self, request: HttpRequest) -> Response:
        self._see(request)
        return _json({"object": "list", "data": self._listed()})

    async def _model(self, request: HttpRequest) -> Response:
        self._see(request)
        name = self._known(request.path_params["name"]).name
        return _json(next(one for one in self._listed() if one["id"] == name))

    def _listed(self) -> list[Json]:
        models = self._engine.models()
        return [model_entry(model, models[0].name) for model in models]

    async def _add(self, request: HttpRequest) -> Response:
        self._see(request)
        folder = self._allowed()
        said = await self._read(request, AddAdapter)
        return _json(await self._added(said.name, folder.find(said.path)))

    async def _load_lora(self, request: HttpRequest) -> Response:
        """As vLLM has it."""
        self._see(request)
        folder = self._allowed()
        said = await self._read(request, LoadLora)
        await self._added(said.lora_name, folder.find(said.lora_path))
        return Response(f"Success: LoRA adapter '{said.lora_name}' added successfully.", media_type="text/plain")

    async def _drop(self, request: HttpRequest) -> Response:
        self._see(request)
        self._allowed()
        name = request.path_params["name"]
        await self._dropped(name)
        return _json({"id": name, "object": "model", "deleted": True})

    async def _unload_lora(self, request: HttpRequest) -> Response:
        """As vLLM has it."""
        self._see(request)
        self._allowed()
        said = await self._read(request, UnloadLora)
        await self._dropped(said.lora_name)
        return Response(f"Success: LoRA adapter '{said.lora_name}' removed successfully.", media_type="text/plain")

    def _allowed(self) -> AdapterFolder:
        """The folder that adapters come from. Raises HttpError where they may not be changed."""
        if self._access.key is None or self._folder is None:
            raise HttpError(
                403,
                "adapters can be added and dropped where the server was started with --adapters-from and a key",
                code="closed",
            )
        return self._folder

    async def _added(self, name: str, place: Path) -> Json:
        checked_name(name)
        async with self._changing:  # the name is looked at and taken in one go
            models = self._engine.models()
            if any(model.name == name for model in models):
                raise HttpError(
                    409, f"there is a model {name!r} already; drop it first", param="name", code="name_taken"
                )
            model = await run_sync(self._engine.add_adapter, name, place)
        return model_entry(model, models[0].name)

    async def _dropped(self, name: str) -> None:
        async with self._changing:
            if not self._known(name).adapter:
                raise HttpError(400, f"{name!r} is the base model, which stays", param="name")
            await run_sync(self._engine.drop_adapter, name)

    # What is told ------------------------------------------------------------------------------------------------

    async def _page(self, request: HttpRequest) -> Response:
        self._see(request)
        return Response(page(), media_type="text/html", headers={"content-security-policy": policy()})

    async def _health(self, request: HttpRequest) -> Response:
        self._see(request)
        state = "closing" if self.closing else self._engine.stats().state
        return _json({"status": "ok" if state == "ready" else state}, 200 if state == "ready" else 503)

    async def _metrics(self, request: HttpRequest) -> Response:
        self._see(request)
        return Response(self._meters.text(), headers={"content-type": CONTENT_TYPE})


def _json(body: Json | bytes, status: int = 200) -> Response:
    raw = body if isinstance(body, bytes) else encoded(body)
    return Response(raw, status, media_type="application/json")


def _short(number: str) -> str:
    return number.removeprefix("req-")
