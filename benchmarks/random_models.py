"""Models of usual sizes with random weights: what memory a run takes does not depend on what its model knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LLAMAS = {
    "small": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4},
    "wide": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 128_256},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
}
PIXELS = 224
"""On each side of a picture."""


def llama(name: str, tokenizer: Any) -> Any:
    """One of ``LLAMAS`` in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {"vocab_size": len(tokenizer), "intermediate_size": 704} | LLAMAS[name]
    return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)).bfloat16()


def t5_small(tokenizer: Any) -> Any:
    """A T5 of t5-small's shape."""
    from transformers import T5Config, T5ForConditionalGeneration

    ids = {"pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), num_layers=6, num_heads=8, **ids))


def vit_small() -> Any:
    """ViT-S/16: 22 million numbers."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=PIXELS, hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6
    )
    return ViTForImageClassification(config)


def resnet_50() -> Any:
    """ResNet-50: 24 million numbers."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig())


PICTURES = {"vit-small": vit_small, "resnet-50": resnet_50}
TEXTS = {"t5-small": t5_small} | {name: lambda tokenizer, name=name: llama(name, tokenizer) for name in LLAMAS}
NAMES = (*TEXTS, *PICTURES)


def write_model(folder: Path, name: str) -> str:
    """One of ``NAMES`` with what it reads by: SmolLM2-135M's tokenizer, or a processor of pictures."""
    import torch
    from transformers import ViTImageProcessorPil

    from trimtab.models.locate import locate
    from trimtab.models.model_files import load_tokenizer

    torch.manual_seed(0)
    reader: Any
    if name in PICTURES:
        model, reader = PICTURES[name](), ViTImageProcessorPil(size={"height": PIXELS, "width": PIXELS})
    else:
        reader = load_tokenizer(locate("smollm2-135m"))
        model = TEXTS[name](reader)
    model.save_pretrained(folder)
    reader.save_pretrained(folder)
    return str(folder)
