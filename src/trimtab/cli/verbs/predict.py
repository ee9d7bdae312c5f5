"""``trimtab predict``: the labels, numbers, tags or targets that a tuned model gives to rows."""

from __future__ import annotations

from typing import Annotated

import typer

from trimtab.cli.exits import say, say_json, say_note
from trimtab.cli.importing import importing
from trimtab.cli.terminal import nobody_reads
from trimtab.cli.verbs._arguments import Adapter, Bare, BatchSize, Target

SHORT_HELP = "Label texts, pictures or words with a model that was trained to."

INTERRUPTED = "what was answered is printed; nothing was written"

PRINTS = True


def command(
    target: Target,
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEXT]...",
            help="What is to be answered, as in the rows: a text, or the file of a picture; - reads standard input.",
            show_default=False,
        ),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            help="Answer every row of a file (jsonl, json, csv, tsv, parquet), whose answers are not looked at, or "
            "every line of a text; - for the lines of standard input.",
            show_default=False,
        ),
    ] = None,
    adapter: Adapter = None,
    base: Bare = False,
    batch_size: BatchSize = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Longest target that is written, in tokens. Default: the run's, or 32."),
    ] = None,
    as_jsonl: Annotated[
        bool,
        typer.Option("--jsonl", help="Print a JSON object a line: the row, its answer, and the probabilities."),
    ] = False,
) -> None:
    """Answer rows with a model that was trained to: a label with its probability, several labels, a number, a tag for
    each word, or a text that a model with an encoder and a decoder writes."""
    import sys

    if bool(texts) == (file is not None):
        raise typer.BadParameter("give a text, or --file FILE with rows or one text a line")
    said = [sys.stdin.read().removesuffix("\n") if text == "-" else text for text in texts or []]

    with importing():
        from trimtab.errors import DataError
        from trimtab.notes import rows as counted
        from trimtab.predicting import Predictor
        from trimtab.runs.named import Named

    named = Named.find(target, adapter=adapter, base=base)
    say_note(named.doubt)
    predictor = Predictor(named, batch_size=batch_size, max_new_tokens=max_new_tokens)
    single = len(said) == 1
    rows = predictor.rows_in(file) if file is not None else [predictor.row(text, at) for at, text in enumerate(said, 1)]
    number = cut = 0
    for number, (row, answer) in enumerate(predictor.answers(rows), start=1):
        cut += answer.cut
        if as_jsonl:
            say_json({**row, **answer.fields})
        else:
            if not single:
                say(f"[{number}] {predictor.task.told(row)}", error=True)
            say(answer.text)
        if nobody_reads():
            break
    if cut:
        say_note(f"{counted(cut)} longer than the model reads, and cut to that")
    if not number:
        raise DataError(f"{file}: there is nothing to answer in it")
