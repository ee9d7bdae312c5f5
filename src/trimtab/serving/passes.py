"""The model's passes over the rows that are being answered, and what becomes of the rows when one fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from trimtab.errors import TrimtabError, machine_refusal
from trimtab.serving.alone import write_alone
from trimtab.serving.batch import Adapters, Batch, reads_in_parts, why_alone
from trimtab.serving.counters import Counters
from trimtab.serving.requests import RequestFailed
from trimtab.serving.writing import Row, take

T = TypeVar("T")

READ_AT_ONCE = 512
"""Most tokens of prompts, with their padding, that are read in one pass, so that rows that are being written need not
wait long. A longer prompt is read in parts, a part between two steps."""
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

    def __init__(self, model: Any, counters: Counters, longest: float) -> None:
        self.adapters, self.cut_at = Adapters(model), float("inf")
        self.why_alone = why_alone(model, _bare, longest)
        self._in_parts = self.why_alone is None and reads_in_parts(model, _bare)
        self._model, self._counters = model, counters
        self._batches: dict[str | None, Batch] = {}
        self._alone: Row | None = None
        self._reading: tuple[Row, Cache] | None = None  # a long prompt, and what is kept of its beginning
        self._failures = 0
        self.is_broken = False

    @property
    def rows(self) -> list[Row]:
        """Those that are being answered."""
        alone, reading = self._alone, self._reading
        rows = [row for batch in list(self._batches.values()) for row in batch.rows]
        return [*rows, *([reading[0]] if reading is not None else []), *([alone] if alone is not None else [])]

    def in_use(self) -> set[str]:
        """The adapters that rows go through."""
        return {row.adapter for row in self.rows if row.adapter is not None}

    def look_after(self) -> None:
        """End what is over: its client has left, its time is up, or all is cut."""
        for batch in self._batches.values():
            for row in list(batch.rows):
                if self._is_over(row):
                    self._leave(batch, row)
        if self._reading is not None and self._is_over(row := self._reading[0]):
            self._reading = None
            self._counters.ended(row)

    def has_time_for(self, row: Row) -> bool:
        """Whether the prompt of ``row`` can be read now: of the long ones, one after the other."""
        return self._reading is None or not self._is_long(row)

    def read(self, newcomers: list[Row]) -> None:
        """Read the prompts of newcomers, who then belong to a batch and have chosen their first token."""
        together: dict[str | None, list[Row]] = {}
        for row in newcomers:
            if self._is_long(row):
                self._reading = row, self._batch_of(row).empty_cache()
            else:
                together.setdefault(self._key(row), []).append(row)
        for rows in together.values():
            batch = self._batch_of(rows[0])
            if (read := self._tried(partial(batch.read, rows), rows)) is not None:
                self._join(batch, rows, *read)

    def read_on(self) -> None:
        """A part more of the long prompt that is being read; after the last one, its row is as one of `read`."""
        if self._reading is None:
            return
        row, cache = self._reading
        batch = self._batch_of(row)
        logits = self._tried(partial(batch.read_on, row, cache, READ_AT_ONCE), [row])
        if logits is None or cache.get_seq_length() == row.prompt_tokens:
            self._reading = None
        if logits is not None and self._reading is None:
            self._join(batch, [row], logits, cache)

    def _is_long(self, row: Row) -> bool:
        return self._in_parts and row.prompt_tokens > READ_AT_ONCE

    def _key(self, row: Row) -> str | None:
        return row.adapter if self.adapters.why_apart else None

    def _batch_of(self, row: Row) -> Batch:
        return self._batches.setdefault(self._key(row), Batch(self._model, self.adapters.through))

    def _join(self, batch: Batch, rows: list[Row], logits: Tensor, cache: Cache) -> None:
        if self._tried(partial(batch.join, rows, cache), rows, spoils=batch) is not None:
            self._take(batch, rows, logits, sum(row.prompt_tokens for row in rows))

    def step(self) -> None:
        """One token more for every row."""
        for key, batch in list(self._batches.items()):
            if batch.rows and (logits := self._tried(batch.step, batch.rows, spoils=batch)) is not None:
                self._take(batch, batch.rows, logits, 0)
            if not batch.rows:
                del self._batches[key]  # (one that a long prompt will join is made again)

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
        self._batches, self._alone, self._reading = {}, None, None
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


def _bare(model: Any) -> Batch:
    return Batch(model, lambda names: None)


def as_failure(error: Exception, what: str) -> RequestFailed:
    """The error that a client is told of."""
    said = machine_refusal(error) or (str(error) if isinstance(error, TrimtabError) else repr(error))
    return RequestFailed(f"{what}: {said}")
