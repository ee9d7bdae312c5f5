"""What kind of model a configuration describes: one that writes, one that reads, both, or one that sees."""

from __future__ import annotations

from typing import Any, Literal

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

Family = Literal["decoder", "encoder", "encoder-decoder", "image"]


def family(config: Any) -> Family:
    """The family of the model with this configuration; one that none of the others fits is taken for a decoder.

    Several kinds of model (BERT) can be told to write, too; what its class is called decides.
    """
    kind, classes = config.model_type, config.architectures or []
    if getattr(config, "is_encoder_decoder", False) and kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return "encoder-decoder"
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        writes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) in classes or getattr(config, "is_decoder", False)
        return "decoder" if writes else "encoder"
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "decoder"
    if kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return "image"
    return "encoder" if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES else "decoder"
