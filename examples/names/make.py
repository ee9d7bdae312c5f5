"""Makes the names: sentences of a harbour's log, their vessels, people, places and cargoes tagged.

    python examples/names/make.py              # a second; writes examples/names/made/

Half of the names in the test rows are in no other row, some words are one kind of name here and another there, and some
capitalised words are no name. Nothing is downloaded, and the same seed makes the same files.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.files import write_jsonl

MADE = Path(__file__).resolve().parent / "made"
PARTS = {"train": 240, "validation": 80, "test": 400}
KINDS = ("VESSEL", "PERSON", "PLACE", "CARGO")

NAMES = {  # an underscore is a space within a name
    "FIRST": "Anna Bente Carl Dora Erik Freya Gustav Hanna Ivar Jonna Karsten Liv Magnus Nora Oskar Petra Rasmus Signe "
    "Tove Ulf Vera Willem Ylva Aksel Berit Dagmar Edith Frode Gerda Henrik",
    "LAST": "Hansen Berg Lund Winter Falk Stone Marsh Brook Dahl Holm Voss Kramer Thorne Ahlgren Becker Reef North "
    "Fisher Baker Cole Haven Sand Strand West Frost Klein Moe Nygaard Olsen Rusk",
    "SHIP": "Aurora Albatross Seagull Tern Meridian Polaris Northern_Light Morning_Star Blue_Heron Sea_Holly Gannet "
    "Kittiwake Ocean_Pearl Grey_Goose Southern_Cross West_Wind Fair_Isle Black_Swan Silver_Spray Petrel Cormorant "
    "Dolphin Orion Vega Good_Hope Patience Endeavour Stella Marina Nordica",
    "PLACE": "North_Quay South_Quay Fish_Dock Old_Basin Coal_Pier Ferry_Slip Inner_Harbour East_Mole West_Mole "
    "Lock_Two Timber_Yard Grain_Wharf Pilot_Station Dry_Dock Marina Customs_Jetty Lower_Anchorage Salt_Pier Boat_Hall "
    "Long_Bank Fairway_Buoy Mill_Creek Tern_Island Stony_Point Gull_Rock Sandy_Hook Chapel_Steps Tar_Bay Lantern_Head "
    "Cable_Quay",
    "CARGO": "timber herring barley road_salt cement scrap_iron frozen_cod wheat gravel coffee steel_coils fertiliser "
    "diesel wood_pulp live_lobsters paper_rolls soya_meal bricks lime bananas granite_blocks seed_potatoes urea "
    "sawn_planks fish_meal rock_wool malt_barley iron_ore wind_blades empty_containers",
}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

# {VESSEL}, {PERSON}, {PLACE} and {CARGO} are filled in and tagged; {DAY} and {COUNT} are filled in and are no names.
TEMPLATES = """
{VESSEL} berthed at {PLACE} with {COUNT} tonnes of {CARGO} .
{PERSON} reports {VESSEL} dragging her anchor off {PLACE} .
Spoke to {PERSON} about the {CARGO} left at {PLACE} since {DAY} .
{COUNT} pallets of {CARGO} for {VESSEL} , to be signed for by {PERSON} .
The master of {VESSEL} , {PERSON} , asks for a pilot on {DAY} .
Light out at {PLACE} ; {PERSON} told .
{VESSEL} and {VESSEL} change berths on {DAY} .
{PERSON} says {PERSON} has the keys of the crane .
No {CARGO} to be stored at {PLACE} before {DAY} .
{PLACE} closed to all traffic while {VESSEL} discharges {CARGO} .
Ask {PERSON} whether {CARGO} counts as dangerous .
{VESSEL} left for {PLACE} without paying , {PERSON} wants her called back .
Harbour Office to {VESSEL} : keep clear of {PLACE} .
{COUNT} bags of {CARGO} went over the side between {PLACE} and {PLACE} .
Water and power for {VESSEL} until {DAY} , bill to {PERSON} .
{PERSON} of {VESSEL} hurt his hand on a load of {CARGO} .
Divers under {VESSEL} , dead slow past {PLACE} please .
Where is {PERSON} ? {VESSEL} has been calling since {DAY} .
The {CARGO} on {VESSEL} is wet , says {PERSON} .
On {DAY} the Harbour Master walked from {PLACE} to {PLACE} with {PERSON} .
{CARGO} prices went up again , wrote {PERSON} .
Seen from {PLACE} : {VESSEL} , no lights , {COUNT} people on deck .
{PERSON} , who owns {VESSEL} , will move her to {PLACE} .
Swell warning for {PLACE} on {DAY} ; double the lines of {VESSEL} .
"""


def known_and_new(words: list[str], chance: random.Random) -> tuple[list[str], list[str]]:
    """Two thirds of the words for every part, and the rest for the test rows alone."""
    mixed = chance.sample(words, len(words))
    return mixed[: len(mixed) * 2 // 3], mixed[len(mixed) * 2 // 3 :]


class Names:
    """Draws a name of a kind: ``new`` of them from words that the other rows do not have."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.words = {kind: known_and_new(words.split(), chance) for kind, words in NAMES.items()}

    def draw(self, kind: str, new: float) -> list[str]:
        """The words of a name."""
        at = int(self.chance.random() < new)
        pick = self.chance.choice
        if kind == "PERSON":
            first, last = pick(self.words["FIRST"][at]), pick(self.words["LAST"][at])
            return pick([[first, last], [last], [first], [pick(["Captain", "Mrs", "Mr"]), last]])
        if kind == "VESSEL":
            # Ships are called as people are, too, and as places: only the sentence tells.
            after = pick(["SHIP", "SHIP", "SHIP", "FIRST", "PLACE"])
            name = pick(self.words[after][at]).split("_")
            return [pick(["MV", "MS", "Tug"]), *name] if self.chance.random() < 0.2 else name
        return pick(self.words[kind][at]).split("_")


def fill(template: str, names: Names, new: float) -> dict[str, list[str]]:
    """A sentence as ``tokens`` with ``tags`` (BIO)."""
    tokens: list[str] = []
    tags: list[str] = []
    for word in template.split():
        slot = re.fullmatch(r"\{(\w+)\}", word)
        kind = slot[1] if slot else ""
        if kind in KINDS:
            name = names.draw(kind, new)
            tokens += name
            tags += [f"B-{kind}", *[f"I-{kind}"] * (len(name) - 1)]
        else:
            other = {"DAY": names.chance.choice(DAYS), "COUNT": str(names.chance.randint(2, 900))}
            tokens.append(other.get(kind, word))
            tags.append("O")
    return {"tokens": tokens, "tags": tags}


def rows() -> Mapping[str, list[dict[str, Any]]]:
    """Train, validation and test; the last six templates are only in the test rows."""
    chance = random.Random(0)
    names = Names(chance)
    templates = TEMPLATES.strip().splitlines()
    found: dict[str, list[dict[str, Any]]] = {}
    for part, count in PARTS.items():
        test = part == "test"
        some = templates if test else templates[:-6]
        found[part] = [fill(chance.choice(some), names, 0.5 if test else 0.0) for _ in range(count)]
    return found


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
