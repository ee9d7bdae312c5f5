"""The program ``trimtab``: each file in `trimtab.cli.verbs` is a verb of its name, found by listing the folder.

A verb's file has a ``command``, whose parameters are its arguments, and a ``SHORT_HELP`` for ``trimtab --help``; it may
have an ``INTERRUPTED``, which says what is left where it is stopped, ``SEVERAL``, where several processes may do it
together, and ``PRINTS``, where what it prints is all that it gives. It imports what it works with inside ``command``,
so that help answers at once, without torch.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Annotated, Any

import typer

from trimtab import __version__, listing
from trimtab.cli import verbs
from trimtab.cli.exits import say
from trimtab.cli.terminal import lost_output
from trimtab.errors import STOPS, Interrupted, MachineError, TrimtabError, machine_refusal
from trimtab.launching import require_one

_FIRST = (
    *("init", "finetune", "plan", "tune", "evaluate", "predict", "generate", "chat", "serve", "merge", "export"),
    *("convert", "combine", "analyze", "compare", "explore", "doctor"),
)
"""The order of these verbs in the help, as people use them; others follow by name."""

app = typer.Typer(
    name="trimtab",
    help="Fine-tune a pretrained model by training a few small tensors beside its frozen weights: LoRA, DoRA, MoRA.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        say(f"trimtab {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _add_verbs() -> None:
    names = listing.names(verbs.__path__)
    for name in sorted(names, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST)):
        verb = importlib.import_module(f"{verbs.__name__}.{name}")
        app.command(name, short_help=verb.SHORT_HELP)(_stoppable(verb))


def _stoppable(verb: ModuleType) -> Callable[..., None]:
    """The verb's command; where it is stopped, it says in a line what that left. (Typer would say "Aborted!".)"""
    several = getattr(verb, "SEVERAL", False)
    left: str = getattr(verb, "INTERRUPTED", "nothing was written; the same command begins again")

    @functools.wraps(verb.command)
    def command(*arguments: Any, **options: Any) -> None:
        if not several:
            require_one(f"trimtab {verb.__name__.rpartition('.')[2]}")
        try:
            verb.command(*arguments, **options)
            if getattr(verb, "PRINTS", False) and (lost := lost_output()) is not None:
                raise MachineError(f"standard output: {machine_refusal(lost) or lost}; not all was printed") from lost
        except STOPS as stop:
            raise Interrupted.by(stop, f"interrupted; {left}") from None
        except typer.Abort as stop:  # at a question; where stdin ended, there was no answer
            if isinstance(stop.__context__, EOFError):
                raise TrimtabError("the input ended before the question was answered; nothing was written") from None
            raise Interrupted(f"interrupted; {left}") from None

    return command


_add_verbs()
