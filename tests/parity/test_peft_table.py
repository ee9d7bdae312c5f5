"""PEFT's own LoRA and DoRA cases, read from its source distribution, which ``TRIMTAB_PEFT_CASES`` names."""

from __future__ import annotations

import os
from pathlib import Path

import peft_table
import pytest

PATH = os.environ.get("TRIMTAB_PEFT_CASES")
CASES = peft_table.cases(Path(PATH)) if PATH else ()


@pytest.mark.skipif(not PATH, reason="TRIMTAB_PEFT_CASES: no path of PEFT's tests/test_custom_models.py is given")
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
@pytest.mark.filterwarnings("default")
def test_a_case_of_peft_holds_both_ways(case: peft_table.Case) -> None:
    found = dict(peft_table.check(case))
    wrong = {name: value for name, value in found.items() if isinstance(value, str) or not value < peft_table.CLOSE}
    assert found.keys() == set(peft_table.CHECKS) or wrong
    assert not wrong
