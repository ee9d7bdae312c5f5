"""``trimtab explore``: which layer wants which method, within one budget of trained parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.verbs._arguments import On
from trimtab.hints import pasted

SHORT_HELP = "Search which layers want which method, within one budget."

INTERRUPTED = "every run that is done is kept. The same command goes on"


def command(
    config: Annotated[Path, typer.Argument(metavar="EXPLORE", help="The search's YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Settings in place of the file's, such as trials=40, confirm=5 or base.train.epochs=1.",
            show_default=False,
        ),
    ] = None,
    on: On = None,
) -> None:
    """Search for the plan (a method and a rank for each group of layers) that scores best on the validation rows.

    Every plan keeps to one budget of trained parameters, and uniform plans of that budget run first. The same command
    goes on with a search that was cut off, and runs nothing twice.
    """
    from trimtab.config.search import load_explore

    loaded = load_explore(config, overrides or [])

    from trimtab.cli.displays.console import Terminal
    from trimtab.cli.displays.search import SearchDisplay
    from trimtab.reports.search.search_words import confirmation_words, trials_table
    from trimtab.runs.read import read_search_results
    from trimtab.studies.explore import explore
    from trimtab.studies.on_ray import place

    console = Terminal()
    display = SearchDisplay(console, loaded.base.train.metric, loaded.rates)
    with display, place(on) as there:
        folder = explore(loaded, display, on=there)

    outcome = read_search_results(folder)
    console.print()
    console.print(trials_table(outcome))
    if outcome.confirmation:
        console.print(f"\n{confirmation_words(outcome)}")
    others = [folder / f"{name}.yaml" for name in ("best_mixed", "best_uniform") if getattr(outcome, name) is not None]
    for line in (
        f"\nbest: {folder / 'best.yaml'}" + (f" (also {', '.join(each.name for each in others)})" if others else ""),
        f"page: {folder / 'explore.html'}",
        f"train it: {pasted('finetune', folder / 'best.yaml')}",
    ):
        console.print(line, soft_wrap=True)
