"""The command line: ``trimtab VERB --help``. One thin file per verb; nothing heavy is imported before a verb runs."""

from __future__ import annotations

from trimtab.cli.app import main

__all__ = ["main"]
