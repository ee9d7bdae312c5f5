"""``trimtab analyze``: how far each weight of a tuned model moved, in magnitude and in direction."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.exits import say

SHORT_HELP = "How far each weight of a tuned model moved, in magnitude and direction."


def command(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The model that was tuned, as in a run's YAML.", show_default=False)
    ],
    tuned: Annotated[
        list[Path],
        typer.Argument(
            metavar="TUNED...", help="Model folders, adapters, or runs (every checkpoint).", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder for tables and pictures.")] = Path("analysis"),
    match: Annotated[str, typer.Option(help="Only modules whose name fits this glob, such as '*.q_proj'.")] = "*",
    spectra: Annotated[
        bool, typer.Option(help="Singular values and effective rank of each update: most of the time on large weights.")
    ] = True,
) -> None:
    """Compare the weights of tuned models with their base: how far magnitudes (dM) and directions (dD) moved, how the
    two go together, singular values, and the rows that grew and turned most."""
    from rich.progress import Progress

    from trimtab.analysis.changes import analyse
    from trimtab.analysis.write import write_changes
    from trimtab.cli.displays.console import Terminal
    from trimtab.models.locate import locate
    from trimtab.reports.study.weight_changes import changes_table, correlations_table, write_changes_page

    console = Terminal()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("weights", total=None)
        changes = list(
            analyse(
                locate(base),
                tuned,
                match=match,
                spectra=spectra,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
                note=lambda text: console.print(text, soft_wrap=True),
            )
        )
    analysis = write_changes(out, base, changes)
    page = write_changes_page(out)
    console.print(changes_table(analysis))
    console.print()
    console.print(correlations_table(analysis))
    say(f"\ntables: {out / 'changes.csv'}, {out / 'changes.json'}\npicture: {page}")
