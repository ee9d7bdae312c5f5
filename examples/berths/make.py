"""Makes the berths: what a skipper asks of the harbour in words, and what the stay costs.

    python examples/berths/make.py              # a second; writes examples/berths/made/

The fee follows a tariff (length, nights, power, water, crane, season) with a few percent of noise that no reader can
know. Nothing is downloaded, and the same seed makes the same files.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.files import write_jsonl

MADE = Path(__file__).resolve().parent / "made"
PARTS = {"train": 480, "validation": 120, "test": 400}
NOISE = 0.03  # of the fee, one standard deviation
BOATS = {  # metres, and what a metre and night costs beside a yacht
    "dinghy": ((3, 5), 0.6),
    "yacht": ((7, 16), 1.0),
    "motor cruiser": ((8, 18), 1.2),
    "fishing boat": ((9, 20), 0.8),
    "catamaran": ((9, 15), 1.6),
}
NIGHTS = ("no", "one", "two", "three", "four", "five", "six")
SEASONS = {"January": 0.6, "March": 0.7, "May": 1.0, "July": 1.4, "August": 1.4, "October": 0.8}
EXTRAS = {  # what is said, the fee for a stay and for a night
    "shore power": (0, 4.0),
    "water": (3.0, 0),
    "the crane": (45.0, 0),
    "a pump-out": (12.0, 0),
    "a night watch": (0, 15.0),
}
OPENINGS = (
    "Could you take a {boat} of {length} metres for {stay} in {month}{extras}?",
    "{length} m {boat}, {stay}, {month}{extras}.",
    "We come in {month} with our {boat} ({length} m) and would stay {stay}{extras}.",
    "Berth wanted: {boat}, {length} metres over all, {stay} in {month}{extras}. Thank you.",
    "My {boat} is {length} m long. {month}, {stay}{extras}, please.",
)


def row(chance: random.Random) -> dict[str, Any]:
    """A request as ``text`` and its fee in euros as ``label``."""
    boat = chance.choice(list(BOATS))
    (shortest, longest), factor = BOATS[boat]
    length, nights, month = chance.randint(shortest, longest), chance.randint(1, 6), chance.choice(list(SEASONS))
    asked = chance.sample(list(EXTRAS), chance.choice([0, 1, 1, 2]))
    fee = 1.5 * length * factor * nights * SEASONS[month]
    fee += sum(EXTRAS[name][0] + EXTRAS[name][1] * nights for name in asked)
    stay = chance.choice([NIGHTS[nights], str(nights)]) + (" night" if nights == 1 else " nights")
    extras = chance.choice([" with ", ", also ", ", and we need "]) + " and ".join(asked) if asked else ""
    text = chance.choice(OPENINGS).format(boat=boat, length=length, stay=stay, month=month, extras=extras)
    return {"text": text, "label": round(fee * chance.gauss(1.0, NOISE), 2)}


def rows() -> Mapping[str, list[dict[str, Any]]]:
    """Train, validation and test; no text is in it twice."""
    chance = random.Random(0)
    texts: dict[str, dict[str, Any]] = {}
    while len(texts) < sum(PARTS.values()):
        one = row(chance)
        texts.setdefault(one["text"], one)
    drawn = iter(texts.values())
    return {part: [next(drawn) for _ in range(count)] for part, count in PARTS.items()}


def make(folder: Path) -> dict[str, int]:
    """Write the rows to ``folder``; gives the number of rows of each part."""
    parts = rows()
    for part, those in parts.items():
        write_jsonl(folder / f"{part}.jsonl", those)
    return {part: len(those) for part, those in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--to", type=Path, default=MADE, metavar="FOLDER", help="where to write (default: %(default)s)")
    said = parser.parse_args()
    for part, count in make(said.to).items():
        print(f"{said.to / part}.jsonl: {count} rows")


if __name__ == "__main__":
    main()
