"""``trimtab finetune``: the whole run, from a YAML to an adapter and a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.arguments import ConfigPath, Overrides


def command(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run from its last checkpoint.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is in the output folder.")] = False,
) -> None:
    """Fine-tune a model on rows of data, evaluate it before and after, and write a report."""
    if resume and overwrite:
        raise typer.BadParameter("--resume goes on with the run that --overwrite would replace; choose one")
    from trimtab.config import load_config

    loaded = load_config(config, overrides or [])

    from rich.console import Console

    from trimtab.cli.display import Display
    from trimtab.reports import tables

    console = Console()
    with Display(console) as display:
        from trimtab.training.run import finetune

        folder = finetune(loaded, resume=resume, overwrite=overwrite, listener=display)

    summary = folder.read_summary()
    console.print()
    if loaded.data.test:
        console.print(tables.results_table(folder.path))
        console.print(tables.answers_table(folder.path))
    minutes, seconds = divmod(round(summary["training_seconds"]), 60)
    console.print(
        f"trained {summary['trainable_parameters']:,} of {summary['total_parameters']:,} parameters in "
        f"{minutes} min {seconds} s, peak memory {summary['peak_memory_gib']:.2f} GiB",
        highlight=False,
    )
    size = summary["adapter_bytes"]
    written = f"{size / 1e6:.1f} MB" if size > 1e6 else f"{size / 1e3:.0f} kB"
    for line in (
        f"adapter ({written}): {_short(folder.adapter)}",
        f"report: {_short(folder.report)}",
        f'try it: trimtab generate {_short(folder.path)} "..."',
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _short(path: Path) -> Path:
    """``path`` as seen from the working directory, where it lies below that."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
