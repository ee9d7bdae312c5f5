"""``trimtab generate``: ask the model of a run, or any model, and watch it answer."""

from __future__ import annotations

from typing import Annotated

import typer

from trimtab.cli.exits import say, say_json, say_note
from trimtab.cli.importing import importing
from trimtab.cli.terminal import nobody_reads
from trimtab.cli.verbs._arguments import Adapter, Bare, MaxNewTokens, Seed, System, Target, Temperature, TopP

SHORT_HELP = "Ask the model of a run, or any model."

PRINTS = True


def command(
    target: Target,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROMPT]...",
            help="What the model reads, as in the rows; - reads standard input. Several are asked one after the other.",
            show_default=False,
        ),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            help="Ask for every prompt of a file: rows (jsonl, json, csv, tsv, parquet), or a text of one prompt a "
            "line; - for standard input.",
            show_default=False,
        ),
    ] = None,
    system: System = None,
    adapter: Adapter = None,
    base: Bare = False,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--plain",
            help="Put the prompt into the chat template, or take it as it is. Default: as in training, which for "
            "Alpaca rows means their template.",
            show_default=False,
        ),
    ] = None,
    as_jsonl: Annotated[
        bool, typer.Option("--jsonl", help="Print a JSON object a line: the prompt, the answer, whether it ended.")
    ] = False,
) -> None:
    """Generate answers with the model of a run, or with any model; tokens are printed as they come."""
    import sys

    if bool(prompts) == (file is not None):
        raise typer.BadParameter("give a prompt, or --file FILE with one a line")
    texts = [sys.stdin.read().removesuffix("\n") if text == "-" else text for text in prompts or []]

    with importing():
        import torch

        from trimtab.asking import Asked, Drawing
        from trimtab.questions import Question, questions_in
        from trimtab.runs.named import Named
        from trimtab.surgery.contexts import for_inference

    questions = [Question(text) for text in texts] if file is None else questions_in(file)
    named = Named.find(target, adapter=adapter, base=base)
    say_note(named.doubt)
    named.require_writer()
    form = named.form if chat is None else "chat" if chat else None
    tokenizer = named.reader()
    asked = Asked(named.load(), tokenizer)
    put = [question.prompt(form, tokenizer, system) for question in questions]
    for prompt in put:  # each of them, before the first is asked
        asked.encode(prompt)
    drawing = Drawing(max_new_tokens, temperature, top_p)
    torch.manual_seed(seed)
    with for_inference(asked.model):
        for number, (question, prompt) in enumerate(zip(questions, put, strict=True), start=1):
            if len(put) > 1 and not as_jsonl:
                say(f"[{number}/{len(put)}] {question.text.strip()}", error=True)
            answer = asked.write(prompt, drawing, _unsaid if as_jsonl else _say)
            if as_jsonl:
                said = {"prompt": question.text, "answer": answer.text.strip(), "ended": answer.ended}
                say_json(said)
            else:
                say()
            if answer.stopped:
                raise KeyboardInterrupt
            if nobody_reads():
                break


def _say(text: str) -> None:
    say(text, end="")


def _unsaid(_: str) -> None:
    pass
