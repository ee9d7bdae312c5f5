"""A server in a thread of the test's process, and an engine without a model, for what an engine is only waited for."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from tiny_runs import tiny_tokenizer
from trimtab.errors import AdapterError
from trimtab.serving.adapter_folder import AdapterFolder
from trimtab.serving.guards import Access
from trimtab.serving.requests import (
    Chosen,
    EngineClosed,
    Histogram,
    Likely,
    Model,
    Piece,
    QueueFull,
    Request,
    Stats,
    TooLong,
    UnknownModel,
)
from trimtab.serving.routes import HttpLimits, Service
from trimtab.serving.server import Serving, address_of, listen

WORDS = ("the ", "tug ", "is ", "free ", "again ", "now ", "and ", "then ")


@dataclass
class FakeReads:
    tokenizer: Any
    form: str | None = None


@dataclass
class FakeTicket:
    """Says ``words`` in a row, or raises ``error``; waits for ``step`` before each."""

    engine: FakeEngine
    request: Request
    cancelled: bool = False
    over: bool = False

    def cancel(self) -> None:
        self.cancelled = True
        self.end()

    def end(self) -> None:
        if not self.over:
            self.over = True
            self.engine.running.remove(self)
            self.engine.finished += 1

    async def __aiter__(self) -> AsyncIterator[Piece]:
        engine, read = self.engine, len(self.request.prompt)
        most = min(self.request.max_new_tokens or len(engine.words), len(engine.words))
        try:
            for number, word in enumerate(engine.words[:most], start=1):
                await asyncio.sleep(engine.seconds)
                if engine.closed:
                    raise EngineClosed("the server is closing")
                if engine.failing is not None and number > engine.after:
                    raise engine.failing
                top = (Likely(number, word, word.encode(), -0.5), Likely(0, "\ufffd", b"\xe2", float("-inf")))
                offset = sum(map(len, engine.words[: number - 1]))
                chosen = Chosen(number, word, word.encode(), -0.5, top[: self.request.logprobs or 0], offset)
                told = (chosen,) if self.request.logprobs is not None else ()
                reason = None if number < most else engine.reason or ("length" if most < len(engine.words) else "stop")
                yield Piece(word, told, reason, read, number)
        finally:
            self.end()


@dataclass
class FakeEngine:
    """Answers every request by ``words``.

    ``seconds``: before each word. ``most``: requests at one time, above which the queue is full. ``failing``: raised
    after ``after`` words.
    """

    words: tuple[str, ...] = WORDS
    seconds: float = 0.0
    most: int = 1000
    failing: Exception | None = None
    after: int = 0
    reason: Any = None
    positions: int = 500
    template: bool = True
    closed: bool = False
    broken: bool = False
    notes: tuple[str, ...] = ()
    finished: int = 0
    running: list[FakeTicket] = field(default_factory=list)
    asked: list[Request] = field(default_factory=list)
    adapters: dict[str, Path] = field(default_factory=lambda: {"legal": Path("legal"), "fr": Path("fr")})

    def __post_init__(self) -> None:
        self._reads = FakeReads(tiny_tokenizer() if self.template else tiny_tokenizer(None))

    def use(self, tokenizer: Any) -> None:
        """Prompts are made by ``tokenizer``."""
        self._reads = FakeReads(tokenizer)

    def decoded(self, number: int) -> str:
        """The prompt of a request, as text."""
        return str(self._reads.tokenizer.decode(self.asked[number].prompt))

    def submit(self, request: Request) -> FakeTicket:
        if self.closed:
            raise EngineClosed("the server is closing")
        if request.model not in [model.name for model in self.models()]:
            raise UnknownModel(request.model)
        if len(request.prompt) + (request.max_new_tokens or 1) > self.positions:
            raise TooLong(f"{len(request.prompt)} tokens are too many")
        if len(self.running) >= self.most:
            raise QueueFull("too many requests wait already")
        self.asked.append(request)
        ticket = FakeTicket(self, request)
        self.running.append(ticket)
        return ticket

    def models(self) -> list[Model]:
        return [
            Model("base", False, "base", 1.0),
            *(Model(name, True, str(at), 2.0) for name, at in self.adapters.items()),
        ]

    def reads(self, model: str) -> FakeReads:
        return self._reads

    def encode(self, text: str, model: str) -> list[int]:
        return list(self._reads.tokenizer(text).input_ids)

    def add_adapter(self, name: str, folder: Path) -> Model:
        if not (folder / "adapter_config.json").is_file():
            raise AdapterError(f"{folder}: no adapter")
        self.adapters[name] = folder
        return Model(name, True, str(folder), 3.0)

    def drop_adapter(self, name: str) -> None:
        del self.adapters[name]

    def stats(self) -> Stats:
        seen = Histogram((0.1, 1.0), (self.finished, 0, 0), 0.05 * self.finished)
        return Stats(
            *(
                "broken" if self.broken else "closed" if self.closed else "ready",
                0,
                len(self.running),
                5,
                7,
                1.5,
                {"stop": self.finished},
                {},
                9,
            ),
            *(seen, seen, len(self.adapters), 2, 1000, 2, 0, self.notes),
        )

    def close(self, grace: float | None = None) -> None:
        end = time.monotonic() + (grace or 0)
        while self.running and time.monotonic() < end:
            time.sleep(0.02)
        self.closed = True


class _Kept:
    """An engine that goes on when a server of it ends."""

    def __init__(self, engine: Any) -> None:
        self.stats = engine.stats

    def close(self, grace: float | None = None) -> None:
        pass


@dataclass
class Running:
    """A server that is up: its address, the lines that it told, and what stops it."""

    address: str
    lines: list[str]
    stop: Callable[[], None]
    key: str | None = None

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """A plain request; ``body`` is JSON unless it is bytes. Underscores in the names of headers are dashes."""
        sent = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        sent |= {"Content-Type": "application/json"} if raw is not None else {}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, raw, sent)
            got = connection.getresponse()
            return Reply(got.status, {name.lower(): value for name, value in got.getheaders()}, got.read())
        finally:
            connection.close()

    def chat(self, model: str = "legal", text: str = "Is berth seven free?", **more: Any) -> Reply:
        """A chat of one message."""
        said = [{"role": "user", "content": text}]
        return self.ask("POST", "/v1/chat/completions", {"model": model, "messages": said, **more})

    def wait_for_line(self, part: str, seconds: float = 10.0) -> str:
        """The first line told that has ``part`` in it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for line in list(self.lines):
                if part in line:
                    return line
            time.sleep(0.01)
        raise AssertionError(f"no line with {part}: {self.lines}")


@dataclass(frozen=True)
class Reply:
    """What a server answered."""

    status: int
    headers: dict[str, str]
    raw: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.raw)

    @property
    def error(self) -> dict[str, Any]:
        assert self.body.keys() == {"error"}, self.raw
        assert self.body["error"].keys() == {"message", "type", "param", "code"}
        return dict(self.body["error"])

    @property
    def events(self) -> list[Any]:
        """The events of a stream, without the mark at its end."""
        lines = [part.removeprefix(b"data: ") for part in self.raw.split(b"\n\n") if part]
        return [json.loads(line) for line in lines if line != b"[DONE]"]


@contextmanager
def running(
    engine: Any,
    *,
    key: str | None = None,
    origins: tuple[str, ...] = (),
    limits: HttpLimits | None = None,
    adapters_from: Path | None = None,
    grace: float = 2.0,
    seconds: float | None = 60.0,
    ends: bool = True,
) -> Iterator[Running]:
    """A server over ``engine`` on a free port, in a thread. ``ends``: the engine is closed with it."""
    lines: list[str] = []
    access = Access(key, origins, ("127.0.0.1",), seconds)
    service = Service(
        engine,
        access,
        limits or HttpLimits(),
        adapters_from=AdapterFolder(adapters_from) if adapters_from else None,
        told=lines.append,
    )
    serving = Serving(service, engine if ends else _Kept(engine), grace=grace, told=lines.append)
    opened = listen("127.0.0.1", 0)
    thread = threading.Thread(target=serving.run, kwargs={"sockets": [opened]}, daemon=True)
    address = address_of(opened)

    def stop() -> None:
        serving.should_exit = True
        thread.join(30)
        assert not thread.is_alive()

    thread.start()
    for _ in itertools.takewhile(lambda _: not serving.started, range(1000)):
        time.sleep(0.01)
    try:
        yield Running(address, lines, stop, key)
    finally:
        stop()
