"""What stands before every request: who may ask, from where, how much; a number for it, and a line when it is over.

A server on a machine of one's own can be reached by every page that is open in the browser there. So a request that a
page of another origin makes is refused, and so is one that calls this server by a name of somebody else's (DNS
rebinding), unless a key keeps both out anyway.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab.errors import TrimtabError
from trimtab.serving.answering import GoneError
from trimtab.serving.meters import Meters
from trimtab.serving.replies import HttpError, encoded, quoted_path

OPEN = ("/", "/health")
"""Paths that need no key: neither says anything of the models or of who asks them."""

_NUMBER = re.compile(r"[\w.-]{1,64}")
_MOST_DRAINED, _SECONDS_DRAINED = 64 * 2**20, 10.0
_GONE = 499  # nginx's number for a client that went away
_log = logging.getLogger("trimtab.serving")


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        key: that requests have to show; None: none is asked for.
        origins: pages of these may ask from a browser, beside the server's own page.
        names: of this server, beside addresses and ``localhost``; looked at where there is no key.
        seconds: the longest a request may take in all, its reading and its sending with it.
    """

    key: str | None = None
    origins: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    seconds: float | None = None

    def check(self, scope: Scope) -> None:
        """Raise HttpError if this request may not be made."""
        headers = Headers(scope=scope)
        self._check_origin(headers, scope["path"])
        if self.key is None:
            self._check_name(headers.get("host", ""))
        elif scope["path"] not in OPEN and not self._same(headers.get("authorization", "")):
            raise HttpError(
                401,
                "the key is missing or wrong: send it as 'Authorization: Bearer KEY' (api_key of OpenAI's clients)",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _same(self, authorization: str) -> bool:
        kind, _, given = authorization.partition(" ")
        digests = [hashlib.sha256(text.encode()).digest() for text in (given.strip(), self.key or "")]
        return hmac.compare_digest(*digests) and kind.lower() == "bearer"

    def _check_origin(self, headers: Headers, path: str) -> None:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin is not None and (origin in self.origins or "*" in self.origins):
            return
        own = origin is None or origin.partition("://")[2] == headers.get("host")
        if not own or (site in ("cross-site", "same-site") and path != "/"):
            raise HttpError(
                403,
                f"a page of {(origin or 'another site')[:100]} may not ask this server from a browser; --allow-origin "
                "allows it",
                code="foreign_origin",
            )

    def _check_name(self, host: str) -> None:
        name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
        known = ("localhost", socket.gethostname().lower(), *self.names)
        if name.lower().rstrip(".") in known or name.lower().endswith(".localhost") or _is_address(name.strip("[]")):
            return
        raise HttpError(
            403,
            f"this server is not called {name[:100]!r}; ask it by its address, or start it with --api-key, which makes "
            "every name do",
            code="foreign_host",
        )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@dataclass
class Seen:
    """What is told of a request when it is over."""

    number: str
    started: float = field(default_factory=time.monotonic)
    route: str = ""
    status: int = 0
    about: str = ""
    """The model and the tokens; never what was said."""
    read: bool = False
    """Whether the client has sent all that it sends."""


def seen(scope: Scope) -> Seen:
    """Where to note what is told of this request."""
    found = scope["trimtab.seen"]
    assert isinstance(found, Seen)
    return found


class Guard:
    """The ASGI application in front of ``app``."""

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        meters: Meters,
        *,
        refusal: Callable[[Exception], HttpError],
        told: Callable[[str], None],
    ) -> None:
        self._app = app
        self._access = access
        self._meters = meters
        self._refusal = refusal
        self._told = told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        asked = Headers(scope=scope).get("x-request-id", "")
        mine = scope["trimtab.seen"] = Seen(asked if _NUMBER.fullmatch(asked) else f"req-{secrets.token_hex(8)}")

        async def receiving() -> Message:
            message = await receive()
            mine.read = mine.read or not message.get("more_body", False)
            return message

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                mine.status = message["status"]
                message["headers"] = [*_HEADERS, (b"x-request-id", mine.number.encode()), *message["headers"]]
            await send(message)

        try:
            async with asyncio.timeout(self._access.seconds):
                await self._answer(scope, receiving, sending, mine)
        except TimeoutError:
            if not mine.status:
                error = HttpError(504, "the request was not answered in time", code="out_of_time")
                await _refuse(error, receiving, sending, mine)
        except (GoneError, ClientDisconnect):
            mine.status = _GONE
        finally:
            self._over(scope, mine)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, mine: Seen) -> None:
        try:
            self._access.check(scope)
            await self._app(scope, receive, send)
        except (GoneError, ClientDisconnect):
            raise
        except HTTPException as error:
            await _refuse(HttpError(error.status_code, error.detail, headers=error.headers), receive, send, mine)
        except Exception as error:
            if not isinstance(error, TrimtabError):
                _log.exception("%s failed", mine.number)
            if mine.status:
                raise
            await _refuse(self._refusal(error), receive, send, mine)

    def _over(self, scope: Scope, mine: Seen) -> None:
        seconds = time.monotonic() - mine.started
        status = mine.status or _GONE
        self._meters.answered(mine.route, status, seconds)
        client = (scope.get("client") or ("-",))[0]
        about = f" {mine.about}" if mine.about else ""
        self._told(
            f"{time.strftime('%H:%M:%S')} {client} {scope['method'][:20]} {quoted_path(scope['path'])} "
            f"{'gone' if status == _GONE else status}{about} {seconds:.2f} s {mine.number}"
        )


_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)


async def _refuse(error: HttpError, receive: Receive, send: Send, mine: Seen) -> None:
    """Answer by ``error``, once the client has sent what it sends: many look at no answer before that."""
    got = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_SECONDS_DRAINED):
            while not mine.read and got <= _MOST_DRAINED:
                got += len((await receive()).get("body", b""))
    body = encoded(error.body())
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
