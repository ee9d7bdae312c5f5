"""``trimtab export``: what a run trained, in the form that another program loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.verbs._arguments import Overwrite, RunPath
from trimtab.cli.verbs._hand_out import Dtype, MergedOnto, Onto, OutFolder, Rows, StoredDtype, dtype_of, hand_out

SHORT_HELP = "Hand a run over to other programs: transformers, PEFT, llama.cpp, Ollama, MLX."


def command(
    run: RunPath,
    out: OutFolder,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="merged: a Hugging Face folder; lora: a PEFT folder; gguf: the base's GGUF file with the adapter "
            "folded in; gguf-lora: an adapter for llama.cpp; mlx: an adapter for mlx-lm.",
            show_default=False,
        ),
    ],
    dtype: StoredDtype = Dtype.auto,
    onto: MergedOnto = Onto.dequantised,
    type_: Annotated[
        str | None,
        typer.Option(
            "--type",
            metavar="TYPE",
            help="gguf: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0 for all matrices; by default each keeps the "
            "type that it has in the file. gguf-lora: f32 (the default), f16 or bf16.",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Of the LoRA that another method is converted to. Default: 32.", show_default=False),
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The GGUF file of the run's base, where the run was trained on another form of it; it is held against "
            "the base's weights.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="A system message for Ollama's Modelfile.", show_default=False)
    ] = None,
    rows: Rows = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a folder that another program loads, with a model card, and say how far its outputs are from the run's."""
    hand_out(
        run,
        out,
        to,
        overwrite=overwrite,
        dtype=dtype_of(dtype),
        onto=onto.value,
        type=type_,
        rank=rank,
        gguf=gguf,
        system=system,
        rows=rows,
    )
