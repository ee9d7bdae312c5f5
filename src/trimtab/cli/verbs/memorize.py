"""``trimtab memorize``: who learns random identifiers by heart, at equal cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    out: Annotated[Path, typer.Option(help="The study's folder; what is finished there is not run again.")] = Path(
        "memorize"
    ),
    model: Annotated[str, typer.Option(help="The model, as in a run's YAML.")] = "smollm2-135m",
    blocks: Annotated[int, typer.Option(min=0, help="Keep this many of its first blocks; 0: all.")] = 2,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs to be memorised.")] = 128,
    digits: Annotated[int, typer.Option(min=1, help="Hexadecimal digits of a key, and of a value.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of each cell.")] = 400,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs in a step.")] = 32,
    warmup: Annotated[int, typer.Option(min=1, help="Steps over which the learning rate rises; then it stays.")] = 20,
    evaluate_every: Annotated[int, typer.Option(min=1, help="Steps between two points of a curve.")] = 20,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Some of full, lora, dora, mora-rotation, mora-sharing, mora-magnitude, separated by commas. "
            "Default: all.",
            show_default=False,
        ),
    ] = None,
    budgets: Annotated[str, typer.Option(help="Ranks of the LoRA that sets what all may cost.")] = "4,32",
    seeds: Annotated[int, typer.Option(min=1, help="Curves of each arm, besides the search's.")] = 3,
    learning_rates: Annotated[
        str | None,
        typer.Option(
            help="What every method's search tries. Default: four; full fine-tuning has lower ones.", show_default=False
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="Of the frozen weights: auto, bfloat16 or float32.")] = "auto",
) -> None:
    """Let each method memorise random pairs of identifiers, at equal numbers of trained parameters.

    A cell is a method at a budget with a learning rate and a seed. Finished cells are kept: the same command goes on
    where it stopped, and more methods, budgets, rates or seeds can be asked for later.
    """
    from rich.console import Console

    from trimtab.cli.displays.memorize import MemoryDisplay
    from trimtab.reports.memorize import arms_table, footnote, write_memorize_page
    from trimtab.studies.memorize import memorize
    from trimtab.studies.memorize_study import CONTENDERS, MemoryStudy

    study = MemoryStudy(
        model=model,
        blocks=blocks or None,
        pairs=pairs,
        digits=digits,
        steps=steps,
        batch_size=batch_size,
        warmup=warmup,
        evaluate_every=evaluate_every,
        methods=_listed(methods) if methods else tuple(CONTENDERS),
        budgets=_listed(budgets, int),
        seeds=seeds,
        learning_rates=_listed(learning_rates, float) if learning_rates else None,
        **({} if precision == "auto" else {"precision": precision}),
    )
    console = Console()
    with MemoryDisplay(console) as display:
        found = memorize(study, out, display)
    page = write_memorize_page(out)
    console.print()
    console.print(arms_table(found))
    typer.echo(footnote(found))
    typer.echo(f"results: {out / 'memorize.json'}, {out / 'memorize.csv'}\npicture: {page}")


def _listed(text: str, kind: Callable[[str], Any] = str) -> tuple[Any, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        return tuple(map(kind, parts))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise typer.BadParameter(f"expected {what} separated by commas, got '{text}'") from None
