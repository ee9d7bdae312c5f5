"""Tiny encoders as folders: a BERT with a word-piece tokenizer, and a RoBERTa with a byte-level one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_TEXT = "calm wind fog storm over berth crane tug free again the pilot asks for noon harbour Anna Kiel Elbe line"
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def word_pieces() -> Any:
    """A tokenizer of word pieces: the words of a harbour, and letters for all others."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in (*range(ord("a"), ord("z") + 1), *range(ord("0"), ord("9") + 1))]
    pieces = [*letters, *(f"##{letter}" for letter in letters), *".,!?-", *_TEXT.lower().split()]
    words = list(dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]))
    vocabulary = {word: at for at, word in enumerate(words)}
    backend = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = BertNormalizer(lowercase=True)
    backend.pre_tokenizer = BertPreTokenizer()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    special = {"unk": "[UNK]", "pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in special.items()},
    )


def write_encoder(folder: Path, *, kind: str = "BertModel", **changes: Any) -> Path:
    """A random BERT of two blocks (width 32) as transformers writes one that was pretrained: without a head; as a
    ``BertForMaskedLM`` without a pooler, too."""
    import torch
    import transformers

    tokenizer = word_pieces()
    sizes = {**_SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "pad_token_id": 0}
    torch.manual_seed(1)
    config = transformers.BertConfig(**{**sizes, "initializer_range": 0.2, **changes})
    getattr(transformers, kind)(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_roberta(folder: Path) -> Path:
    """The same of a RoBERTa, whose tokenizer puts a space into every token that begins a word."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([_TEXT] * 3, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.model.save(str(folder))
    tokenizer = RobertaTokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    torch.manual_seed(1)
    sizes = {**_SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 66, "pad_token_id": 1}
    RobertaModel(RobertaConfig(**sizes, initializer_range=0.2, type_vocab_size=1)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
