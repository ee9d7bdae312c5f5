"""A conversation at the terminal, or over a pipe: lines and commands in, answers out as they come."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab.asking import Answer, Conversation
from trimtab.cli.exits import say
from trimtab.cli.terminal import nobody_reads
from trimtab.errors import TrimtabError, did_you_mean
from trimtab.signals import forget

COMMANDS = {
    "/system": "/system TEXT: how the model should answer, from the first turn on; /system alone takes that away",
    "/undo": "/undo: take the last turn back, the question and its answer",
    "/reset": "/reset: forget all turns; the system message stays",
    "/save": "/save FILE: add the conversation to a jsonl file, as a row to train on",
    "/help": "/help: this list",
    "/exit": "/exit: end, as Ctrl-D does",
}
MULTILINE = '"""'
HINT = f"""{MULTILINE} begins and ends a message of several lines, and a \\ at a line's end goes on with the next.
A message that begins with / is written with two: //etc. Ctrl-C stops an answer."""


class Talk:
    """One conversation.

    Args:
        conversation: the model's side of it.
        read: gives the next line, after showing what it is given; raises EOFError at the end.
        interactive: whether a person sits there; a pipe gets answers and nothing else on stdout.
    """

    def __init__(self, conversation: Conversation, read: Callable[[str], str], *, interactive: bool) -> None:
        self._conversation = conversation
        self._read = read
        self._interactive = interactive
        self._column = 0

    def run(self) -> None:
        """Talk until the user ends it, or nobody reads the answers any more."""
        while not nobody_reads():
            forget()  # a Ctrl-C that ended an answer; the next one is not the second of it
            try:
                said = self._message()
                if said is None:
                    break
                if not said.strip():
                    continue
                if said.startswith("/") and not said.startswith("//"):
                    if self._command(said) == "end":
                        return
                else:
                    self._ask(said[1:] if said.startswith("//") else said)
            except KeyboardInterrupt:  # of a line that was begun, or of a long prompt; the conversation goes on
                forget()
                self._tell("", "Ctrl-D or /exit ends the conversation" if self._interactive else "")
            except TrimtabError as error:
                self._tell(str(error))
        if self._interactive:
            say()

    def _message(self) -> str | None:
        """What the user says next, over one line or several; None at the end."""
        try:
            line = self._read("> " if self._interactive else "")
        except EOFError:
            return None
        lines: list[str] = []
        fenced = line.lstrip().startswith(MULTILINE)
        if fenced:
            line = line.lstrip().removeprefix(MULTILINE)
        try:
            while not line.rstrip().endswith(MULTILINE) if fenced else line.endswith("\\"):
                lines.append(line if fenced else line[:-1])
                line = self._read(". " if self._interactive else "")
            lines.append(line.rstrip().removesuffix(MULTILINE) if fenced else line)
        except EOFError:
            pass
        return "\n".join(lines).strip("\n") if fenced else "\n".join(lines)

    def _ask(self, text: str) -> None:
        """One turn."""
        try:
            text.encode()
        except UnicodeEncodeError:
            self._tell("this message is not text in UTF-8, and was not asked")
            return
        left_out, self._column = self._conversation.left_out, 0
        answer = self._conversation.ask(text, self._say)
        if self._column:
            say()
        self._after(answer, left_out)

    def _say(self, text: str) -> None:
        if not self._column:
            text = text.lstrip()
        if text:
            self._column = len(text)
            say(text, end="")

    def _after(self, answer: Answer, left_out: int) -> None:
        if answer.stopped:
            forget()  # the next Ctrl-C is a first one again
        if not answer.text:
            self._tell("the model said nothing; the turn is not kept")
        elif answer.stopped:
            self._tell("stopped; what was said is kept")
        elif not answer.ended and answer.full:
            self._tell(f"cut off after {answer.tokens:,} tokens: the model has no more positions")
        elif not answer.ended:
            self._tell(f"cut off after {answer.tokens:,} tokens; --max-new-tokens allows more")
        if self._conversation.left_out > left_out:
            turns = self._conversation.left_out // 2
            what = f"the first {turns} turns are" if turns > 1 else "the first turn is"
            self._tell(f"the conversation has outgrown the model's positions: {what} no longer read")

    def _command(self, said: str) -> str | None:
        name, _, rest = said.partition(" ")
        rest = rest.strip()
        if name in ("/exit", "/quit", "/bye"):
            return "end"
        if name == "/help":
            self._tell(*COMMANDS.values(), *HINT.splitlines())
        elif name == "/system":
            self._conversation.system = rest or None
            self._tell("the system message is set" if rest else "there is no system message now")
        elif name == "/undo":
            self._tell("the last turn is taken back" if self._conversation.undo() else "there is no turn to take back")
        elif name == "/reset":
            self._conversation.reset()
            self._tell("all turns are forgotten")
        elif name == "/save":
            self._save(rest)
        else:
            self._tell(f"{name}: there is no such command.{did_you_mean(name, COMMANDS)} /help lists them all")
        return None

    def _save(self, name: str) -> None:
        if not name:
            self._tell("/save FILE: name a file")
            return
        if not self._conversation.messages:
            self._tell("there is nothing to save yet")
            return
        file = Path(name).expanduser()
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(self._conversation.row(), ensure_ascii=False) + "\n")
        except OSError as error:
            self._tell(f"{file}: cannot be written ({error.strerror})")
            return
        self._tell(f"added to {file} as a row ({len(self._conversation.messages)} messages)")

    def _tell(self, *lines: str) -> None:
        """Something that is not the model's: on stderr, so that a pipe holds the answers alone."""
        for line in lines:
            say(f"  {line}" if line else "", error=True)


def line_reader(history: Path, *, interactive: bool) -> Callable[[str], str]:
    """Gives lines of stdin; a person gets the editing and the history of readline, where that is installed."""
    stdin: Any = sys.stdin
    if hasattr(stdin, "reconfigure"):
        stdin.reconfigure(errors="surrogateescape")
    if not interactive:
        return lambda _: _next_line(stdin)
    try:
        import readline
    except ImportError:  # Windows
        return input
    import atexit
    import contextlib

    def keep() -> None:
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            history.touch(mode=0o600)
            readline.write_history_file(history)

    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    readline.set_history_length(1000)
    atexit.register(keep)
    readline.set_completer_delims(" ")
    readline.set_completer(
        lambda text, state: [*(each for each in COMMANDS if text and each.startswith(text)), None][state]
    )
    readline.parse_and_bind("tab: complete")
    readline.parse_and_bind("set enable-bracketed-paste on")  # lines that are pasted together are one message
    return input


def _next_line(stdin: Any) -> str:
    line: str = stdin.readline() if stdin is not None else ""
    if not line:
        raise EOFError
    return line.removesuffix("\n").removesuffix("\r")
