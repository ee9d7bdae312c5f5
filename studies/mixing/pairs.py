"""Write ``pairs.jsonl``: 128 pairs of random identifiers, of which nothing can be guessed and all must be stored.

    python studies/mixing/pairs.py

A row asks for the value of a key; both are eight hexadecimal digits, drawn with a fixed seed.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

PAIRS, DIGITS, SEED = 128, 8, 0


def main(file: Path) -> None:
    """Write the pairs into ``file``."""
    draw = random.Random(SEED)
    rows = []
    for _ in range(PAIRS):
        key, value = ("".join(draw.choices("0123456789abcdef", k=DIGITS)) for _ in range(2))
        rows.append({"prompt": f"{key}:", "completion": value})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(__file__).with_name("pairs.jsonl"))
