"""``trimtab convert``: the adapter of a run as plain LoRA, which every program that knows LoRA loads."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.verbs._arguments import Overwrite, RunPath
from trimtab.cli.verbs._hand_out import OutFolder, hand_out


class To(StrEnum):
    """What an adapter can be turned into."""

    lora = "lora"


SHORT_HELP = "Turn a run's adapter, of any method, into plain LoRA."


def command(
    run: RunPath,
    out: OutFolder,
    to: Annotated[To, typer.Option("--to", help="lora: a PEFT folder of plain LoRA.", show_default=False)],
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Of every module. Default: 32. With --error the most that a module may get; then no limit by default.",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option(
            help="Rows as in training, of which the first 64 are taken. The error is weighed by what they feed to each "
            "module, which brings the outputs nearer, and outputs are compared on them.",
            show_default=False,
        ),
    ] = None,
    error: Annotated[
        float | None,
        typer.Option(
            help="Choose the lowest rank, module by module, whose relative error is at most this, such as 0.01: of the "
            "module's outputs on the rows; without rows, of the change of its weight.",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the adapter of a run as plain LoRA, as near as the rank allows, and say how near that is.

    LoRA of no higher rank is kept as it is. DoRA, MoRA, full and any mix become the best product of the rank. The
    folder has a conversion.json with the error, its bound and the ranks that smaller errors would need, for each
    module.
    """
    hand_out(run, out, to.value, overwrite=overwrite, rank=rank, rows=rows, error=error)
