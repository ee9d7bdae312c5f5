"""Arguments of the verbs that hand a run over, and what they print."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.cli.displays.progress import working
from trimtab.cli.exits import say


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


def dtype_of(said: Dtype) -> str | None:
    """The name of the dtype; None for the one that the run trained on."""
    return None if said is Dtype.auto else said.value


OutFolder = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)]
StoredDtype = Annotated[
    Dtype, typer.Option(help="Stored type; auto: the one the weights were trained on. float32 rounds least.")
]
MergedOnto = Annotated[
    Onto,
    typer.Option(
        help="For a quantised run. dequantised: the weights that were trained on, exact; original: the model's "
        "full-precision weights, off by the quantisation error; requantised: quantised once more, as small as the "
        "run's model."
    ),
]
Rows = Annotated[
    Path | None,
    typer.Option(
        help="Rows to compare outputs on, before and after. Default: the run's test, validation or training rows.",
        show_default=False,
    ),
]


def hand_out(run: Path, out: Path, to: str, *, overwrite: bool, **wishes: Any) -> None:
    """Write the run in the format ``to``, and say what was done and how far it is from the run. ``wishes``: the fields
    of `trimtab.export.Wishes`."""
    from trimtab.export import Wishes, export_format, hand_over

    form = export_format(to)
    with working("modules") as progress:
        handed = hand_over(form, run, out, Wishes(**wishes), overwrite=overwrite, progress=progress)
    first, *rest = handed.done
    say(f"{first} into {out}")
    compared = [f"{form.compared}, {handed.agreement}"] if handed.agreement is not None else []
    for sentence in (*rest, *compared, *handed.notes):
        say(sentence)
