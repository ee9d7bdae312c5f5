"""What a run, a study or a search was worth, told from the files of its folder: a page, and tables for a terminal.

Nothing here imports torch or loads a model, so a report can be built anywhere and again at any time.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["run_page"]


def run_page(run: Path) -> Path:
    """Write ``run/report.html``, one page that needs no network, and return its path.

    The same files give the same page, byte for byte. A part whose file is missing is left out.
    Raises RunError where ``run`` is no run folder, or where one of its files is damaged (the message names the file).
    """
    # Here and not above: the tables of this package are wanted by verbs that should not wait for matplotlib.
    from trimtab.reports.run.run_page import write_run_page

    return write_run_page(run)
