"""The table of the architectures as a page to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from architecture_checks import CHECKS, MEANINGS

_YES, _NO, _NOT_THERE = "✓", "✗", "–"


def page(table: dict[str, Any]) -> str:
    return "\n".join(_lines(table)) + "\n"


def _lines(table: dict[str, Any]) -> Iterator[str]:
    records = table["architectures"]
    made = [record for record in records if not record["reason"]]
    versions = ", ".join(f"{name} {version}" for name, version in table["versions"].items())
    yield "# What works in which model of transformers"
    yield ""
    yield (
        f"Written by `{table['command']}` on {table['date']} with {versions}; `make test-all` holds every line. "
        f"Of the {len(records)} classes in the auto mappings, {len(made)} were made tiny, with random weights, and "
        "run: the others stand at the end with the reason. The heads for tokens, question answering, multiple choice "
        "and next sentences are left out: each is one more linear layer on a body that other mappings have."
    )
    yield ""
    yield "Each model is adapted with `all-linear`: LoRA of rank 2 for the first two, DoRA of rank 1 for the rest."
    yield ""
    for check in CHECKS:
        yield f"- **{check}**: {MEANINGS[check]}"
    yield ""
    yield from _summary(records)
    for mapping in dict.fromkeys(record["mappings"][0] for record in made):
        yield from _section(mapping, [record for record in made if record["mappings"][0] == mapping])
    yield from _not_made([record for record in records if record["reason"]])


def _passes(record: dict[str, Any], check: str) -> str:
    result = record["checks"].get(check, "")
    if result == "yes":
        return _YES
    return _NOT_THERE if result.startswith("nor ") or not result else _NO


def _summary(records: list[dict[str, Any]]) -> Iterator[str]:
    yield "## In numbers"
    yield ""
    yield f"A class counts in every mapping that names it. {_NOT_THERE} below: PEFT or transformers cannot either."
    yield ""
    yield f"| mapping | classes | made | {' | '.join(CHECKS)} |"
    yield f"| --- | ---: | ---: |{' ---: |' * len(CHECKS)}"
    mappings = dict.fromkeys(name for record in records for name in record["mappings"])
    for name in [*mappings, ""]:
        mine = [record for record in records if not name or name in record["mappings"]]
        made = [record for record in mine if not record["reason"]]
        counts = [Counter(_passes(record, check) for record in made) for check in CHECKS]
        cells = [f"{count[_YES]}" + (f" of {len(made) - count[_NOT_THERE]}" if count[_NO] else "") for count in counts]
        yield f"| {name or '**all, each once**'} | {len(mine)} | {len(made)} | {' | '.join(cells)} |"
    yield ""


def _section(mapping: str, records: list[dict[str, Any]]) -> Iterator[str]:
    yield f"## {mapping.capitalize()}"
    yield ""
    yield f"| class | given | layers | {' | '.join(CHECKS)} | not reached by all-linear |"
    yield f"| --- | --- | ---: |{' :---: |' * len(CHECKS)} --- |"
    for record in records:
        marks = " | ".join(_passes(record, check) for check in CHECKS)
        kinds = ", ".join(f"{kind} {number}" for kind, number in record["unreached"].items())
        yield f"| {record['name']} | {record['inputs']} | {record['modules']} | {marks} | {kinds} |"
    yield ""
    notes = [f"- {record['name']}: {said}" for record in records if (said := _asked(record))]
    notes += [
        f"- {record['name']}, {check}: {_escaped(result)}"
        for record in records
        for check, result in record["checks"].items()
        if result != "yes"
    ]
    if notes:
        yield from notes
        yield ""


def _asked(record: dict[str, Any]) -> str:
    """What the rule says beside or in place of all-linear."""
    said = ["it has no linear layer but its head, and the rule is `*`"] if record["rule"] == "*" else []
    said += [f"with `{name}: {str(value).lower()}`" for name, value in record["options"].items()]
    return "; ".join(said)


def _not_made(records: list[dict[str, Any]]) -> Iterator[str]:
    yield "## Not made tiny, or not run"
    yield ""
    for record in records:
        yield f"- {record['name']} ({record['mappings'][0]}): {_escaped(record['reason'])}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<")
