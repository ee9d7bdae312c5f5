"""``trimtab chat``: a conversation with a run's model, or with any model, at the terminal."""

from __future__ import annotations

from trimtab.cli.exits import say, say_note
from trimtab.cli.importing import importing
from trimtab.cli.verbs._arguments import Adapter, Bare, MaxNewTokens, Seed, System, Target, Temperature, TopP

SHORT_HELP = "Talk with the model of a run, or with any model."


def command(
    target: Target,
    system: System = None,
    adapter: Adapter = None,
    base: Bare = False,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
) -> None:
    """Talk with the model of a run, or with any model, by its chat template. /help lists the commands, Ctrl-C stops an
    answer, Ctrl-D ends. Over a pipe every line is a turn."""
    import sys

    with importing():
        import torch

        from trimtab.asking import Asked, Conversation, Drawing
        from trimtab.cli.displays.talk import Talk, line_reader
        from trimtab.models.gguf import cache_folder
        from trimtab.questions import require_template
        from trimtab.runs.named import Named
        from trimtab.surgery.contexts import for_inference

    interactive = sys.stdin is not None and sys.stdin.isatty() and sys.stdout is not None and sys.stdout.isatty()
    if interactive:
        say(f"Loading {target}", error=True)
    named = Named.find(target, adapter=adapter, base=base)
    say_note(named.doubt)
    named.require_writer()
    tokenizer = named.reader()
    require_template(tokenizer)
    model = named.load()
    if interactive:
        say("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.", error=True)
    torch.manual_seed(seed)
    drawing = Drawing(max_new_tokens, temperature, top_p)
    with for_inference(model):
        conversation = Conversation(Asked(model, tokenizer), drawing, system)
        read = line_reader(cache_folder().with_name("chat_history"), interactive=interactive)
        Talk(conversation, read, interactive=interactive).run()
