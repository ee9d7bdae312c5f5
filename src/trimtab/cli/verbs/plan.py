"""``trimtab plan``: which module gets what, and whether the run fits into memory, before anything is loaded."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from trimtab.cli.exits import say
from trimtab.cli.importing import importing
from trimtab.cli.verbs._arguments import AsJson, ConfigPath, Overrides

SHORT_HELP = "Show which modules get what, and the memory that takes; loads no weights."

PRINTS = True


def command(
    config: ConfigPath,
    overrides: Overrides = None,
    modules: Annotated[bool, typer.Option("--modules", help="List every module, too.")] = False,
    length: Annotated[
        int | None,
        typer.Option(min=2, help="Estimate memory for rows of so many tokens, in place of the longest of the data."),
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Estimate each process's memory, where so many train (torchrun, one machine).")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Show which modules get which method, how many parameters are trained, and how much memory the run will take.

    Loads no weights: the model's configuration is enough.
    """
    from trimtab.config.read import load_config

    loaded = load_config(config, overrides or [])

    with importing():
        from trimtab.memory.described import describe_run
        from trimtab.processes import Processes, being
        from trimtab.tasks import job_of
        from trimtab.training.checks import planned
        from trimtab.training.rate_plan import told_trials
        from trimtab.training.several import require_fit

    job = job_of(loaded)
    with being(Processes(size=processes, local=processes)):
        require_fit(loaded)
        described = describe_run(job, length, planned)
    trials = told_trials(job) if length is None else None
    if as_json:
        described |= {"trials": trials} if trials else {}
        say(json.dumps(described, indent=2))
        return

    from rich.table import Table

    from trimtab.cli.displays.console import Terminal
    from trimtab.reports.run import run_tables
    from trimtab.runs.records import PlanRecord, SourceRecord

    console = Terminal()
    console.print(f"model: {loaded.model.name}", soft_wrap=True)
    if loaded.adapter is not None:
        console.print(f"begins from the adapter {loaded.adapter}", soft_wrap=True)
    if loaded.quantisation != "none":
        console.print(f"quantisation: {loaded.quantisation}, all linear layers but the output head")
    plan = PlanRecord.read(described)
    console.print(run_tables.plan_table(plan))
    for line in plan.remarks():
        console.print(line, soft_wrap=True)
    for note in described["notes"]:
        console.print(f"note: {note}", soft_wrap=True)
    if rows := described["rows"]:
        sources = [SourceRecord.read(source) for source in rows["sources"]]
        if len(sources) > 1 or sources[0].weight != 1:
            console.print(run_tables.sources_table(sources))
        steps = loaded.train.total_steps(rows["an_epoch"]) if loaded.train.epochs else 0
        measured = [f"{name}: {count:,}" for name, count in {"validation": rows["validation"], **rows["tests"]}.items()]
        console.print(
            f"rows: {rows['an_epoch']:,} to train on in an epoch, {steps:,} steps in all; {', '.join(measured)}",
            soft_wrap=True,
        )
    if modules:
        table = Table("module", "method", "rule", "out x in", "parameters", box=None, header_style="bold")
        for module in plan.modules:
            size = f"{module.rows} x {module.columns}"
            table.add_row(module.module, module.method, str(module.rule), size, f"{module.parameters:,}")
        console.print(table)
    console.print(run_tables.memory_table(described["memory"]))
    for line in run_tables.memory_lines(described["memory"]):
        console.print(line, soft_wrap=True)
    if trials:
        console.print(trials, soft_wrap=True)
