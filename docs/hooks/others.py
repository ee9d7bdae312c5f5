"""A page for each tool whose configurations are read: its keys beside ours, as the reader itself carries them over."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from trimtab import listing
from trimtab.config import others
from trimtab.config.others._other import Carried, OtherConfig

SHORTEST: dict[str, dict[str, Any]] = {
    "axolotl": {"base_model": "m", "adapter": "lora"},
    "llama_factory": {"model_name_or_path": "m", "finetuning_type": "lora"},
    "mlx_lm": {"model": "m", "num_layers": -1},
    "peft_adapter": {"peft_type": "LORA"},
}
"""The least that a file of each tool says, so that its reader goes all the way."""


class Watched(Carried):
    """Notes which keys a reader asks for, and what it makes of them."""

    def __init__(self, tool: str, left: dict[str, Any]) -> None:
        super().__init__(Path("theirs.yml"), tool, left)
        self.pairs: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self.read: list[str] = []

    def take(self, key: str, default: Any = None) -> Any:
        self.read.append(key)
        return super().take(key, default)

    def same(self, table: Mapping[str, str]) -> None:
        self.pairs |= table
        super().same(table)

    def numbers(self, table: Mapping[str, str]) -> None:
        self.pairs |= table
        super().numbers(table)

    def choose(self, key: str, ours: str, table: Mapping[Any, Any]) -> None:
        self.pairs[key] = ours
        super().choose(key, ours, table)

    def leave(self, table: Mapping[str, str]) -> None:
        self.left_out |= table
        super().leave(table)

    def low_rank(self, match: str | list[str], options: Mapping[str, str], dora: str) -> dict[str, Any]:
        self.pairs |= {key: f"plan: {ours}" for key, ours in options.items()} | {dora: "plan: method: dora"}
        return super().low_rank(match, options, dora)


def page(name: str) -> str:
    """The page of the tool that ``config/others/NAME.py`` reads."""
    tool = listing.class_in("trimtab.config.others", name, OtherConfig)()  # type: ignore[type-abstract]
    watched = Watched(tool.label, dict(SHORTEST[name]))
    tool.carry(watched)
    defaults = {ours: value for ours, (value, why) in watched.settings.items() if why == f"{tool.label}'s default"}
    more = sorted({key for key in watched.read if key and key not in watched.pairs})
    ending = "json" if name == "peft_adapter" else "yml"
    lines = [
        f"# From {tool.label}",
        "",
        f"`trimtab init run.yaml --from theirs.{ending}` reads a configuration of {tool.label}, known by its "
        f"{tool.known_by}. What has the same meaning is carried over, each line of the YAML with the key that said "
        "so; what has not is printed, key by key. [How it goes](../how-to/come-from-another-tool.md).",
        "",
        *_table((tool.label, "trimtab"), {key: f"`{ours}`" for key, ours in watched.pairs.items()}),
        *(
            ["How these are carried over depends on what they say:", "", ", ".join(f"`{key}`" for key in more), ""]
            if more
            else []
        ),
    ]
    if defaults:
        shown = {ours: f"`{value}`" for ours, value in defaults.items()}
        lines += ["## Defaults that are theirs", "", "Where the file says nothing, it goes on as it did there:", ""]
        lines += _table(("trimtab", "value"), shown)
    if watched.left_out:
        lines += ["## What is not carried over", "", *_table((tool.label, "why"), watched.left_out)]
    return "\n".join(lines)


def _table(heads: tuple[str, str], rows: Mapping[str, str]) -> list[str]:
    return [f"| {' | '.join(heads)} |", "| --- | --- |", *(f"| `{key}` | {told} |" for key, told in rows.items()), ""]


def pages() -> dict[str, str]:
    """Where each page is on the site, and its text."""
    return {f"reference/from-{name.replace('_', '-')}.md": page(name) for name in others.names()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages to the site."""
    for place, text in pages().items():
        files.append(File.generated(config, place, content=text))
    return files
