"""``trimtab doctor``: what this machine has for fine-tuning, and what would help."""

from __future__ import annotations

import json

import typer

from trimtab.cli.exits import say
from trimtab.cli.importing import importing
from trimtab.cli.verbs._arguments import AsJson

SHORT_HELP = "Say what this machine has, and what would help."

PRINTS = True


def command(as_json: AsJson = False) -> None:
    """Say what this machine and its installation have for fine-tuning, and what would help.

    Nothing is changed or downloaded. The exit code is 1 if a package that trimtab needs is missing or too old.
    """
    with importing():
        from dataclasses import asdict

        from trimtab.diagnosis import diagnose

    found = diagnose()
    if as_json:
        say(json.dumps(asdict(found), indent=2))
    else:
        width = max(len(name) for rows in found.sections.values() for name in rows)
        for title, rows in found.sections.items():
            say(f"{title}")
            for name, value in rows.items():
                say(f"  {name:<{width}}  {value}")
        for title, sentences in (("does not work", found.broken), ("would help", found.advice)):
            for sentence in sentences:
                say(f"{title}: {sentence}")
        if not found.broken and not found.advice:
            say("nothing is amiss")
    if found.broken:
        raise typer.Exit(1)
