"""What the HTTP server needs of whatever answers its requests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

from trimtab.serving.requests import Model, Piece, Request, Stats


class Ticket(Protocol):
    """A request that was taken."""

    def __aiter__(self) -> AsyncIterator[Piece]: ...

    def cancel(self) -> None:
        """Free its row; nothing where it is over."""


class Reads(Protocol):
    """What prompts of a model are made with."""

    @property
    def tokenizer(self) -> Any: ...


class Engine(Protocol):
    """Answers requests for a model and its adapters."""

    def submit(self, request: Request) -> Ticket: ...

    def models(self) -> list[Model]: ...

    def reads(self, model: str) -> Reads: ...

    def encode(self, text: str, model: str) -> list[int]: ...

    def add_adapter(self, name: str, folder: Path) -> Model: ...

    def drop_adapter(self, name: str) -> None: ...

    def stats(self) -> Stats: ...

    def close(self, grace: float | None = None) -> None: ...
