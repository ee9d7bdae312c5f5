"""The client's end of a request: its pieces, for a thread or for asyncio, and the way to take it back."""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import AsyncIterator, Iterator
from typing import Self

from trimtab.serving.requests import Piece, Request


class Ticket:
    """What the engine gives for a request at once. Its pieces are read once, by one reader: ``for piece in ticket`` in
    a thread, or ``async for piece in ticket`` in a loop of asyncio. The last one has a finish reason; a ServingError is
    raised where the request fails."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.cancelled = False
        """Whether the client has taken it back. The engine looks at it between two tokens."""
        self._said: queue.SimpleQueue[Piece | Exception] = queue.SimpleQueue()
        self._over = False
        self._waiting: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def cancel(self) -> None:
        """Take the request back: its row is free at the next step, and the pieces end with ``cancelled``. Nothing
        happens where it is over."""
        self.cancelled = True

    def put(self, said: Piece | Exception) -> None:
        """Called by the engine."""
        self._said.put(said)
        if (waiting := self._waiting) is not None:
            with contextlib.suppress(RuntimeError):  # a loop that is closed waits for nothing
                waiting[0].call_soon_threadsafe(waiting[1].set)

    def __iter__(self) -> Iterator[Piece]:
        while not self._over:
            yield self._taken(self._said.get())

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        if self._over:
            raise StopAsyncIteration
        if self._waiting is None:
            self._waiting = asyncio.get_running_loop(), asyncio.Event()
        arrived = self._waiting[1]
        while True:
            arrived.clear()
            with contextlib.suppress(queue.Empty):
                return self._taken(self._said.get_nowait())
            await arrived.wait()

    def _taken(self, said: Piece | Exception) -> Piece:
        if isinstance(said, Exception):
            self._over = True
            raise said
        self._over = said.finish_reason is not None
        return said

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
