"""``trimtab merge``: a model folder that loads without trimtab."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.arguments import RunPath


class Dtype(StrEnum):
    """In which dtype the merged weights are stored."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def command(
    run: RunPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
    dtype: Annotated[
        Dtype, typer.Option(help="Stored type; auto: the one the weights were trained on in. float32 rounds least.")
    ] = Dtype.auto,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model folder that is there.")] = False,
) -> None:
    """Fold the adapter of a run into its model and write an ordinary Hugging Face folder."""
    from trimtab.formats.model_folder import check_target, save_model_folder

    check_target(out, overwrite=overwrite)

    from trimtab.surgery.merge import merge
    from trimtab.training.loading import load_run

    loaded = load_run(run, dtype=None if dtype is Dtype.auto else dtype.value)
    report = merge(loaded.model)
    save_model_folder(loaded.model, loaded.tokenizer, out, overwrite=overwrite)
    typer.echo(f"merged {len(report.modules)} modules into {out}")
    stored = str(loaded.model.dtype).removeprefix("torch.")
    typer.echo(f"largest rounding of a merged weight to {stored}: {report.rounding:.1e} of its norm")
    for name in report.untied:
        typer.echo(f"{name} was tied to another module and has a weight of its own now")
