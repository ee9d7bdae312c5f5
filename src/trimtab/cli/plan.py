"""``trimtab plan``: which module gets what, before anything is loaded."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from trimtab.cli.arguments import ConfigPath, Overrides


def command(
    config: ConfigPath,
    overrides: Overrides = None,
    modules: Annotated[bool, typer.Option("--modules", help="List every module, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")] = False,
) -> None:
    """Show which modules get which method and how many parameters are trained. Loads no weights."""
    from trimtab.config import load_config

    loaded = load_config(config, overrides or [])

    from trimtab.formats.model_folder import empty_model
    from trimtab.surgery.attach import attach
    from trimtab.training.run import plan_of, source_of

    found = attach(empty_model(source_of(loaded)), plan_of(loaded)).to_dict()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return

    from rich.console import Console
    from rich.table import Table

    from trimtab.reports import tables

    console = Console()
    console.print(f"model: {loaded.model.name}", highlight=False, soft_wrap=True)
    console.print(tables.plan_table(found))
    if modules:
        table = Table("module", "method", "rule", "out x in", "parameters", box=None, header_style="bold")
        for module in found["modules"]:
            size = f"{module['out']} x {module['in']}"
            table.add_row(module["module"], module["method"], str(module["rule"]), size, f"{module['parameters']:,}")
        console.print(table)
