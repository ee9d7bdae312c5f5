"""``trimtab combine``: several adapters of one model as one."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.exits import say
from trimtab.cli.verbs._arguments import MOST_SEED, Overwrite


class Way(StrEnum):
    """How adapters are combined."""

    linear = "linear"
    svd = "svd"
    ties = "ties"
    dare_linear = "dare_linear"
    dare_ties = "dare_ties"


SHORT_HELP = "Make one adapter of several, each with a weight."


def command(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER[:WEIGHT]...",
            help="Runs, or folders of adapters, each with its weight (1 if there is none): runs/fr:0.7 runs/legal:0.3.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write.", show_default=False)],
    how: Annotated[
        Way,
        typer.Option(
            help="linear: the weighted sum of what the adapters change, exactly; svd: the same of any methods, as "
            "LoRA; ties: the largest numbers, by elected signs; dare_linear, dare_ties: numbers drawn by chance."
        ),
    ] = Way.linear,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of the LoRA that all but linear end in. Default: the sum of the ranks.", show_default=False
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="The share of numbers that ties and dare keep. Default: 0.5.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of what dare draws.")] = 0,
    model: Annotated[
        str | None,
        typer.Option(
            help="The model that all of them were trained on. Default: the first run's, or what the folders say.",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Combine adapters of one model, and write the new one as an adapter folder.

    A weighted sum of LoRA and DoRA adapters is a DoRA adapter, exactly, and MoRA adapters of one size sum up to one.
    """
    from trimtab.cli.importing import importing

    with importing():
        from trimtab.export import combine_folders

    report, written = combine_folders(
        adapters,
        out,
        model=model,
        how=how.value,
        rank=rank,
        density=density,
        seed=seed,
        overwrite=overwrite,
    )
    methods = ", ".join(sorted({one.method for one in report.modules.values()}))
    of_rank = f" of rank {report.rank}" if report.rank else ""
    what = "1 adapter" if len(adapters) == 1 else f"{len(adapters)} adapters"
    say(f"combined {what} on {len(report.modules)} modules into {out}: {methods}{of_rank}")
    exact = "exact to rounding: " if how is Way.linear else ""
    say(
        f"{exact}relative error of the combined change {report.error:.1e}; the worst module is {report.worst} with "
        f"{report.modules[report.worst].error:.1e} (combination.json has them all)"
    )
    if written == "trimtab":
        say("PEFT has no configuration that says this adapter; it is written in our own format, which trimtab loads")
