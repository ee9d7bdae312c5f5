"""Numbers and foreign text in the form in which a person reads them; shared by pages, pictures and the terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from trimtab.metrics import Metric

DASH = "–"


_NEARLY = 4
"""Digits with which a share is told at most, where fewer would round it to none or to all."""


def percent(share: float | None, digits: int = 1) -> str:
    """``0.8534`` as ``85.3 %``. What is not quite none or all is told with as many more digits as it takes: ``99.98 %``
    where two of 10,000 rows are wrong."""
    if share is None:
        return DASH
    for more in range(digits, _NEARLY + 1):
        text = f"{100 * share:.{more}f}"
        if float(text) not in (0, 100):
            return f"{text} %"
    return f"{abs(round(100 * share)):.{digits}f} %"


def points(before: float | None, after: float | None) -> str:
    """The change between two shares, in points: ``+72.9``."""
    return DASH if before is None or after is None else signed(100 * (after - before), 1)


def signed(value: float, digits: int) -> str:
    """With its sign, and a true minus: ``+72.9``, ``−3.1``, ``0.0`` where nothing is left after rounding."""
    text = f"{abs(value):,.{digits}f}"
    if not text.strip("0."):
        return text
    return ("+" if value > 0 else "−") + text


def small_percent(part: int, whole: int) -> str:
    """A share that may be tiny, with three figures or so: ``3.50 %``, ``0.0123 %``."""
    share = 100 * part / whole if whole else 0.0
    digits = 2 if share >= 0.1 or share == 0 else 1 - math.floor(math.log10(share)) + 1
    return f"{share:.{digits}f} %"


def count(value: int | None) -> str:
    """``4884480`` as ``4,884,480``."""
    return DASH if value is None else f"{value:,}"


def counted(value: int, what: str) -> str:
    """``1 row``, ``1,200 rows``."""
    return f"{count(value)} {what}{'s' * (value != 1)}"


def parameters(value: float) -> str:
    """A count of parameters to three figures: ``4,884,480`` as ``4.88 M``."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def figure(metric: Metric, value: float | None) -> str:
    """``value`` as that metric is given: a share in percent, any other as a number."""
    return percent(value) if metric.share else number(value)


def change(metric: Metric, value: float) -> str:
    """A difference in that metric, with its sign: of shares in points, of any other as a number."""
    if metric.share:
        return signed(100 * value, 1)
    return number(value) if not value else ("+" if value > 0 else "−") + number(abs(value))


def number(value: float | None) -> str:
    """A figure such as a loss, a perplexity or a correlation, with three or four significant figures."""
    if value is None or not math.isfinite(value):
        return DASH if value is None else str(value)
    return form_of(value).format(abs(value)) if value >= 0 else "−" + form_of(value).format(-value)


def form_of(value: float) -> str:
    """The format in which `number` gives the size of ``value``, for others that stand beside it."""
    for least, form in ((999_999.5, "{:.2e}"), (999.95, "{:,.0f}"), (99.995, "{:.1f}"), (9.9995, "{:.2f}")):
        if abs(value) >= least:
            return form
    return "{:.3f}" if abs(value) >= 0.01 or value == 0 else "{:.2e}"


def duration(seconds: float | None) -> str:
    """``822`` as ``13 min 42 s``."""
    if seconds is None:
        return DASH
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def gib(value: float, digits: int = 2) -> str:
    """``2.5`` as ``2.50 GiB``."""
    return f"{value:.{digits}f} GiB"


def date(moment: datetime) -> str:
    """``4 March 2025, 05:06 UTC``."""
    text = f"{moment.day} {moment:%B %Y, %H:%M}"
    return f"{text} {moment.tzname()}" if moment.tzinfo else text


def size(count_of_bytes: int | None) -> str:
    """``9790000`` as ``9.8 MB`` (decimal, as file managers count)."""
    if count_of_bytes is None:
        return DASH
    value, unit = float(count_of_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:,.0f} {unit}" if unit == "bytes" or value >= 99.95 else f"{value:.1f} {unit}"


def headed(text: str) -> str:
    """With a capital in front, as a sentence and a heading begin; a name with capitals of its own (chrF) stays."""
    return text if any(letter.isupper() for letter in text.partition(" ")[0]) else text[:1].upper() + text[1:]


def listing(value: str | Sequence[str]) -> list[str]:
    """A glob, or several, as a list."""
    return [value] if isinstance(value, str) else list(value)


def options(values: Mapping[str, Any]) -> list[str]:
    """The options of a rule, each as ``rank 16``; a switch that is off as ``magnitude off``."""
    return [f"{name} {_option(value)}" for name, value in values.items()]


def _option(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def shorten(text: str, limit: int) -> str:
    """At most ``limit`` characters in whole words: the beginning and, as questions often come last, some of the end."""
    text = text.strip()
    if len(text) <= limit:
        return text
    tail = limit // 3
    start, end = text[: limit - tail - 3], text[-tail:]
    # A word cut in two is dropped, unless little would be left without it (a web address, a script without spaces).
    whole_start, whole_end = re.sub(r"\S+$", "", start), re.sub(r"^\S+", "", end)
    start = whole_start if len(whole_start) > len(start) // 2 else start
    end = whole_end if len(whole_end) > len(end) // 2 else end
    return f"{start.rstrip()} … {end.lstrip()}"
