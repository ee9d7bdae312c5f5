"""The program ``trimtab``: its verbs, and what a mistake looks like from outside.

Exit codes: 0 done, 1 an error of ours (said in words, without a traceback), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from trimtab import __version__
from trimtab.cli.verbs import analyze, compare, evaluate, explore, finetune, generate, memorize, merge, plan
from trimtab.errors import Interrupted, TrimtabError

app = typer.Typer(
    name="trimtab",
    help="Fine-tune a pretrained model by training a few small tensors beside its frozen weights: LoRA, DoRA, MoRA.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("finetune", short_help="Train a model on rows of data, measure it before and after.")(finetune.command)
app.command("plan", short_help="Show which modules get what, and the memory that takes; loads no weights.")(
    plan.command
)
app.command("evaluate", short_help="Measure a run, or any model, on rows.")(evaluate.command)
app.command("generate", short_help="Ask the model of a run.")(generate.command)
app.command("merge", short_help="Write a model folder that loads without trimtab.")(merge.command)
app.command("analyze", short_help="How far each weight of a tuned model moved, in magnitude and direction.")(
    analyze.command
)
app.command("memorize", short_help="Who learns random identifiers by heart, at equal cost.")(memorize.command)
app.command("compare", short_help="Run a study, arms by tasks by seeds; compare them on a page.")(compare.command)
app.command("explore", short_help="Search which layers want which method, within one budget.")(explore.command)

# transformers imports these where they are installed, needed or not, and they tell what kernels they have not.
_CHATTY = ("torchao", "bitsandbytes", "torch.utils._pytree")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"trimtab {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line and exit with its code."""
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app()
    except Interrupted as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(130)
    except TrimtabError as error:
        print(f"trimtab: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        # The machine's fault and not ours, such as a disk that is full. (A pipe whose reader went away is typer's.)
        place = f"{error.filename}: " if error.filename else ""
        print(f"trimtab: {place}{error.strerror or error}", file=sys.stderr)
        sys.exit(1)
