"""Every architecture does what the table beside this file says, no more and no less.

``make test`` takes a few of different kinds, ``make test-all`` all of them. After a change that makes more of them work
the table is written again: ``python tests/architectures/sweep.py``.
"""

from __future__ import annotations

import json
import re
from typing import Any

import architecture_checks
import pytest
import transformers
from architecture_page import page
from model_list import architectures
from sweep import PAGE, TABLE

import sampling

WRITTEN: dict[str, Any] = json.loads(TABLE.read_text())
RECORDS: dict[str, dict[str, Any]] = {one["name"]: one for one in WRITTEN["architectures"]}
KINDS = [
    "LlamaForCausalLM",  # rotary positions, gated layers
    "GPT2LMHeadModel",  # weights stored as [in, out]
    "MambaForCausalLM",  # a state space, which reads a weight in place of calling its layer
    "MixtralForCausalLM",  # experts
    "DeepseekV3ForCausalLM",  # latent attention
    "BertForMaskedLM",  # a tied weight and a tied bias in the head
    "UMT5ForConditionalGeneration",  # an encoder-decoder with three ties and a scale
    "DebertaV2ForSequenceClassification",  # one layer called for two things
    "ViTForImageClassification",
    "WavLMForCTC",  # sound, through torch's function for attention
    "CLIPModel",  # two towers
    "Qwen2VLForConditionalGeneration",  # text and an image
]


def is_fine(check: str, result: str) -> bool:
    """Whether all is well; a weight that a module reads by itself may give products that a processor rounds otherwise
    (seen on one with AVX2 alone)."""
    apart = re.fullmatch(r"step 0: outputs are (\S+) apart", result)
    return result == "yes" or (check == "LoRA: step 0" and apart is not None and float(apart[1]) < 1e-6)


@pytest.mark.parametrize("name", list(RECORDS) if sampling.everything else KINDS)
def test_an_architecture_does_what_the_table_says(name: str) -> None:
    found, written = architecture_checks.examine(name).plain(), RECORDS[name]
    if written["reason"].startswith("not through"):
        return  # a matter of the machine
    assert bool(found["reason"]) == bool(written["reason"]), found["reason"] or "it can be made now"
    found_wrong, written_wrong = (
        {check: result for check, result in record["checks"].items() if not is_fine(check, result)}
        for record in (found, written)
    )
    assert found_wrong.keys() == written_wrong.keys(), found_wrong


def test_the_table_has_every_architecture() -> None:
    if transformers.__version__ != WRITTEN["versions"]["transformers"]:
        pytest.skip(f"the table is of transformers {WRITTEN['versions']['transformers']}")
    assert list(RECORDS) == list(architectures())


def test_the_page_is_that_of_the_table() -> None:
    assert PAGE.read_text() == page(WRITTEN)
