"""``trimtab tune``: find the learning rate of a run by short trials, and write it into a YAML."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli.exits import say, say_note
from trimtab.cli.importing import importing
from trimtab.cli.verbs._arguments import ConfigPath, Overrides
from trimtab.hints import pasted, seen_from_here

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
    from trimtab.config.rewrite import edited, with_settings
    from trimtab.errors import ConfigError, MachineError, machine_refusal
    from trimtab.files import MadeMeanwhileError, write_text
    from trimtab.runs.folder import run_at

    if in_place and out is not None:
        raise typer.BadParameter("--in-place writes CONFIG itself; leave --out away")
    settings, beside = list(overrides or []), config
    if (run := run_at(config)) is not None:
        if in_place:
            raise ConfigError(
                f"{run.config}: says what the run in its folder began with, and stays so; leave --in-place away"
            )
        config, beside = run.config, run.path.resolve()
        settings.insert(0, f"output={json.dumps(str(beside.with_name(f'{beside.name}-tuned')), ensure_ascii=False)}")
    loaded = load_config(config, [*settings, "train.learning_rate=auto"])
    if not loaded.train.epochs:
        raise ConfigError("train.epochs is 0: nothing is trained, so there is no learning rate to find")
    target = config if in_place else out or next(_beside(beside))
    if target.exists() and not in_place:
        raise ConfigError(f"{target}: this file is there already; name another with --out, or remove it")

    from trimtab.cli.displays.console import Terminal
    from trimtab.cli.displays.run import RunDisplay

    with RunDisplay(Terminal()) as display:
        with importing():
            from trimtab.training.tune import tune
        found = tune(loaded, display)
    assert found.rate is not None, "a search that ended has a rate"
    settings.append(f"train.learning_rate={found.rate:g}")
    if in_place and edited(config, settings) is None:
        target = next(file for file in _beside(config) if not file.exists())
        say_note(f"these settings have no place of their own in {config}, so it stays, and {target} says all of them")
    place = target.resolve()  # a link stays a link
    kept = place.parent == config.resolve().parent and edited(config, settings) is not None
    try:
        mode = place.stat().st_mode if place.exists() else None
        write_text(place, with_settings(config, settings, beside=place), new=target is not config)
        if mode is not None:
            place.chmod(mode & 0o777)
    except OSError as error:
        why = f"{target}: another process has made it meanwhile" if isinstance(error, MadeMeanwhileError) else None
        why = why or machine_refusal(error, target) or f"{target}: cannot be written ({error.strerror})"
        raise MachineError(
            f"{why}. The rate that was found is {found.rate:g}: write it there by hand (train.learning_rate)"
        ) from error
    if run is None and not in_place and not kept:
        say_note(f"{target} says every setting of {config} in full, without its comments")
    say(f"written: {seen_from_here(target)}")
    say(f"train with it: {pasted('finetune', seen_from_here(target))}")


def _beside(config: Path) -> Iterator[Path]:
    """Names for a tuned YAML beside ``config``, a file or the folder of a run, the usual one first."""
    name = config.name if config.is_dir() else config.stem
    yield config.with_name(f"{name}-tuned.yaml")
    for number in count(2):
        yield config.with_name(f"{name}-tuned-{number}.yaml")
