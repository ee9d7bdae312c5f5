"""The model's passes over the rows that are being answered, and what becomes of the rows when one fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from trimtab.errors import TrimtabError, machine_refusal
from trimtab.serving.alone import write_alone
from trimtab.serving.batch import Adapters, Batch, why_alone
from trimtab.serving.counters import Counters
from trimtab.serving.requests import RequestFailed
from trimtab.serving.writing import Row, take

T = TypeVar("T")

_FAILURES = 3  # passes that fail one after the other, until the model is asked whether it still works


class Passes:
    """Rows are in one batch; or in one for each adapter, where the model cannot tell rows of different ones apart; or
    alone, one after the other, where its rows cannot share a batch at all.

    Attributes:
        adapters: the context of adapters that the rows go through.
        why_alone: why rows cannot share a batch; None where they can.
        cut_at: the time on the monotonic clock at which rows that are still being answered are cut.
        is_broken: whether the model fails at whatever it is asked.
    """

    def __init__(self, model: Any, counters: Counters) -> None:
        self.adapters, self.cut_at = Adapters(model), float("inf")
        self.why_alone = why_alone(model, lambda one: Batch(one, lambda names: None))
        self._model, self._counters = model, counters
        self._batches: dict[str | None, Batch] = {}
        self._alone: Row | None = None
        self._failures = 0
        self.is_broken = False

    @property
    def rows(self) -> list[Row]:
        """Those that are being answered."""
        alone = self._alone
        rows = [row for batch in list(self._batches.values()) for row in batch.rows]
        return rows if alone is None else [*rows, alone]

    def in_use(self) -> set[str]:
        """The adapters that rows go through."""
        return {row.adapter for row in self.rows if row.adapter is not None}

    def look_after(self) -> None:
        """End what is over: its client has left, its time is up, or all is cut."""
        for batch in self._batches.values():
            for row in list(batch.rows):
                if self._is_over(row):
                    self._leave(batch, row)

    def read(self, newcomers: list[Row]) -> None:
        """Read the prompts of newcomers, who then belong to a batch and have chosen their first token."""
        together: dict[str | None, list[Row]] = {}
        for row in newcomers:
            together.setdefault(row.adapter if self.adapters.why_apart else None, []).append(row)
        for key, rows in together.items():
            batch = self._batches.setdefault(key, Batch(self._model, self.adapters.through))
            if (read := self._tried(partial(batch.read, rows), rows)) is None:
                continue
            logits, cache = read
            if self._tried(partial(batch.join, rows, cache), rows, spoils=batch) is not None:
                self._take(batch, rows, logits, sum(row.prompt_tokens for row in rows))

    def step(self) -> None:
        """One token more for every row."""
        for key, batch in list(self._batches.items()):
            if batch.rows and (logits := self._tried(batch.step, batch.rows, spoils=batch)) is not None:
                self._take(batch, batch.rows, logits, 0)
            if not batch.rows:
                del self._batches[key]

    def write_alone(self, row: Row, each: Callable[[], None]) -> None:
        """Answer a row to its end. ``each`` is called before every token."""
        self._alone = row

        def before_each() -> None:
            each()
            self._is_over(row)

        def write() -> bool:
            self.adapters.through([row.adapter])
            write_alone(self._model, row, before_each)
            return True

        self._tried(write, [row])
        self._counters.passed(row.prompt_tokens, row.written)
        self._counters.ended(row)
        self._alone = None

    def end_all(self, error: Exception) -> None:
        """Let all rows fail."""
        for row in self.rows:
            row.fail(error)
            self._counters.ended(row)
        self._batches, self._alone = {}, None
        self.adapters.leave()

    def _is_over(self, row: Row) -> bool:
        if time.monotonic() > self.cut_at:
            row.cut("cancelled")
        return row.check()

    def _tried(self, run: Callable[[], T], rows: list[Row], spoils: Batch | None = None) -> T | None:
        """What ``run`` gives. Where it fails, ``rows`` do, and with them the whole batch whose cache it spoils; all
        others go on."""
        try:
            given = run()
        except Exception as error:
            self.adapters.leave()
            failed = {id(row): row for row in (*rows, *(spoils.clear() if spoils is not None else ()))}
            for row in failed.values():
                row.fail(as_failure(error, "the model failed at this request"))
                if row is not self._alone:
                    self._counters.ended(row)
            self._failures += 1
            if self._failures >= _FAILURES:
                # It may be the requests: then an own one goes well, and none of theirs can end the engine.
                self.is_broken = not self._works()
                self._failures = 0
            return None
        self._failures = 0
        return given

    def _works(self) -> bool:
        """Whether the bare model still reads a token."""
        try:
            self.adapters.through([None])
            self._model(input_ids=torch.tensor([[0]], device=self._model.device))
        except Exception:
            self.adapters.leave()
            return False
        return True

    def _take(self, batch: Batch, rows: list[Row], logits: Tensor, prompt_tokens: int) -> None:
        rows = list(rows)
        take(rows, logits)
        self._counters.passed(prompt_tokens, len(rows))
        for row in rows:
            if row.is_over:
                self._leave(batch, row)

    def _leave(self, batch: Batch, row: Row) -> None:
        batch.leave(row)
        self._counters.ended(row)


def as_failure(error: Exception, what: str) -> RequestFailed:
    """The error that a client is told of."""
    said = machine_refusal(error) or (str(error) if isinstance(error, TrimtabError) else repr(error))
    return RequestFailed(f"{what}: {said}")
