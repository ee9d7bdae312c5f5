"""The parity tests call the functions of ``benchmarks/parity.py`` and of ``peft_table.py`` beside them, which print the
same numbers as tables."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
sys.path.append(str(Path(__file__).parent))
