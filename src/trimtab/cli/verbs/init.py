"""``trimtab init``: four questions, a look at the rows and at the machine, and a YAML that runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.exits import say
from trimtab.cli.importing import importing
from trimtab.cli.verbs._arguments import Overwrite
from trimtab.hints import pasted

SHORT_HELP = "Write a first YAML for your rows."

_METHODS = {
    "dora": "nearest to full fine-tuning",
    "lora": "the fastest",
    "mora": "for much to be learnt by heart",
    "full": "all weights, with the most memory",
}


_OPTIONS = {"model": "--model", "model.name": "--model", "data.train": "--train", "data.test": "--test"}
"""Settings that the rows and the machine are looked at by."""


def command(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE] [KEY=VALUE]...",
            help="The YAML to write (run.yaml), and settings that it shall have, such as train.epochs=1 or "
            "'data.columns={prompt: question, completion: answer}'.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A model folder, a .gguf file, a hub id, smollm2-135m or minilm.", show_default=False),
    ] = None,
    train: Annotated[
        list[str] | None, typer.Option(help="Rows to train on; may be given more than once.", show_default=False)
    ] = None,
    test: Annotated[
        str | None, typer.Option(help="Rows to evaluate on, before and after; none: no such rows.", show_default=False)
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="; ".join(f"{name}: {why}" for name, why in _METHODS.items()), show_default=False)
    ] = None,
    other: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="A YAML or JSON of PEFT, axolotl, LLaMA-Factory or mlx-lm, to be carried over.",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a short commented YAML for your rows, fitted to them and to this machine.

    What no option says is asked. The rows may have any columns: data.columns says which is which. Nothing is trained.
    With --from, the settings are those of another tool's file, and what has no like here is said.
    """
    from trimtab.errors import ConfigError
    from trimtab.files import MadeMeanwhileError, write_text

    said = list(words or ())
    named = [word for word in said[:1] if "=" not in word or Path(word).suffix in (".yaml", ".yml")]
    file, said = Path(*named or ["run.yaml"]), said[len(named) :]
    for text in said:
        key = text.partition("=")[0].strip()
        if option := _OPTIONS.get(key):
            raise ConfigError(f"{key}: say it with {option}")
    taken = ConfigError(f"{file}: already there; name another file, or pass --overwrite")
    if file.exists() and not overwrite:
        raise taken
    if method is not None and other is not None:
        raise ConfigError(f"--method: expected none, since {other} says it, got '{method}'")
    if method is not None:
        _require_known(method)
    if other is not None:
        from trimtab.config.others import carry_over

        carried = carry_over(other)
        options: dict[str, object] = {"model.name": model, "data.train": train or None, "data.test": test}
        options = {key: value for key, value in options.items() if value is not None}
        if not options.keys() | carried.settings.keys() >= {"model.name"}:
            options["model.name"] = _model()
        if not options.keys() | carried.settings.keys() >= {"data.train"}:
            options["data.train"] = [_rows()]
        from trimtab.drafting import draft_carried

        made = draft_carried(carried, options, file, said)
    else:
        model, train = model or _model(), train or [_rows()]
        if test is None:
            likely = [name for name in _data_files() if "test" in name and name not in train]
            test = _ask("Rows to test on, or none", "--test", next(iter(likely), "none"), required=False)
        if method is None:
            told = "".join(f"  {name:<6}{why}\n" for name, why in _METHODS.items())
            method = _ask(f"Method\n{told}Which", "--method", "dora", required=False)
            _require_known(method)
        say("looking at the rows and at the machine")
        with importing():
            from trimtab.drafting import Wish, draft

        made = draft(Wish(model, train, None if test == "none" else test, method, said), file)
    try:
        write_text(file, made.text, new=not overwrite)
    except MadeMeanwhileError:  # while the questions were asked
        raise taken from None
    for note in made.notes:
        say(f"  {note}")
    say(f"\n{made.text}")
    say(f"written to {file}. Next:\n  {pasted('plan', file)}\n  {pasted('finetune', file)}")


def _require_known(method: str) -> None:
    """Raise ConfigError if ``method`` is none of those that are offered."""
    from trimtab.errors import ConfigError, did_you_mean

    if method not in _METHODS:
        known = ", ".join(_METHODS)
        raise ConfigError(f"--method: expected one of {known}, got '{method}'.{did_you_mean(method, _METHODS)}")


def _model() -> str:
    return _ask("Model (a folder, a .gguf file, a hub id)", "--model", "smollm2-135m")


def _rows() -> str:
    likely = [name for name in _data_files() if "test" not in name and "valid" not in name]
    return _ask("Rows to train on", "--train", next(iter(likely), None))


def _ask(question: str, option: str, default: str | None, *, required: bool = True) -> str:
    """The user's answer. Without a terminal to ask in, the default; raises ConfigError where the answer is required."""
    from trimtab.errors import ConfigError

    if _can_ask():
        answer: str = typer.prompt(question, default=default)
        return answer.strip()
    if required or default is None:
        raise ConfigError(f"{option}: needed, since there is no terminal to ask in")
    return default


def _can_ask() -> bool:
    return sys.stdin.isatty()


def _data_files() -> list[str]:
    """Files here, or one folder below, that look like rows."""
    from trimtab.data.opening import is_table

    places = [path for pattern in ("*", "*/*") for path in sorted(Path().glob(pattern))]
    return [str(path) for path in places if is_table(path) and path.is_file()]
