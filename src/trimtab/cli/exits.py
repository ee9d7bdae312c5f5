"""What a mistake looks like from outside: a sentence on stderr and an exit code, never a traceback of ours.

Exit codes: 0 done, 1 an error of ours, 2 wrong usage, 130 interrupted, 143 told to end (SIGTERM), 129 the terminal was
closed (SIGHUP).
"""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from trimtab.cli.terminal import make_safe
from trimtab.errors import (
    STOPS,
    EndedElsewhere,
    Interrupted,
    TrimtabError,
    TrimtabWarning,
    machine_refusal,
    printable,
)
from trimtab.launching import speaks
from trimtab.machine import keep_few_products
from trimtab.signals import listening

_CONTROL = re.compile("[\x7f-\x9f]")
# transformers imports the first three where they are installed, needed or not, and they tell what kernels they have
# not. The last tells each of its many tries to reach the hub; the error in the end says it once.
_CHATTY = ("torchao", "bitsandbytes", "torch.utils._pytree", "huggingface_hub.utils._http")


def say(text: str = "", *, error: bool = False, end: str = "\n") -> None:
    """Print a plain line, or with ``end`` a part of one, to standard error if it is an ``error``. Whatever it quotes
    cannot drive the terminal."""
    print(printable(text), file=sys.stderr if error else sys.stdout, end=end, flush=True)


def say_note(sentence: str | None) -> None:
    """Print what the user should know, if there is anything, to standard error."""
    if sentence is not None:
        say(f"note: {sentence}", error=True)


def say_json(value: object) -> None:
    """Print ``value`` as a line of JSON. What JSON may hold as it is and a terminal may not is escaped."""
    say(_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False, default=str)))


def program(arguments: Sequence[str], told: str | None, work: Callable[..., int | None]) -> int:
    """The exit code of a program of its own, such as a study's, which goes on where it stopped: ``work(*arguments)``.
    Asked for help, or given nothing, it prints ``told`` in place of that."""
    if not arguments or "--help" in arguments:
        say(told or "")
        return 0 if arguments else 2

    def stoppable() -> int | None:
        try:
            return work(*arguments)
        except STOPS as stop:
            raise Interrupted.by(stop, "interrupted; what is done is kept. Go on with the same command.") from None

    with listening():
        return exit_code(stoppable)


def exit_code(work: Callable[[], int | None]) -> int:
    """Do ``work`` and give its exit code. What it raises for the user to read is printed to stderr."""
    make_safe()
    keep_few_products()
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with _warnings_as_notes():
            return work() or 0
    except Interrupted as stopped:
        if speaks():
            say(f"\n{stopped}", error=True)
        return stopped.code
    except STOPS as stop:
        if speaks():
            say("\ninterrupted; nothing was begun", error=True)
        return Interrupted.by(stop, "").code
    except EndedElsewhere as ended:
        return ended.code
    except TrimtabError as error:
        say(f"trimtab: {error}", error=True)
        return 1
    except Exception as error:
        # The machine's fault and not ours, such as a full disk. (A pipe whose reader went away raises nothing.)
        said = machine_refusal(error)
        if said is None and isinstance(error, OSError):
            said = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
        if said is None:
            raise
        say(f"trimtab: {said}", error=True)
        return 1


@contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """While open, our warnings are printed as notes, each of them once; those of libraries as ever."""
    as_ever, told = warnings.showwarning, set[str]()

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if not issubclass(category, TrimtabWarning):
            as_ever(message, category, *place, **more)
        elif (sentence := str(message)) not in told:
            told.add(sentence)
            say_note(sentence)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = as_ever
