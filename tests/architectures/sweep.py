"""The sweep over the architectures of transformers, and its table.

    python tests/architectures/sweep.py               everything, from the start
    python tests/architectures/sweep.py --go-on       what the table lacks
    python tests/architectures/sweep.py --again TEXT  those with TEXT in their record: a name, a mapping, a reason

Writes tests/architectures/table.json after each architecture, and the page README.md beside it at the end.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
TABLE, PAGE = FOLDER / "table.json", FOLDER / "README.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--go-on", action="store_true")
    parser.add_argument("--again", nargs="+", default=[])
    parser.add_argument("--table", type=Path, default=TABLE)
    chosen = parser.parse_args()
    logging.disable(logging.CRITICAL)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from architecture_checks import examine
    from architecture_page import page
    from model_list import architectures

    known: dict[str, Any] = {}
    if (chosen.go_on or chosen.again) and chosen.table.exists():
        known = {one["name"]: one for one in json.loads(chosen.table.read_text())["architectures"]}
    names = [name for name in architectures() if name not in known]
    if chosen.again:
        names = [
            name
            for name in architectures()
            if any(text in json.dumps(known.get(name, architectures()[name].__dict__)) for text in chosen.again)
        ]
    gc.freeze()  # what the imports have made is not looked through again
    for number, name in enumerate(names, 1):
        start = time.monotonic()
        known[name] = examine(name).plain()
        print(f"{number}/{len(names)} {name} ({time.monotonic() - start:.1f} s): {in_words(known[name])}", flush=True)
        if number % 20 == 0 or number == len(names):
            gc.collect()
            write(chosen.table, [known[name] for name in architectures() if name in known])
    if chosen.table == TABLE:
        PAGE.write_text(page(json.loads(TABLE.read_text())))


def in_words(record: dict[str, Any]) -> str:
    wrong = [f"{check}: {result}" for check, result in record["checks"].items() if result != "yes"]
    return record["reason"] or "; ".join(wrong) or f"all {len(record['checks'])} checks, {record['modules']} modules"


def write(table: Path, records: list[dict[str, Any]]) -> None:
    import peft
    import torch
    import transformers

    head = {
        "command": "python tests/architectures/sweep.py",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__, "peft": peft.__version__},
    }
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    fresh = table.with_suffix(".tmp")
    fresh.write_text(f'{json.dumps(head)[:-1]}, "architectures": [\n{lines}\n]}}\n')
    fresh.replace(table)


if __name__ == "__main__":
    sys.path.insert(0, str(FOLDER))
    main()
