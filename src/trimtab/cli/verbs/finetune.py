"""``trimtab finetune``: the whole run, from a YAML to an adapter and a report."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli.importing import importing
from trimtab.cli.verbs._arguments import Overrides, Overwrite
from trimtab.hints import pasted, seen_from_here
from trimtab.launching import joined

if TYPE_CHECKING:
    from trimtab.config.run import RunConfig
    from trimtab.runs.read import Run

SHORT_HELP = "Train a model on rows of data, measure it before and after."

SEVERAL = True
"""Several processes may be started for it."""

_LONGEST = 200
"""Letters of a prompt that is shown to be pasted."""

INTERRUPTED = "nothing was changed; the same command begins again"


def command(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help="The run's YAML file, or the folder of a run; with --finlora, the name of a run in that.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the run from its last checkpoint; with KEY=VALUE, under settings that may change.",
        ),
    ] = False,
    overwrite: Overwrite = False,
    finlora: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Take the run CONFIG from FinLoRA's finetune_configs.json; it goes into lora_adapters/.../CONFIG.",
            show_default=False,
        ),
    ] = None,
    list_runs: Annotated[bool, typer.Option("--list", help="Only list the runs of the --finlora file.")] = False,
) -> None:
    """Fine-tune a model on rows of data, evaluate it before and after, and write a report."""
    if resume and overwrite:
        raise typer.BadParameter("--resume goes on with the run that --overwrite would replace; choose one")
    if list_runs:
        if finlora is None:
            raise typer.BadParameter("--list lists the runs of a FinLoRA file; name it with --finlora FILE")
        _print_runs(finlora)
        return
    if config is None:
        raise typer.BadParameter(
            "name the run's YAML file" if finlora is None else "name a run of the file; see --list"
        )
    with joined() as processes:  # before anything is read, so that what is wrong is told by one of them
        loaded = _load(config, finlora, overrides or [])
        do = _train if processes.leads else _follow
        do(loaded, resume=resume, overwrite=overwrite)


def _train(loaded: RunConfig, *, resume: bool, overwrite: bool) -> None:
    """Do the run, and show how it goes and what came of it."""
    from trimtab.cli.displays.console import Terminal
    from trimtab.cli.displays.run import RunDisplay
    from trimtab.reports.run import run_tables
    from trimtab.reports.shared import words
    from trimtab.runs.read import read_run

    console = Terminal()
    with RunDisplay(console) as display:
        with importing():
            from trimtab.training.run import finetune

        folder = finetune(loaded, resume=resume, overwrite=overwrite, listener=display)

    run = read_run(folder.path)
    summary = run.summary
    assert summary is not None, "a run that ended has a summary"
    console.print()
    if loaded.data.test:
        console.print(run_tables.results_table(run))
        console.print(run_tables.answers_table(run))
    console.print(
        f"trained {summary.trainable_parameters:,} of {summary.total_parameters:,} parameters in "
        f"{words.duration(summary.training_seconds or 0.0)}, peak memory {summary.peaks}",
    )
    verb = "generate" if summary.task in (None, "causal_lm") else "predict"
    try_it = pasted(verb, seen_from_here(folder.path), text=_question(run, summary.form, verb))
    for line in (
        f"adapter ({words.size(summary.adapter_bytes or 0)}): {seen_from_here(folder.adapter)}",
        f"report: {seen_from_here(folder.report)}",
        f"try it: {try_it}",
    ):
        console.print(line, soft_wrap=True)


def _follow(loaded: RunConfig, *, resume: bool, overwrite: bool) -> None:
    """Take part in a run that another process leads, and say nothing: that one says what there is to say."""
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    with importing():
        from trimtab.training.run import finetune
    finetune(loaded, resume=resume, overwrite=overwrite)


def _question(run: Run, form: str | None, verb: str) -> str:
    """The prompt of the run's first test row, since the model answers to prompts of that kind; dots where there is
    none, or where ``generate`` puts what it is given into a template."""
    from trimtab.data import forms

    row = next((row for tests in run.sets for row in tests.rows_after), None)
    if row is None or (verb == "generate" and (form not in forms.names() or forms.find(form).has_template)):
        return "..."
    prompt = row.prompt.rstrip()
    # Two texts that are compared stand on a line each, and are asked about by a file.
    lines = "" if verb == "predict" else "\n"
    return prompt if 0 < len(prompt) <= _LONGEST and prompt.replace(lines, "").isprintable() else "..."


def _load(config: str, finlora: Path | None, overrides: Sequence[str]) -> RunConfig:
    """The run of a YAML file, or of a FinLoRA file."""
    from trimtab.config.finlora import load_finlora
    from trimtab.config.read import load_config
    from trimtab.errors import RunError
    from trimtab.runs.folder import run_at

    if finlora is not None:
        return load_finlora(finlora, config, overrides)
    run = run_at(Path(config))
    if run is None:
        if Path(config).is_dir():
            raise RunError(f"{config}: this folder holds no run; name a run's YAML file, or the folder of a run")
        return load_config(config, overrides)
    loaded = load_config(run.config, overrides)
    if (model := Path(loaded.model.name)).is_absolute() and not model.exists():
        raise RunError(
            f"{run.path}: the model of this run is not where it was, {model}. If it was moved, say where to: "
            "model.name=WHERE"
        )
    elsewhere = any(text.strip().startswith("output=") for text in overrides)
    # What an earlier version wrote names the folder that the run began in, which may be another by now.
    return loaded if elsewhere else loaded.model_copy(update={"output": run.path.absolute()})


def _print_runs(path: Path) -> None:
    """One line for each run of a FinLoRA file."""
    from rich.table import Table
    from rich.text import Text

    from trimtab.cli.displays.console import Terminal
    from trimtab.config.finlora import check_entry, read_entries

    table = Table(box=None, header_style="bold")
    for title in ("run", "adapter", "base model", "rows"):
        table.add_column(title, overflow="fold")
    for title in ("epochs", "batch", "rate"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, said in read_entries(path).items():
        entry = check_entry(path, name, said)
        batch = f"{entry.batch_size} x {entry.gradient_accumulation_steps}"
        cells = (name, entry.variant, entry.base_model, entry.dataset_path, f"{entry.num_epochs:g}", batch)
        table.add_row(*map(Text, cells), f"{entry.learning_rate:g}")
    console = Terminal()
    if not console.is_terminal:  # a pipe has no width to keep to, and names are there to be copied
        console.width = 160
    console.print(table)
