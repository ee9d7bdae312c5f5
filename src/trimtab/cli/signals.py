"""Ctrl-C and SIGTERM: the first one ends what is done in good order, the second one ends the process at once.

Hardly anything is imported here, so that both are heard from the very beginning.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from trimtab.errors import Terminated

_heard: list[int] = []
"""The signals that were raised and not yet dealt with."""


def forget() -> None:
    """What was heard is dealt with, and the program goes on, as a conversation does after Ctrl-C."""
    _heard.clear()


@contextmanager
def listening() -> Iterator[None]:
    """While open, the first SIGINT raises KeyboardInterrupt and the first SIGTERM `Terminated`.

    SIGINT is heard where it was ignored, too: a shell's script has it so for what it starts in the background, and
    whoever sends it there by hand means it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _heard.clear()
    before = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    if _heard:
        with suppress(OSError, ValueError, AttributeError):
            if sys.stderr.isatty():
                os.write(sys.stderr.fileno(), b"\x1b[?25h\n")  # a bar may have hidden the cursor
        os._exit(128 + number)
    _heard.append(number)
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
