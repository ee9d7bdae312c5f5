"""From a request's rows in the engine to its answer, whole or as a stream. A client that goes away frees its rows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.types import Receive, Scope, Send

from trimtab.serving.bodies import Asking, ChatAsking
from trimtab.serving.replies import HttpError, Json, Reply, Row, encoded, event, usage
from trimtab.serving.requests import Piece, Request
from trimtab.serving.tool_calls import CallFinder, ToolCall

if TYPE_CHECKING:
    from trimtab.serving.engine import Engine
    from trimtab.serving.ticket import Ticket

Result = TypeVar("Result")
Counted = Callable[[Sequence[Row]], None]
"""Told the rows of an answer that is over, whole or not."""


class GoneError(Exception):
    """The client went away; nobody reads an answer."""


def submitted(engine: Engine, asked: Sequence[Request]) -> list[Ticket]:
    """All of ``asked``, or none of them. Raises what ``Engine.submit`` does."""
    tickets: list[Ticket] = []
    try:
        for one in asked:
            tickets.append(engine.submit(one))
    except BaseException:
        cancel(tickets)
        raise
    return tickets


def cancel(tickets: Sequence[Ticket]) -> None:
    """Free the rows of ``tickets``; those that are over are left alone."""
    for ticket in tickets:
        ticket.cancel()


class Answer:
    """The answer to ``asked``: one row for each ticket; rows of one prompt follow each other."""

    def __init__(self, asked: Asking, tickets: Sequence[Ticket], reply: Reply, counted: Counted) -> None:
        self._asked = asked
        self._tickets = tickets
        self._reply = reply
        self._counted = counted
        self._rows = [Row() for _ in tickets]
        tools = asked.tools if isinstance(asked, ChatAsking) and asked.tool_choice != "none" else None
        self._finders = [CallFinder(tools) if tools else None for _ in tickets]

    async def whole(self) -> bytes:
        """The body of the answer, once all rows are over. Raises HttpError where it has none."""
        async with aclosing(self._pieces()) as pieces:
            async for _ in pieces:
                pass
        return encoded(self._reply.whole(self._rows, self._usage()))

    async def stream(self) -> AsyncGenerator[bytes]:
        """The answer as server-sent events. An error comes as one of them, since the status is sent by then; only what
        is raised before the first piece can still be one of its own."""
        with_usage = self._asked.with_usage
        began: set[int] = set()
        async with aclosing(self._pieces()) as pieces:
            async for index, said, piece in pieces:
                new = [] if index in began else [self._reply.first(index)]
                began.add(index)
                new.append(self._reply.part(index, self._rows[index], said, piece.chosen))
                for choice in new:
                    if choice is not None:
                        yield event(self._reply.chunk([choice], None, with_usage=with_usage))
        if with_usage:
            yield event(self._reply.chunk([], self._usage(), with_usage=True))
        yield event("[DONE]")

    def end(self) -> None:
        """Free the rows, whatever became of the answer, and count what was read and written."""
        cancel(self._tickets)
        self._counted(self._rows)

    def _usage(self) -> Json:
        each = self._asked.count
        prompts = sum(row.prompt_tokens for row in self._rows[::each])
        return usage(prompts, sum(row.written for row in self._rows))

    async def _pieces(self) -> AsyncGenerator[tuple[int, list[str | ToolCall], Piece]]:
        """What each row says, as it comes: kept in its ``Row``, and given to whoever streams."""
        async with aclosing(merged(self._tickets)) as coming:
            async for index, piece in coming:
                row, finder = self._rows[index], self._finders[index]
                row.take(piece)
                if piece.finish_reason == "time":
                    raise HttpError(
                        504,
                        f"the answer was not done in time, after {row.written} tokens; ask for fewer tokens, or start "
                        "the server with a longer --timeout",
                        code="out_of_time",
                    )
                if piece.finish_reason == "cancelled":
                    raise HttpError(503, "the server is closing", code="closing")
                said: list[str | ToolCall] = [piece.text] if piece.text else []
                if finder is not None:
                    said = finder.feed(piece.text, last=piece.finish_reason is not None)
                row.text += "".join(one for one in said if isinstance(one, str))
                row.calls += [one for one in said if isinstance(one, ToolCall)]
                yield index, said, piece


async def merged(tickets: Sequence[Ticket]) -> AsyncGenerator[tuple[int, Piece]]:
    """The pieces of all tickets, as they come. Raises what any of them raises."""
    if len(tickets) == 1:
        async for piece in tickets[0]:
            yield 0, piece
        return
    coming: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue()

    async def follow(index: int, ticket: Ticket) -> None:
        try:
            async for piece in ticket:
                coming.put_nowait((index, piece))
            coming.put_nowait(None)
        except Exception as error:
            coming.put_nowait(error)

    following = [asyncio.create_task(follow(index, ticket)) for index, ticket in enumerate(tickets)]
    try:
        left = len(following)
        while left:
            got = await coming.get()
            if isinstance(got, Exception):
                raise got
            if got is None:
                left -= 1
            else:
                yield got
    finally:
        for task in following:
            task.cancel()


class EventStream:
    """A response of server-sent events. What is raised before the first of them is raised here, and has a status yet;
    later errors are events themselves."""

    def __init__(self, answer: Answer, told: Callable[[Exception], HttpError]) -> None:
        self._answer = answer
        self._told = told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._answer.stream()) as events:
                await unless_gone(self._send(events, send), receive)
        finally:
            self._answer.end()

    async def _send(self, events: AsyncGenerator[bytes], send: Send) -> None:
        some = await anext(events)
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            await send({"type": "http.response.body", "body": some, "more_body": True})
            async for some in events:
                await send({"type": "http.response.body", "body": some, "more_body": True})
        except Exception as error:
            await send({"type": "http.response.body", "body": event(self._told(error).body()), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(work: Awaitable[Result], receive: Receive) -> Result:
    """The result of ``work``. Raises GoneError, and ends it, where the client goes away before."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks: tuple[asyncio.Future[Any], ...] = (asyncio.ensure_future(work), asyncio.ensure_future(gone()))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise GoneError
        result: Result = tasks[0].result()
        return result
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)  # until rows are freed
