"""``trimtab evaluate``: measure a run, or any model, on rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.importing import importing
from trimtab.cli.verbs._arguments import Adapter, Bare, BatchSize, Target

SHORT_HELP = "Measure a run, or any model, on rows."

INTERRUPTED = "the sets that are measured are kept; the same command begins again"


def command(
    target: Target,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Rows to evaluate on, or with --task the folder that holds them; may be given several times. Default: "
            "the run's test sets."
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="A benchmark's task, such as finlora/fpb (a wrong name lists all); may be given several times.",
            show_default=False,
        ),
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="Let the model write its answer where a closed set would be scored.")
    ] = False,
    adapter: Adapter = None,
    base: Bare = False,
    choices: Annotated[
        str | None,
        typer.Option(
            help="The closed set of answers, separated by commas. Default: the task's, the run's, or from the rows.",
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            help="The form of the rows, such as multiple_choice. Default: the run's, or recognised by their keys.",
            show_default=False,
        ),
    ] = None,
    batch_size: BatchSize = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Longest generated answer, in tokens. Default: the task's, the run's, or 32."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows of each set.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for results and predictions. Default: the run's for its own test sets as they are, else "
            "runs/evaluate."
        ),
    ] = None,
) -> None:
    """Evaluate a run or a model: accuracy and F1 for closed answers, exact match for open ones, perplexity for text."""
    from trimtab.cli.displays.console import Terminal
    from trimtab.cli.displays.run import RunDisplay

    with importing():
        from trimtab.assessing import measure

    console = Terminal()
    with RunDisplay(console) as display:
        folder, written = measure(
            target,
            data or [],
            adapter=adapter,
            base=base,
            tasks=task or [],
            generate=generate,
            choices=[choice.strip() for choice in choices.split(",")] if choices else None,
            form=form,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            limit=limit,
            out=out,
            listener=display,
        )

    from trimtab.reports.run import run_tables
    from trimtab.reports.run.run_page import write_run_page
    from trimtab.runs.load import is_run
    from trimtab.runs.results import ChoiceResult

    if folder == Path(target) and is_run(folder):
        write_run_page(folder)
    for result in written:
        console.print(run_tables.evaluation_table(result))
        if isinstance(result, ChoiceResult) and len(result.choices) <= run_tables.MOST_CLASSES:
            console.print(run_tables.confusion_table(result))
        if result.questions:
            console.print(run_tables.questions_table(result))
    console.print(f"results and predictions: {folder}", soft_wrap=True)
