"""``trimtab merge``: a model folder that loads without trimtab."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.exits import say
from trimtab.cli.verbs._arguments import RunPath


class Dtype(StrEnum):
    """In which dtype the merged weights are stored."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Onto(StrEnum):
    """Which weights the adapter of a quantised run is folded into."""

    dequantised = "dequantised"
    original = "original"
    requantised = "requantised"


SHORT_HELP = "Write a model folder that loads without trimtab."


def command(
    run: RunPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
    dtype: Annotated[
        Dtype, typer.Option(help="Stored type; auto: the one the weights were trained on. float32 rounds least.")
    ] = Dtype.auto,
    onto: Annotated[
        Onto,
        typer.Option(
            help="For a quantised run. dequantised: the weights that were trained on, exact; original: the model's "
            "full-precision weights, off by the quantisation error; requantised: quantised once more, as small as the "
            "run's model."
        ),
    ] = Onto.dequantised,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model folder that is there.")] = False,
) -> None:
    """Fold the adapter of a run into its model and write an ordinary Hugging Face folder."""
    from trimtab.export import export_format

    merged = export_format("merged")
    merged.check_target(out, overwrite=overwrite)

    from trimtab.config.resolve import source_of
    from trimtab.errors import RunError
    from trimtab.evaluation.agreement import agreement, probe
    from trimtab.runs.load import load_run
    from trimtab.surgery.merge import merge

    wanted = None if dtype is Dtype.auto else dtype.value
    loaded = load_run(run, dtype=wanted)
    quantisation = loaded.config.quantisation
    if onto is Onto.requantised and quantisation == "none":
        raise RunError(f"{run}: this run is not quantised, so there is nothing to quantise again; leave out --onto")
    before = probe(loaded.model)
    if onto is Onto.original and quantisation != "none":
        del loaded  # one model at a time
        loaded = load_run(run, dtype=wanted, quantised=False)
    report = merge(loaded.model, "requantised" if onto is Onto.requantised else "dequantised")
    difference = agreement(before, probe(loaded.model))
    summary = loaded.folder.read_summary()
    told = merged.write(
        loaded.model,
        loaded.tokenizer,
        out,
        overwrite=overwrite,
        base=source_of(loaded.config),
        chat=summary is not None and summary.form == "chat",
    )
    say(f"merged {len(report.modules)} modules into {out}")
    stored = str(loaded.model.dtype).removeprefix("torch.")
    if quantisation != "none":
        say(f"the run is quantised ({quantisation}); merged onto the {onto} weights")
        stored = quantisation if onto is Onto.requantised else stored
    say(f"largest rounding of a merged weight to {stored}: {report.rounding:.1e} of its norm")
    say(f"merged against unmerged, on {difference.tokens} random tokens: {difference}")
    for name in report.untied:
        say(f"{name} was tied to another module and has a weight of its own now")
    for sentence in told:
        say(sentence)
