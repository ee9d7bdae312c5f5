"""The server's process: a socket, uvicorn around the application, and an end in good order."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from trimtab.errors import ConfigError
from trimtab.serving.routes import Service
from trimtab.signals import HANGUP

if TYPE_CHECKING:
    from trimtab.serving.engine import Engine

_FLUSHING = 5
"""Seconds for clients to take the ends of their answers, once the engine is closed."""

_KEEP_ALIVE = 75
"""Seconds that an idle connection stays open: longer than clients keep theirs, or they would meet one just closed."""


_HEAD = 20.0
"""Seconds that a request's head may take, from the connection, or from its first byte where others came before it."""


class Connection(H11Protocol):
    """A connection of uvicorn, which is closed where a request's head does not come in time. (uvicorn waits for the
    first one, and for one that comes byte by byte, as long as the client likes.)"""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._expect_none()

    def _expect_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:  # all of it is there
            self._expect_none()
        elif self._late is None:
            self._late = self.loop.call_later(_HEAD, self.timeout_keep_alive_handler)

    def _expect_none(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def listen(host: str, port: int) -> socket.socket:
    """A socket at ``host:port`` that does not answer yet, so that a port in use is noticed before a model is loaded.
    Port 0 is any free one.

    Raises ConfigError if the address is taken, or none of this machine.
    """
    where = f"--host {host} --port {port}"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or error
        raise ConfigError(f"{where}: there is no such address ({said})") from None
    family, kind, _, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    made = socket.socket(family, kind)
    try:
        if os.name == "posix":  # a port that was used a moment ago is free; elsewhere this would share one in use
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        helps = {
            errno.EADDRINUSE: "another program has this port; choose another --port, or 0 for any free one",
            errno.EACCES: "not allowed; ports below 1024 are for the administrator",
            errno.EADDRNOTAVAIL: "this machine has no such address",
        }.get(error.errno or 0, error.strerror or str(error))
        raise ConfigError(f"{where}: {helps}") from None
    made.setblocking(False)
    return made


def address_of(made: socket.socket) -> str:
    """The address of a socket as a browser takes it, on this machine."""
    host, port = made.getsockname()[:2]
    here = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{here}:{port}"


class Serving(uvicorn.Server):
    """uvicorn around ``service``. Told to end, it takes no more requests, lets those that run go on for ``grace``
    seconds, and cuts them then; told twice, it ends at once. It ends by itself where the engine cannot go on."""

    def __init__(self, service: Service, engine: Engine, *, grace: float, told: Callable[[str], None]) -> None:
        # What uvicorn says of a broken request or of its own state is no news; ours is told by the guard.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        super().__init__(
            uvicorn.Config(
                service,
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                http=Connection,
                loop="asyncio",
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE,
                timeout_graceful_shutdown=_FLUSHING,
            )
        )
        self._service = service
        self._engine = engine
        self._grace = grace
        self._told = told

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGHUP, too, unless it is ignored as under nohup."""
        with super().capture_signals():
            heard = HANGUP if threading.current_thread() is threading.main_thread() else None
            if heard is None or (before := signal.getsignal(heard)) is signal.SIG_IGN:
                yield
                return
            signal.signal(heard, self.handle_exit)
            try:
                yield
            finally:
                signal.signal(heard, before)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the end, the second one is the end; SIGHUP alone may come twice."""
        if self.should_exit:
            if sig == HANGUP:
                return
            os._exit(128 + sig)
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        broken = counter % 10 == 0 and self._engine.stats().state == "broken"
        return await super().on_tick(counter) or broken

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let what runs go on for the time of grace, then close."""
        self._service.closing = True
        stats = self._engine.stats()
        if open_now := stats.running + stats.queued:
            which = "1 request has" if open_now == 1 else f"{open_now} requests have"
            self._told(f"Closing: {which} {self._grace:g} seconds to finish; the same signal again ends it at once.")
        await asyncio.get_running_loop().run_in_executor(None, self._engine.close, self._grace)
        await super().shutdown(sockets)
