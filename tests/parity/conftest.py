"""The parity tests call the functions of ``benchmarks/parity.py``, which prints the same numbers as a table."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
