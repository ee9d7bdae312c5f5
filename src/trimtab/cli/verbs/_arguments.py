"""Arguments that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[
    Path,
    typer.Argument(metavar="CONFIG", help="The run's YAML file, or the folder of a run.", show_default=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings in place of the file's, such as train.epochs=1 or plan.0.rank=8.",
        show_default=False,
    ),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)]
Target = Annotated[
    str,
    typer.Argument(
        metavar="RUN|MODEL",
        help="The folder of a run, or a model: its folder, a .gguf file, a hub id, smollm2-135m or minilm.",
        show_default=False,
    ),
]
Adapter = Annotated[
    Path | None,
    typer.Option(help="With MODEL: an adapter to put onto it, a run's or any folder of ours or PEFT's."),
]
Bare = Annotated[bool, typer.Option("--base", help="Leave the run's adapter off: the model as it was before.")]
BatchSize = Annotated[
    int | None,
    typer.Option(min=1, help="Rows in one forward pass; answers do not depend on it. Default: the run's, or 32."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there already.")]
System = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="A system message: how the model should answer.", show_default=False),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token. Higher: freer.")]
TopP = Annotated[
    float,
    typer.Option(
        min=0.0, max=1.0, help="Above temperature 0: draw from the likeliest tokens that have this share together."
    ),
]
On = Annotated[
    str | None,
    typer.Option(
        metavar="PLACE",
        help="Where the runs are done: ray for the Ray cluster that RAY_ADDRESS names, or else for a Ray on this "
        "machine alone, several runs at once; ray://HOST:PORT for the cluster there. Default: here, one after another.",
        show_default=False,
    ),
]
MOST_SEED = 2**32 - 1
Seed = Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of the draw when temperature is above 0.")]
