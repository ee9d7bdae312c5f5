"""What kind of model a configuration describes."""

from __future__ import annotations

import pytest
from transformers import (
    BartConfig,
    BertConfig,
    GPT2Config,
    PretrainedConfig,
    T5Config,
    ViTConfig,
    XLMConfig,
    XLNetConfig,
)

from trimtab.models.heads import family


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPT2Config(architectures=["GPT2LMHeadModel"]), "decoder"),
        (BertConfig(architectures=["BertForMaskedLM"]), "encoder"),
        (BertConfig(architectures=["BertLMHeadModel"]), "encoder"),  # it reads ahead, whatever it is called
        (BertConfig(architectures=["BertLMHeadModel"], is_decoder=True), "decoder"),
        (XLMConfig(architectures=["XLMWithLMHeadModel"]), "encoder"),
        (XLMConfig(architectures=["XLMWithLMHeadModel"], causal=True), "decoder"),
        (XLNetConfig(architectures=["XLNetLMHeadModel"]), "encoder"),
        (BartConfig(architectures=["BartForConditionalGeneration"]), "encoder-decoder"),
        (BartConfig(architectures=["BartForCausalLM"], is_decoder=True, is_encoder_decoder=False), "decoder"),
        (T5Config(), "encoder-decoder"),
        (ViTConfig(), "image"),
    ],
    ids=lambda one: one if isinstance(one, str) else f"{type(one).__name__}",
)
def test_a_model_that_reads_ahead_does_not_write(config: PretrainedConfig, expected: str) -> None:
    assert family(config) == expected
