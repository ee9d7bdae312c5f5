"""Ctrl-C, SIGTERM and a terminal that is closed: the first one ends what is done in good order, a second Ctrl-C or
SIGTERM ends the process at once.

Hardly anything is imported here, so that both are heard from the very beginning.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from trimtab.errors import Terminated

PASSED_ON = 5.0
"""Seconds in which torchrun passes a signal on to processes that the terminal may have told already."""

HANGUP = getattr(signal, "SIGHUP", None)
"""Sent when the terminal is closed, or the connection to it is lost; Windows has none."""

_heard: list[float] = []
"""When signals were raised that are not yet dealt with."""


def forget() -> None:
    """What was heard is dealt with, and the program goes on, as a conversation does after Ctrl-C."""
    _heard.clear()


def heard() -> bool:
    """Whether a signal was raised that is not yet dealt with."""
    return bool(_heard)


@contextmanager
def listening(ask: Callable[[KeyboardInterrupt | Terminated], None] | None = None) -> Iterator[None]:
    """While open, the first SIGINT raises KeyboardInterrupt and the first SIGTERM or SIGHUP `Terminated`; another
    SIGINT or SIGTERM after that ends the process. (The system and the shell send SIGHUP, so it may come twice.)

    SIGINT is heard where it was ignored, too: a shell's script has it so for what it starts in the background, and
    whoever sends it there by hand means it. SIGHUP is not: nohup has it so.

    Args:
        ask: is given what would be raised, in place of that, when the first signal comes; the next one is raised.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _heard.clear()
    asked: list[float] = []

    def hear(number: int, frame: FrameType | None) -> None:
        if number == HANGUP and (asked or _heard):
            return
        stop = KeyboardInterrupt() if number == signal.SIGINT else Terminated(128 + number)
        if ask is not None and not asked:
            asked.append(time.monotonic())
            ask(stop)
        elif not _is_passed_on([*asked, *_heard]):
            if _heard:
                _end(number)
            _heard.append(time.monotonic())
            raise stop

    numbers = [signal.SIGINT, signal.SIGTERM]
    if HANGUP is not None and signal.getsignal(HANGUP) is not signal.SIG_IGN:
        numbers.append(HANGUP)
    before = {number: signal.signal(number, hear) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_passed_on(earlier: list[float]) -> bool:
    """Whether a signal that comes now is one of the ``earlier`` ones again, passed on by torchrun."""
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    return launched and bool(earlier) and time.monotonic() - earlier[-1] < PASSED_ON


def _end(number: int) -> None:
    with suppress(OSError, ValueError, AttributeError):
        if sys.stderr.isatty():
            os.write(sys.stderr.fileno(), b"\x1b[?25h\n")  # a bar may have hidden the cursor
    os._exit(128 + number)
