"""The command line: ``trimtab VERB --help``. One thin file per verb; nothing heavy is imported before a verb runs."""

from __future__ import annotations

import atexit
import signal
import sys

from trimtab.signals import listening


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        with listening():
            from trimtab.cli.exits import exit_code

            code = exit_code(_run)
    except KeyboardInterrupt:  # before there was anything to say it in good order
        print("\ninterrupted; nothing was begun", file=sys.stderr)
        code = 130
    finally:
        # Python's own end takes a moment where torch was imported; a Ctrl-C in it ends the process without a traceback.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


def _run() -> None:
    from trimtab.cli.app import app

    app(prog_name="trimtab")  # also as python -m trimtab: completion goes by the name
