"""``trimtab generate``: ask the model of a run, and watch it answer."""

from __future__ import annotations

from typing import Annotated

import typer

from trimtab.cli.importing import importing
from trimtab.cli.verbs._arguments import RunPath

SHORT_HELP = "Ask the model of a run."


def command(
    run: RunPath,
    prompt: Annotated[str, typer.Argument(help="What the model reads, as in the rows; - reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token. Higher: freer.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the draw when temperature is above 0.")] = 0,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--plain",
            help="Put the prompt into the chat template, or take it as it is. Default: as in training, which for "
            "Alpaca rows means their template.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Ask the untuned model instead.")] = False,
) -> None:
    """Generate an answer with the model of a run; tokens are printed as they come."""
    import sys

    text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt

    with importing():
        import torch

        from trimtab.cli.displays.answer import AnswerStreamer
        from trimtab.data import forms
        from trimtab.data.tokens import encode_prompt
        from trimtab.errors import DataError
        from trimtab.evaluation.generation import end_tokens
        from trimtab.runs.load import load_run
        from trimtab.surgery.serving import serving

    if not text.strip():
        raise DataError("the prompt is empty: there is nothing to go on from")
    loaded = load_run(run, adapter=not base)
    tokenizer, config = loaded.tokenizer, loaded.model.config.get_text_config()
    summary = loaded.folder.read_summary()
    form = (summary and summary.form) if chat is None else "chat" if chat else None
    if form is not None:
        text = forms.find(form).prompt(text, tokenizer)
    ids = encode_prompt(text, tokenizer)
    room = (getattr(config, "max_position_embeddings", None) or sys.maxsize) - len(ids)
    if room < 1:
        raise DataError(f"the prompt has {len(ids)} tokens, and the model has {len(ids) + room} positions; shorten it")
    batch = torch.tensor([ids], device=loaded.model.device)
    torch.manual_seed(seed)
    drawn = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with torch.inference_mode(), serving(loaded.model):
        loaded.model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=min(max_new_tokens, room),
            eos_token_id=end_tokens(loaded.model, tokenizer) or None,
            pad_token_id=tokenizer.pad_token_id,
            streamer=AnswerStreamer(tokenizer),
            **drawn,
        )
