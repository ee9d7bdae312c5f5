"""``trimtab compare``: a study, run as far as it is missing, and its page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.verbs._arguments import On, Overrides

SHORT_HELP = "Run a study, arms by tasks by seeds; compare them on a page."

INTERRUPTED = "every run that is done is kept. The same command goes on"


def command(
    study: Annotated[Path, typer.Argument(metavar="STUDY", help="The study's YAML file.", show_default=False)],
    overrides: Overrides = None,
    plan: Annotated[
        bool, typer.Option("--plan", "--dry-run", help="Show the runs and which of them are done; run nothing.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="ARM", help="Run this arm alone; may be given several times.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="TASK", help="Run this task alone; as --only."),
    ] = None,
    page_only: Annotated[
        bool, typer.Option("--page-only", help="Write the results and the page from what is done; run nothing.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="The study's folder. Default: what the file says, or one beside it of its name."),
    ] = None,
    on: On = None,
) -> None:
    """Run every arm of a study on every task and seed, and write a page that compares them.

    Settings given as KEY=VALUE go into the study's base. What is done is not run again, what was cut off goes on:
    the same command, whatever happened. An arm that fails is told at the end, and the others are run.
    """
    if plan and page_only:
        raise typer.BadParameter("--plan writes nothing, and --page-only writes the page; choose one")
    from trimtab.errors import printable
    from trimtab.studies.study_cells import load_study

    loaded = load_study(study, overrides or [], out=out)
    for option, given, known in (("--only", only, loaded.said.arms), ("--task", task, loaded.said.tasks)):
        for name in given or []:
            if name not in known:
                raise typer.BadParameter(
                    printable(f"{option}: '{name}' is not in this study; it has {', '.join(known)}")
                )

    from trimtab.cli.displays.console import Terminal
    from trimtab.cli.displays.study import StudyDisplay, cells_table
    from trimtab.errors import STOPS, Interrupted, RunError
    from trimtab.reports.study.comparison import findings, study_tables
    from trimtab.reports.study.study_page import write_study_page
    from trimtab.studies.compare import Selection, compare
    from trimtab.studies.on_ray import place
    from trimtab.studies.study_results import write_results

    console = Terminal()
    if plan:
        console.print(cells_table(loaded))
        return
    failed, stopped = [], None
    if not page_only:
        display = StudyDisplay(console)
        with display:
            try:
                with place(on) as there:
                    failed = compare(loaded, display, Selection(frozenset(task or []), frozenset(only or [])), on=there)
            except (Interrupted, *STOPS) as interruption:
                stopped = interruption
    results = write_results(loaded, failed)
    page = write_study_page(loaded.folder)
    for table in study_tables(results):
        console.print()
        console.print(table)
    for sentence in findings(results):
        console.print(sentence)
    if results.missing:
        arms = ", ".join(dict.fromkeys(run.arm for run in results.missing))
        console.print(f"\nnot done: {len(results.missing)} of the runs, of {arms}", soft_wrap=True)
    console.print(f"\ntables: {loaded.folder / 'results.csv'}, {loaded.folder / 'results.json'}", soft_wrap=True)
    console.print(f"page: {page}", soft_wrap=True)
    if stopped is not None:
        raise Interrupted.by(stopped, f"interrupted; {INTERRUPTED}")
    if failed:
        names = "\n".join(f"  {cell.name}: {reason}" for cell, reason in failed)
        raise RunError(f"{len(failed)} of the study's runs failed; the same command tries them again:\n{names}")
