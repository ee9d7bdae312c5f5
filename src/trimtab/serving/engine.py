"""The engine: one thread that answers all requests, those for different adapters in one batch.

    with Engine.open("smollm2-135m", {"legal": Path("runs/legal"), "fr": Path("adapters/fr")}) as engine:
        ids = engine.encode("The tenant", "legal")
        for piece in engine.submit(Request("legal", tuple(ids), max_new_tokens=64)):
            print(piece.text, end="")

A turn of the thread: do what was asked beside requests (an adapter comes or goes), end what is over, read the prompts
of newcomers as far as there is room, a long one in parts, and take one step with all rows. Only this thread touches the
model; other threads leave requests in a queue, and read what becomes of them from their tickets.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import torch

from trimtab.errors import ConfigError, TrimtabError, did_you_mean
from trimtab.models.locate import Source
from trimtab.models.positions import positions_of
from trimtab.runs.load import doubt_of, load_run_model
from trimtab.runs.named import Named
from trimtab.serving.admission import encoded, most_tokens, new_tokens_allowed
from trimtab.serving.counters import Counters
from trimtab.serving.passes import READ_AT_ONCE, Passes, as_failure
from trimtab.serving.requests import (
    BadRequest,
    EngineClosed,
    Limits,
    Model,
    QueueFull,
    Request,
    RequestFailed,
    Stats,
    UnknownModel,
)
from trimtab.serving.shelf import Reads, Shelf
from trimtab.serving.ticket import Ticket
from trimtab.serving.writing import Row

T = TypeVar("T")

_USUAL = Limits()


class Engine:
    """Answers requests for a model and its adapters, until it is closed.

    Args:
        model: a causal language model of transformers, in eval mode, which nobody else uses from now on.
        tokenizer: its tokenizer, which belongs to the engine's callers; the engine writes with a copy.
        name: under which the bare model is asked.
        source: where the model came from.
        form: the form of its rows, where it is a run's.
        limits: what it takes on.
        doubts: what the user should know of the adapters that it opens with, a sentence each.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        source: Source,
        form: str | None = None,
        limits: Limits = _USUAL,
        doubts: Iterable[str] = (),
    ) -> None:
        self._doubts = tuple(doubts)
        self.name, self.limits = name, limits
        self._model, self._base = model, Reads.of(model, tokenizer, form)
        self._positions = positions_of(model).limit()
        self._vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self._folder, self._since = source.location, time.time()
        self._nbytes = sum(one.nbytes for one in model.parameters())
        self._shelf = Shelf(model, source, self._base, limits)
        self._counters = Counters()
        self._most = most_tokens(limits, self._positions)
        self._passes = Passes(model, self._counters, self._most or math.inf)
        self._queue: deque[Row] = deque()
        self._jobs: deque[Callable[[], None]] = deque()
        self._state: Literal["ready", "closing", "closed", "broken"] = "ready"
        self._broken_by = ""
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="trimtab-engine", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls,
        target: str,
        adapters: Mapping[str, Path] | None = None,
        *,
        limits: Limits = _USUAL,
        name: str | None = None,
    ) -> Engine:
        """The engine for a run's folder or a model's name, which is loaded here; the run's own adapter is asked by the
        name of its folder, the bare model by that of its source, or by ``name``.

        Raises what loading the model or an adapter raises, and ConfigError where two models have one name.
        """
        named = Named.find(target, base=False)
        named.require_writer()
        tokenizer = named.reader()
        own: dict[str, Path] = {}
        if named.run is not None and named.config is not None:
            model = load_run_model(named.run, named.config, adapter=False)
            own[named.run.path.resolve().name] = named.run.path
        else:
            model = named.load()
        base = name or (Path(named.source.name).name if named.source.kind != "hub" else named.source.name)
        wanted = own | dict(adapters or {})
        if base in wanted or own.keys() & (adapters or {}).keys():
            twice = base if base in wanted else next(iter(own))
            raise ConfigError(f"two models are called {twice!r}: give the adapter, or the served model, another name")
        said = (named.doubt, *(doubt_of(folder, named.source) for folder in (adapters or {}).values()))
        doubts = filter(None, said)
        engine = cls(model, tokenizer, name=base, source=named.source, form=named.form, limits=limits, doubts=doubts)
        try:
            for one, folder in wanted.items():
                engine.add_adapter(one, folder)
        except BaseException:
            engine.close(0)
            raise
        return engine

    # Called by any thread ------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Ticket:
        """Take a request, which is answered in its turn; its pieces come by the ticket.

        Raises BadRequest, TooLong, UnknownModel, QueueFull or EngineClosed.
        """
        try:
            with self._changed:
                self._require_ready()
                adapter = None if request.model == self.name else self._held_as(request.model)
                reads = self.reads(request.model)
                limit = new_tokens_allowed(request, self.limits, vocabulary=self._vocabulary, positions=self._positions)
                if len(self._queue) >= self.limits.queue + max(0, self.limits.rows - len(self._passes.rows)):
                    raise QueueFull(f"{len(self._queue)} requests wait already; come again later")
                seconds = min((one for one in (request.seconds, self.limits.seconds) if one is not None), default=None)
                ticket = Ticket(request)
                stops = reads.stops(request)
                row = Row(ticket, adapter, reads.speller, ends=reads.ends, stops=stops, limit=limit, seconds=seconds)
                self._queue.append(row)
                self._changed.notify_all()
                return ticket
        except TrimtabError as error:
            self._counters.refuse(error)
            raise

    def models(self) -> list[Model]:
        """The bare model, and the adapters in the order in which they came."""
        return [
            Model(self.name, adapter=False, folder=self._folder, since=self._since, nbytes=self._nbytes),
            *self._shelf.models(),
        ]

    def reads(self, model: str) -> Reads:
        """What prompts for a model are made with. Raises UnknownModel."""
        return self._base if model == self.name else self._shelf.reads(self._known(model))

    def encode(self, text: str, model: str) -> list[int]:
        """The tokens of a prompt, as in training. Raises UnknownModel; BadRequest for a text without any; TooLong for
        one that is far too long, before all of it is read."""
        return encoded(text, self.reads(model).tokenizer, self._most)

    def add_adapter(self, name: str, folder: Path) -> Model:
        """Take in the adapter of a folder, ours or PEFT's, or of a run's. It is read at once, so that it is known to
        fit.

        Raises AdapterError and the like, after which all is as it was, or EngineClosed.
        """
        if name == self.name:
            raise ConfigError(f"{name}: the bare model is called so; give the adapter another name")
        return self._in_turn(lambda: self._shelf.add(name, folder, self._in_use([])))

    def drop_adapter(self, name: str) -> None:
        """Take no more requests for an adapter; those that were taken are answered, and then it leaves memory. Raises
        UnknownModel, or BadRequest for the bare model."""
        if name == self.name:
            raise BadRequest(f"{name}: the bare model cannot be dropped")
        with self._changed:
            self._shelf.drop(self._known(name))
            self._changed.notify_all()

    def stats(self) -> Stats:
        """How it stands."""
        counted, shelf = self._counters, self._shelf
        return Stats(
            state=self._state,
            queued=len(self._queue),
            running=len(self._passes.rows),
            prompt_tokens=counted.prompt_tokens,
            completion_tokens=counted.completion_tokens,
            tokens_per_second=counted.rate(),
            finished=dict(counted.finished),
            refused=dict(counted.refused),
            steps=counted.steps,
            first_token=counted.first_token.histogram(),
            duration=counted.duration.histogram(),
            adapters_known=len(shelf.models()),
            adapters_loaded=shelf.loaded,
            adapter_bytes=shelf.nbytes,
            adapter_loads=shelf.loads,
            adapter_evictions=shelf.evictions,
            notes=self._notes(),
        )

    def _notes(self) -> tuple[str, ...]:
        alone, apart = self._passes.why_alone, self._passes.adapters.why_apart
        said = [*self._doubts]
        said += [f"requests are answered one after the other: {alone}"] if alone is not None else []
        said += [f"requests for different adapters do not share batches: {apart}"] if apart is not None else []
        return (*said, self._broken_by) if self._broken_by else tuple(said)

    def close(self, grace: float | None = None) -> None:
        """Take no more requests, refuse those that wait, let the running ones finish for ``grace`` seconds (None: as
        the limits say), and cut them then. Returns once all is over."""
        with self._changed:
            if self._state in ("ready", "closing"):
                self._state = "closing"
                allowed = self.limits.grace if grace is None else grace
                self._passes.cut_at = min(self._passes.cut_at, time.monotonic() + allowed)
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _known(self, model: str) -> str:
        known = [one.name for one in self._shelf.models()]
        if model not in known:
            raise UnknownModel(f"there is no model {model!r}.{did_you_mean(model, [self.name, *known])}")
        return model

    def _held_as(self, model: str) -> str:
        return self._shelf.held_as(self._known(model))

    def _require_ready(self) -> None:
        if self._state != "ready":
            raise EngineClosed(f"the engine is {self._state}, and takes no more requests")

    def _in_turn(self, job: Callable[[], T]) -> T:
        """What ``job`` gives in the engine's thread, between two steps and outside of ``per_row``."""
        done: Future[T] = Future()

        def run() -> None:
            try:
                self._passes.adapters.leave()
                done.set_result(job())
            except BaseException as error:
                done.set_exception(error)

        with self._changed:
            self._require_ready()
            self._jobs.append(run)
            self._changed.notify_all()
        return done.result()

    # The engine's own thread ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        torch.set_grad_enabled(False)  # of this thread
        try:
            while self._wait():
                self._turn()
            self._end("closed", "the engine was closed before this request was answered")
        except Exception as error:
            self._broken_by = f"the engine cannot go on: {error}"
            self._end("broken", self._broken_by)

    def _wait(self) -> bool:
        """Wait until there is something to do; False once all is over."""
        with self._changed:
            while True:
                if self._state == "closing":
                    self._refuse_waiting("the engine is closing, and did not begin this request")
                    if not (self._passes.rows or self._jobs):
                        return False
                if self._passes.rows or self._jobs or self._queue or self._shelf.unswept(self._wanted()):
                    return True
                self._changed.wait()

    def _turn(self) -> None:
        while self._jobs:
            self._jobs.popleft()()
        with self._changed:
            unswept = self._shelf.unswept(wanted := self._wanted())
        if unswept:
            self._passes.adapters.leave()
            self._shelf.sweep(wanted)
        self._look_at_queue()
        if self._passes.why_alone is not None:
            if (row := self._next([])) is not None and self._has_adapter(row, []):
                self._passes.write_alone(row, self._look_at_queue)
            return
        self._passes.look_after()
        newcomers: list[Row] = []
        while (row := self._next(newcomers)) is not None:
            if self._has_adapter(row, newcomers):
                newcomers.append(row)
        if newcomers:
            self._passes.read(newcomers)
        self._passes.read_on()
        self._passes.step()
        if self._passes.is_broken:
            raise RequestFailed("too many passes failed one after the other")

    def _look_at_queue(self) -> None:
        """End what waits no longer: its client has left, or its time is up."""
        with self._changed:
            for row in [row for row in self._queue if row.check()]:
                self._queue.remove(row)
                self._counters.ended(row)

    def _next(self, newcomers: list[Row]) -> Row | None:
        """The next row of the queue, to be read with other newcomers; None if it has to wait for room."""
        with self._changed:
            if not self._queue:
                return None
            row, others = self._queue[0], [*self._passes.rows, *newcomers]
            width = max(one.prompt_tokens for one in (row, *newcomers))
            if len(others) >= self.limits.rows or (newcomers and (len(newcomers) + 1) * width > READ_AT_ONCE):
                return None
            if not self._passes.has_time_for(row):
                return None
            most = max(one.most_tokens for one in (row, *others))
            if others and self.limits.batch_tokens is not None and (len(others) + 1) * most > self.limits.batch_tokens:
                return None
            if row.adapter is not None and not self._shelf.has_room(row.adapter, self._in_use(newcomers)):
                return None
            return self._queue.popleft()

    def _has_adapter(self, row: Row, newcomers: list[Row]) -> bool:
        """Have the row's adapter in memory; whether that went well."""
        if row.adapter is None:
            return True
        try:
            if not self._shelf.is_loaded(row.adapter):
                self._passes.adapters.leave()
            self._shelf.load(row.adapter, self._in_use(newcomers))
            self._passes.adapters.enter()
        except Exception as error:
            row.fail(as_failure(error, f"the adapter {row.request.model} cannot be read"))
            self._counters.ended(row)
            return False
        return True

    def _in_use(self, newcomers: list[Row]) -> set[str]:
        """The adapters that rows go through, and newcomers will."""
        return self._passes.in_use() | {row.adapter for row in newcomers if row.adapter is not None}

    def _wanted(self) -> set[str]:
        """Those, and the ones that requests wait for."""
        return self._in_use([*self._queue])

    def _end(self, state: Literal["closed", "broken"], message: str) -> None:
        with self._changed:
            self._state = state
            self._refuse_waiting(message)
            jobs = [*self._jobs]
            self._jobs.clear()
        self._passes.end_all(EngineClosed(message))
        for job in jobs:
            job()

    def _refuse_waiting(self, message: str) -> None:
        for row in self._queue:
            row.fail(EngineClosed(message))
            self._counters.ended(row)
        self._queue.clear()
