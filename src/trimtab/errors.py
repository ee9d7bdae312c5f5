"""Every error that a user can meet. The command line prints a TrimtabError without a traceback, and exits with 1.

A message names the place, what was expected, what came, and what to do.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Control characters but for tab and line feed, separators of lines, what turns the direction of text around, and halves
# of surrogate pairs, which cannot be written at all.
_ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """``text`` as it can be printed, wherever it came from: a character that would drive a terminal, or turn the text
    around it, is shown as its escape, such as ``\\x1b``. Everything that is printed or put on a page passes here."""
    return _ACTING.sub(lambda acting: ascii(acting[0])[1:-1], text.replace("\r\n", "\n"))


class TrimtabError(Exception):
    """Base of every error that trimtab raises on purpose. Its message is printable, whatever names it quotes."""

    def __init__(self, *said: object) -> None:
        super().__init__(*(printable(one) if isinstance(one, str) else one for one in said))


class TrimtabWarning(UserWarning):
    """What a user should know although nothing failed: every warning of trimtab's. The command line prints it as a
    note; a program silences it by `warnings.simplefilter("ignore", trimtab.TrimtabWarning)`, or makes it an error."""

    def __init__(self, said: str) -> None:
        super().__init__(printable(said))


class ConfigError(TrimtabError):
    """A key or a value in a YAML file or an override is not what it should be."""


class PlanError(TrimtabError):
    """A rule of a plan matches nothing, or cannot be applied to what it matches."""


class SurgeryError(TrimtabError):
    """The model is not in the state that attaching, detaching or merging needs."""


class AdapterError(TrimtabError):
    """An adapter on disk is unreadable, incomplete, or made for another model."""


class DataError(TrimtabError):
    """A data file or one of its rows cannot be used."""


class ModelError(TrimtabError):
    """A model cannot be found, read, or held in memory."""


class RunError(TrimtabError):
    """A run folder is missing, taken, or cannot be resumed, or a run went wrong."""


class MachineError(TrimtabError):
    """The machine refuses: a full disk, too little memory, too many open files, no permission."""


class Interrupted(TrimtabError):  # noqa: N818 -- not a mistake of anybody's
    """The user stopped a run; the message says how to go on.

    ``code``: what the command line exits with, 130 after Ctrl-C, 143 after SIGTERM and 129 after SIGHUP.
    """

    def __init__(self, message: str, code: int = 130) -> None:
        super().__init__(message)
        self.code = code

    @classmethod
    def by(cls, stop: BaseException, message: str) -> Interrupted:
        """The one for what ``stop`` ended: one of `STOPS`, or another of these."""
        return cls(message, stop.code if isinstance(stop, (Interrupted, Terminated)) else 130)


class EndedElsewhere(TrimtabError):  # noqa: N818 -- not a mistake of this process
    """Another of several processes has ended the run they were at, and tells why; ``code``: what it exits with."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class Terminated(SystemExit):
    """What SIGTERM raises, and SIGHUP of a terminal that is closed, as Ctrl-C raises KeyboardInterrupt. Where nothing
    catches it, the process ends with ``code``, 143 or 129."""

    code: int

    def __init__(self, code: int = 143) -> None:
        super().__init__(code)


STOPS = (KeyboardInterrupt, Terminated)
"""What the user's wish to stop raises."""


# What the machine said, and what helps. The words of ``os.strerror`` are looked for in messages, too, since libraries
# in Rust and C++ raise errors of their own that quote them.
_REFUSALS = {
    errno.ENOSPC: ("the disk is full", "free some of it"),
    errno.EDQUOT: ("your quota of this disk is used up", "free some of it"),
    errno.EFBIG: ("a file grew larger than is allowed here", "raise the limit (ulimit -f unlimited)"),
    errno.EMFILE: ("too many files are open", "raise the limit (ulimit -n 4096)"),
    errno.ENFILE: ("too many files are open on this machine", "close other programs"),
    errno.ENOMEM: ("there is not enough memory", "close other programs, or take smaller batches or a smaller model"),
    errno.EROFS: ("the disk can only be read", "choose a place that can be written"),
    errno.EACCES: ("permission denied", "choose another place, or have its owner allow it (chmod)"),
    errno.EPERM: ("permission denied", "choose another place, or have its owner allow it (chmod)"),
    errno.EEXIST: ("something of that name is in the way", "choose another place"),
    errno.ENOTDIR: ("a file is in the way of a folder", "choose another place"),
    errno.EIO: ("the disk reports an error", "look after the disk, or choose another"),
    errno.ENAMETOOLONG: ("the file's name is too long", "choose a shorter one"),
}
_OF_ROOM = (errno.ENOSPC, errno.EDQUOT)
_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")
# torch.save says no more than that its file is shorter than it should be.
_OF_CUT_FILES = ("inline_container.cc", "PytorchStreamWriter failed", "iostream error")


@contextmanager
def machine_errors(place: Path, *, needed: Callable[[], int] = lambda: 0, then: str = "") -> Iterator[None]:
    """Turn what the machine refuses in here into a MachineError, whose message ends with ``then``, what to do next. An
    error that says so already gets that ending. For the other arguments see `machine_refusal`."""
    try:
        yield
    except MachineError:
        raise
    except TrimtabError as error:
        if error.__cause__ is None or machine_refusal(error.__cause__) is None:
            raise
        raise MachineError(f"{error}{then}") from error.__cause__
    except Exception as error:
        refusal = machine_refusal(error, place, needed=needed())
        if refusal is None:
            raise
        raise MachineError(f"{refusal}{then}") from error


def machine_refusal(error: BaseException, place: Path | str | None = None, *, needed: int = 0) -> str | None:
    """What the machine refused when ``error`` was raised, and what helps: ``"a/b.json: the disk is full (1.2 MiB are
    free, about 40.0 MiB are needed); free some of it"``. None if ``error`` is of another kind.

    Args:
        error: is searched with what caused it. Libraries raise many types where the disk or the memory ends.
        place: where it happened, if the error does not name a file itself.
        needed: bytes that what was being written takes in all, where that is known.
    """
    for one in _chain(error):
        if isinstance(one, UnicodeEncodeError):
            # UTF-8 has every character but half of a surrogate pair, which only a damaged text holds.
            helps = "mend the text that it is in" if one.encoding.startswith("utf") else "set PYTHONUTF8=1"
            sign = f"U+{ord(one.object[one.start]):04X}"
            return f"the character {sign} cannot be written in the encoding {one.encoding}; {helps}"
        if isinstance(one, FileNotFoundError) and one.filename is None and _nowhere():
            return "the working directory is gone; change to one that is there (cd)"
        found = _refusal(one)
        if found is None:
            continue
        number, what, helps = found
        file = getattr(one, "filename", None)
        where = os.fsdecode(file) if isinstance(file, (str, bytes)) else place
        if number in _OF_ROOM:
            what += _room(place or where, needed)
        return f"{_shortened(str(where))}: {what}; {helps}" if where is not None else f"{what}; {helps}"
    return None


def _shortened(place: str) -> str:
    """``place``, of which the middle is left out where it is too long for a message."""
    return place if len(place) <= 300 else f"{place[:140]}[...]{place[-140:]}"


def _nowhere() -> bool:
    """Whether the working directory was removed."""
    try:
        os.getcwd()  # noqa: PTH109 -- Path.cwd() is the same
    except FileNotFoundError:
        return True
    return False


def _chain(error: BaseException) -> Iterator[BaseException]:
    """``error``, what it was raised from, and so on. What was merely being handled meanwhile (its context) is left out:
    it was foreseen, and a mistake of ours must not pass for the machine's."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__


def _refusal(error: BaseException) -> tuple[int, str, str] | None:
    """The number of the system's error, its meaning and what helps."""
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        return error.errno, *_REFUSALS[error.errno]
    text = str(error)
    if isinstance(error, MemoryError) or any(words in text for words in _OF_MEMORY):
        return errno.ENOMEM, *_REFUSALS[errno.ENOMEM]
    for number, said in _REFUSALS.items():
        if os.strerror(number) in text:
            return number, *said
    if any(words in text for words in _OF_CUT_FILES):
        return errno.ENOSPC, "a file could not be written to its end, as on a full disk", "free some of it"
    if "can't start new thread" in text:
        return errno.EAGAIN, "there are too many processes or threads", "close other programs"
    return None


def _room(place: Path | str | None, needed: int) -> str:
    """How much is free where ``place`` lies or will lie, and how much is needed; nothing where neither is known."""
    said = [f"about {_mib(needed)} are needed"] if needed else []
    for folder in (Path(place), *Path(place).absolute().parents) if place is not None else ():
        if folder.is_dir():
            said.insert(0, f"{_mib(shutil.disk_usage(folder).free)} are free")
            break
    return f" ({', '.join(said)})" if said else ""


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


_LONGEST_WORD = 1000


def nearest(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The entries of ``known`` that look most like ``word``, best first; possibly none."""
    if len(word) > _LONGEST_WORD:  # nothing is near, and a text of megabytes would take seconds to compare
        return []
    return difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence such as ``" Did you mean 'rank'?"``, or an empty string where nothing is near."""
    near = nearest(word, known, count=1)
    return f" Did you mean '{near[0]}'?" if near else ""
