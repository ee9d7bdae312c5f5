"""``trimtab tune``: find the learning rate of a run by short trials, and write it into a YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.exits import say
from trimtab.cli.importing import importing
from trimtab.cli.verbs._arguments import ConfigPath, Overrides
from trimtab.hints import pasted

SHORT_HELP = "Find a run's learning rate by a few short trials, and write it into a YAML."


def command(
    config: ConfigPath,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The YAML to write. Default: NAME-tuned.yaml beside CONFIG.", show_default=False
        ),
    ] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Write the rate into CONFIG itself.")] = False,
) -> None:
    """Find the learning rate of a run by a few short trials on its own rows, and write a YAML that names it.

    The trials are those of `train.learning_rate: auto`; train.tune.budget says what they may cost. In the new YAML
    nothing but the rate (and the settings given here) is another, and comments stay.
    """
    from trimtab.config.read import load_config
    from trimtab.config.rewrite import with_settings
    from trimtab.errors import ConfigError
    from trimtab.files import write_text

    if in_place and out is not None:
        raise typer.BadParameter("--in-place writes CONFIG itself; leave --out away")
    loaded = load_config(config, [*(overrides or []), "train.learning_rate=auto"])
    if not loaded.train.epochs:
        raise ConfigError("train.epochs is 0: nothing is trained, so there is no learning rate to find")
    target = config if in_place else out or config.with_name(f"{config.stem}-tuned.yaml")
    if target.exists() and not in_place:
        raise ConfigError(f"{target}: this file is there already; name another with --out, or remove it")

    from trimtab.cli.displays.console import Terminal
    from trimtab.cli.displays.run import RunDisplay

    with RunDisplay(Terminal()) as display:
        with importing():
            from trimtab.training.tune import tune
        found = tune(loaded, display)
    assert found.rate is not None, "a search that ended has a rate"
    write_text(
        target, with_settings(config, [*(overrides or []), f"train.learning_rate={found.rate:g}"], beside=target)
    )
    say(f"written: {target}")
    say(f"train with it: {pasted('finetune', target)}")
