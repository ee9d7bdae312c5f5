"""What is written on a page can be read in both of its colour schemes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import trimtab.reports

CSS = (Path(trimtab.reports.__file__).parent / "shared" / "page.css").read_text(encoding="utf-8")
LIGHT, _, REST = CSS.partition("@media screen")
DARK = REST.partition("\n}")[0]
LEAST = 4.5
"""WCAG 2.2, 1.4.3."""

Colour = tuple[float, float, float]


def named(css: str) -> dict[str, Colour]:
    """The colours that a part of the style sheet names."""
    found: dict[str, Colour] = {}
    for name, said in re.findall(r"--([\w-]+): (#[0-9a-f]{6}|\d+ \d+ \d+)(?=;)", css):
        parts = [int(said[at : at + 2], 16) for at in (1, 3, 5)] if said.startswith("#") else map(int, said.split())
        red, green, blue = parts
        found[name] = red, green, blue
    return found


def over(colour: Colour, share: float, ground: Colour) -> Colour:
    red, green, blue = (share * above + (1 - share) * below for above, below in zip(colour, ground, strict=True))
    return red, green, blue


def contrast(one: Colour, other: Colour) -> float:
    """As WCAG defines it."""

    def luminance(colour: Colour) -> float:
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in (part / 255 for part in colour)]
        return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def share_of(pattern: str) -> float:
    (found,) = re.findall(pattern, CSS)
    return float(found)


@pytest.mark.parametrize("css", [LIGHT, LIGHT + DARK], ids=["light", "dark"])
def test_every_text_stands_out_from_its_ground(css: str) -> None:
    colours = named(css)
    page, ink, muted = colours["page"], colours["ink"], colours["muted"]
    pairs = {
        f"{text} on {ground}": (colours[text], colours[ground])
        for ground, texts in {
            "page": ("ink", "muted", "accent", "warm", "good", "bad"),
            "surface": ("ink", "muted"),
            "notice": ("ink", "muted"),
        }.items()
        for text in texts
    }
    for group, tone, text in re.findall(r"\.(\w+) \{ --tone: var\(--(\w+)\); --on: var\(--(\w+)\); \}", CSS):
        pairs[f"the strip of {group}"] = colours[text], colours[tone]
    for cell, tint in (("right", "accent-rgb"), ("wrong", "warm-rgb")):
        share = share_of(
            rf"\.confusion \.{cell} \{{ background-color: rgb\([^/]+/ calc\(var\(--share\) \* ([\d.]+)\)\)"
        )
        pairs[f"a full cell that is {cell}"] = ink, over(colours[tint], share, page)
    share = share_of(r"rgb\(var\(--tag\) / ([\d.]+)\)")
    tags = re.findall(r"\.(tag-\d) \{ --tag: (\d+) (\d+) (\d+); \}", CSS)
    assert len(tags) == 6
    for tag, *parts in tags:
        red, green, blue = map(float, parts)
        pairs[tag] = muted, over((red, green, blue), share, page)
    low = {name: round(ratio, 2) for name, pair in pairs.items() if (ratio := contrast(*pair)) < LEAST}
    assert not low
    assert len(pairs) == 22
