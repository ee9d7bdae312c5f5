"""Kills every work at each of its changes and prints how many ended as if undisturbed.

    python tests/faults/campaign.py [KIND ...] [--every N] [--json FILE]

With ``--every 5`` only each fifth place is tried.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults.trials import Trials
from faults.works import KINDS, Scene


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill works at each of their changes.")
    parser.add_argument("kinds", nargs="*", default=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--every", type=int, default=1, help="try each N-th place only")
    parser.add_argument("--json", type=Path, help="write the counts there, too")
    asked = parser.parse_args()
    table = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"TRIMTAB_CACHE": f"{folder}/cache", "HF_HUB_OFFLINE": "1"}
        scene = Scene(Path(folder))
        for kind in asked.kinds:
            began = time.time()
            trials = Trials(scene.work(kind))
            places = trials.places[:: asked.every]
            different = []
            for number, place in enumerate(places, 1):
                if sys.stderr.isatty():
                    print(f"\r{kind}: {number} of {len(places)}", end="\r", file=sys.stderr)
                if (said := trials.kill(place)) is not None:
                    different.append(said)
                    print(said, flush=True)
            table.append(
                {
                    "kind": kind,
                    "changes": max(place.number for place in trials.places),
                    "places": len(trials.places),
                    "kills": len(places),
                    "identical": len(places) - len(different),
                    "not identical": len(different),
                    "seconds": round(time.time() - began),
                }
            )
            print(", ".join(f"{name}: {value}" for name, value in table[-1].items()), flush=True)
    total = {name: sum(row[name] for row in table) for name in ("places", "kills", "identical", "not identical")}  # type: ignore[misc]
    print("all: " + ", ".join(f"{value} {name}" for name, value in total.items()))
    if asked.json is not None:
        asked.json.write_text(json.dumps({"kinds": table, "all": total}, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if total["not identical"] else 0)


if __name__ == "__main__":
    main()
