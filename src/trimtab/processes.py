"""Several processes that train one model, as one of them sees them.

The first of them leads: it alone writes files and talks to the user, and it says what is done next; the others do the
same with their copy of the model (`together`, `Processes.follow`). Each takes its share of every batch, so a run is the
same run whatever the number of its processes. Where one of them ends, all do: the first to end says so in the store
that the launcher keeps, and what breaks off in the others on that account is told by nobody. `trimtab.launching` brings
them together.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from trimtab.errors import STOPS, EndedElsewhere, Interrupted, RunError, Terminated

if TYPE_CHECKING:
    from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_AT_ONCE = 32 * 2**20
"""Numbers of the gradients that are summed in one piece."""


@dataclass
class Processes:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: which one this is; 0 leads.
        size: how many there are.
        local: how many of them are on this machine.
        sharded: whether the model's frozen weights are spread over them, so that none can run it alone.
    """

    rank: int = 0
    size: int = 1
    local: int = 1
    sharded: bool = False
    store: Any = field(default=None, repr=False)
    _called: bool = field(default=False, repr=False)

    @property
    def leads(self) -> bool:
        """Whether this process leads."""
        return self.rank == 0

    def share(self, rows: Sequence[T]) -> Sequence[T]:
        """This process's rows of a batch: every ``size``-th; possibly none."""
        return rows[self.rank :: self.size]

    def gathered(self, value: T) -> list[T]:
        """The ``value`` of each process, in their order."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def summed(self, value: float) -> float:
        """The sum of ``value`` over the processes."""
        return sum(self.gathered(value)) if self.size > 1 else value

    def total(self, tensor: Tensor) -> Tensor:
        """``tensor``, summed over the processes in place."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """Go on when all processes have come to this place."""
        self.gathered(None)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients of ``parameters`` over the processes, all of which have the same ones. A parameter that has
        a gradient in none of them keeps none."""
        if self.size > 1:
            sum_gradients(list(parameters), self.total)

    def follow(self, work: object) -> None:
        """Do with ``work`` what the leading process does with its own, until that is done."""
        import torch.distributed as dist

        while True:
            said: list[Any] = [None]
            dist.broadcast_object_list(said, src=0)
            if said[0] is None:
                return
            name, arguments, options = said[0]
            getattr(work, name)(*arguments, **options)

    def call(self, said: object) -> None:
        """Say to the others what is done next; None: nothing any more."""
        if self.size > 1 and self.leads:
            import torch.distributed as dist

            dist.broadcast_object_list([said], src=0)

    def reason(self, error: BaseException) -> BaseException:
        """What is to be raised for ``error``: itself, or what ended another process, whose connections break off then
        and whose launcher ends the rest."""
        if self.size == 1:
            return error
        stopped = isinstance(error, STOPS)
        lost = _is_lost(error.__context__ if stopped else error)
        try:
            ending = self.ending(wait=3.0 if lost else 0.5 if stopped else 0.0)
        except STOPS:  # by the launcher, which ends all that are left when one is lost
            if not lost:
                raise
            ending = self.ending()
        if ending is not None and ending["rank"] != self.rank:
            if not ending["stopped"]:
                return EndedElsewhere(
                    f"process {ending['rank']} of {self.size} has ended the run: {ending['said']}", ending["code"]
                )
            if lost or not self.leads:
                return KeyboardInterrupt() if ending["code"] == 130 else Terminated(ending["code"])
        if lost and ending is None:
            return RunError(
                f"another of the {self.size} processes has ended without a word, as one does that is killed (often for "
                "lack of memory); if training had begun, --resume goes on from its last checkpoint"
            )
        return error

    def ending(self, wait: float = 0.0) -> dict[str, Any] | None:
        """What the first process to end has said, if one has ended."""
        until = time.monotonic() + wait
        while self.store is not None:
            try:
                if self.store.check(["ending"]):
                    found: dict[str, Any] = json.loads(self.store.get("ending"))
                    return found
            except RuntimeError:  # the process that kept the store has ended itself
                return {"rank": -1, "code": 1, "stopped": False, "said": "the first one is gone"}
            if time.monotonic() >= until:
                break
            time.sleep(0.1)
        return None

    def ended(self, error: BaseException) -> BaseException:
        """Say to the other processes that this one ends by ``error``; gives what it raises: one of them all tells why,
        and of a stop that is always the leading one."""
        error = self.reason(error)
        stopped = isinstance(error, (Interrupted, *STOPS))
        code = getattr(error, "code", 130 if stopped else 1)
        if not isinstance(error, EndedElsewhere) and self.store is not None:
            with suppress(RuntimeError):
                if self.store.add("endings", 1) == 1:
                    ending = {"rank": self.rank, "code": code, "stopped": stopped, "said": str(error)[:2000]}
                    self.store.set("ending", json.dumps(ending))
                elif not stopped:
                    error = self._second(error)
        if stopped and not self.leads:
            return EndedElsewhere(f"process {self.rank} of {self.size} was stopped", code)
        return error

    def _second(self, error: BaseException) -> BaseException:
        """What is raised for an ``error`` that is not the first one: another process tells of it."""
        ending = self.ending(wait=3.0) or {"code": 1}
        return EndedElsewhere(f"another of the {self.size} processes ended first ({error})", ending["code"] or 1)


_here = Processes()


def here() -> Processes:
    """The processes of the run that is going on; one, where none is."""
    return _here


@contextmanager
def being(group: Processes) -> Iterator[None]:
    """While open, ``group`` is what `here` gives."""
    global _here
    before, _here = _here, group
    try:
        yield
    finally:
        _here = before


def together(
    method: Callable[Concatenate[Any, P], R],
) -> Callable[Concatenate[Any, P], R]:
    """A method that all processes do at the same time: where the leading one calls it, the others do too, with the same
    arguments. Inside of such a method no other one is called for."""

    @functools.wraps(method)
    def call(self: Any, /, *arguments: P.args, **options: P.kwargs) -> R:
        group = here()
        if group._called or group.size == 1:
            return method(self, *arguments, **options)
        group._called = True
        try:
            group.call((method.__name__, arguments, options))
            return method(self, *arguments, **options)
        except Exception as error:
            reason = group.reason(error)
            if reason is error:
                raise
            raise reason from None
        finally:
            group._called = False

    return call


def divided(batches: Sequence[T], work: Callable[[T], R], *, one_pass: bool = False) -> Iterator[tuple[T, R]]:
    """Each of ``batches`` with what ``work`` makes of it, in order; each process works on its share of them.

    Args:
        work: depends on the batch alone, so that the result is that of one process, bit for bit; it is sent on.
        one_pass: whether it runs the model exactly once. Only such work can be divided where the model is sharded: all
            processes must run it equally often.
    """
    group = here()
    if group.size == 1 or (group.sharded and not one_pass):
        for batch in batches:
            yield batch, work(batch)
        return
    for start in range(0, len(batches), group.size):
        turn = batches[start : start + group.size]
        idle = group.rank >= len(turn)
        found = work(turn[0 if idle else group.rank]) if not idle or group.sharded else None
        yield from zip(turn, group.gathered(found), strict=False)


def sum_gradients(parameters: Sequence[nn.Parameter], total: Callable[[Tensor], Tensor]) -> None:
    """Sum the gradients of ``parameters`` in place by ``total``, which sums a tensor over the processes; those that are
    None in some of them count as zero there."""
    import torch

    if not parameters:
        return
    there = torch.tensor([float(one.grad is not None) for one in parameters], device=parameters[0].device)
    used = [one for one, count in zip(parameters, total(there).tolist(), strict=True) if count]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for piece in _pieces(used):
        flat = total(torch.cat([one.reshape(-1) for one in piece]))
        for one, value in zip(piece, flat.split([one.numel() for one in piece]), strict=True):
            one.copy_(value.view_as(one))


def _is_lost(error: BaseException | None) -> bool:
    """Whether ``error`` is of a connection to another process."""
    if not isinstance(error, RuntimeError):
        return False
    from torch.distributed import DistError

    text = str(error)
    return isinstance(error, DistError) or any(word in text for word in ("gloo", "NCCL", "Connection closed"))


def _pieces(trained: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """The gradients in lists of one dtype, none of which has very many numbers."""
    piece: list[Tensor] = []
    for parameter in sorted(trained, key=lambda one: str(one.dtype)):
        gradient = parameter.grad
        assert gradient is not None, "those without were left out"
        if piece and (
            piece[0].dtype != gradient.dtype or sum(one.numel() for one in piece) + gradient.numel() > _AT_ONCE
        ):
            yield piece
            piece = []
        piece.append(gradient)
    if piece:
        yield piece
