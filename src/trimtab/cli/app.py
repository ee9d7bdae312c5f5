"""The program ``trimtab``: each file in `trimtab.cli.verbs` is a verb of its name, found by listing the folder.

A verb's file has a ``command``, whose parameters are its arguments, and a ``SHORT_HELP`` for ``trimtab --help``. It
imports what it works with inside ``command``, so that help answers at once, without torch.
"""

from __future__ import annotations

import importlib
import sys
from functools import partial
from typing import Annotated

import typer

from trimtab import __version__, listing
from trimtab.cli import verbs
from trimtab.cli.exits import exit_code, say

_FIRST = (
    *("init", "finetune", "plan", "evaluate", "generate", "chat", "merge", "analyze", "compare", "explore", "doctor"),
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
        app.command(name, short_help=verb.SHORT_HELP)(verb.command)


_add_verbs()


def main() -> None:
    """Run the command line and exit with its code."""
    sys.exit(exit_code(partial(app, prog_name="trimtab")))  # also as python -m trimtab: completion goes by the name
