"""What the tests of training and of the command line share: a tiny model folder, rows to learn, and configurations.

The tokenizer is a byte-level BPE trained here and the model is random, so nothing has to be installed or fetched.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from trimtab.runs.events import Listener
from trimtab.runs.study_records import CellRecord

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_TEXT = "the pilot asks for a tug at noon , fog over berth seven , no wind today and the crane is free again"
_WORDS = _TEXT.split()
ANSWERS = ("calm", "watch", "storm")


def tiny_tokenizer(template: str | None = CHATML) -> Any:
    """A byte-level BPE of 400 tokens with an end token, a pad token and the tokens of ChatML."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=["<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [f"Message: {_TEXT}\nAnswer: {answer}" for answer in ANSWERS] * 3
    backend.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = template
    return tokenizer


def spaced_tokenizer() -> Any:
    """A unigram model as SentencePiece makes it, whose decoder drops the space that a text begins with."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import Metaspace as MetaspaceDecoder
    from tokenizers.models import Unigram
    from tokenizers.pre_tokenizers import Metaspace
    from tokenizers.trainers import UnigramTrainer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(Unigram())
    backend.pre_tokenizer, backend.decoder = Metaspace(), MetaspaceDecoder()
    special = ["<unk>", "<pad>", "</s>"]
    trainer = UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator([_TEXT] * 8, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def tiny_model(vocabulary: int = 400, **changes: Any) -> Any:
    """A random Llama of two blocks (width 32), its embedding tied to its head as in SmolLM2."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "bos_token_id": None,
    }
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def write_model(folder: Path, **changes: Any) -> Path:
    """A model folder as transformers writes it."""
    tokenizer = tiny_tokenizer()
    tiny_model(len(tokenizer), **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def labelled(count: int, *, several: bool = False) -> list[dict[str, Any]]:
    """Rows of ``rows`` as texts with a label, or with several."""
    found = []
    for row in rows(count):
        labels = [row["completion"], *(["short"] if len(row["prompt"]) < 60 else [])]
        found.append({"text": row["prompt"], **({"labels": labels} if several else {"label": row["completion"]})})
    return found


def rows(count: int, form: str = "completion", answers: Sequence[str] = ANSWERS) -> list[dict[str, Any]]:
    """Rows of different lengths in which one word decides the answer, so that a tiny model can learn them."""
    found: list[dict[str, Any]] = []
    for number in range(count):
        answer = answers[number % len(answers)]
        said = " ".join(_WORDS[number % 5 : 7 + (3 * number) % 11])
        sign = ("wind", "fog", "crane", "tug")[number % len(answers)]
        prompt = f"Message: {said} {sign}\nAnswer:"
        found.append(
            {
                "completion": {"prompt": prompt + " ", "completion": answer},
                "finlora": {"context": prompt + " ", "target": answer},
                "alpaca": {"instruction": f"What is it? {said}", "input": sign, "output": answer},
                "chat": {"messages": [_turn("user", f"{said} {sign}"), _turn("assistant", answer)]},
                "text": {"text": f"{said} {sign} {answer}"},
                "multiple_choice": {"question": f"{said} {sign}", "choices": list(answers[:3]), "answer": answer},
                "open": {"prompt": prompt + " ", "completion": f"{answer} {number}"},
            }[form]
        )
    return found


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def write_rows(path: Path, found: Sequence[Any]) -> Path:
    """Rows as a jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


def write_config(path: Path, model_folder: Path, train_file: Path, **sections: Any) -> Path:
    """A run's YAML for a short run in float32; ``sections`` replace or extend what is said here."""
    said: dict[str, Any] = {
        "model": {"name": str(model_folder)},
        "data": {"train": str(train_file), "validation": None},
        "plan": [{"match": "all-linear", "method": "dora", "rank": 4, "alpha": 8}],
        "train": {"epochs": 1, "batch_size": 4, "learning_rate": 1e-2, "precision": "float32", "log_every": 1},
        "output": str(path.with_suffix("")),
    }
    for name, value in sections.items():
        said[name] = {**said[name], **value} if isinstance(value, dict) and name in said else value
    path.write_text(yaml.safe_dump(said, sort_keys=False), encoding="utf-8")
    return path


def cell_of(validation: Sequence[dict[str, Any]], tests: dict[str, Any] | None = None) -> CellRecord:
    """A cell that was not run, with these validations, the last of which was kept, and these results of test sets."""
    return CellRecord(
        identity={},
        trainable_parameters=1000,
        training_seconds=60.0,
        total_seconds=90.0,
        peak_memory_gib=1.25,
        steps=1000,
        train_rows=24,
        train_tokens=100,
        precision="float32",
        tests=tests or {},
        validation=list(validation),
        kept=validation[-1],
    )


class Kept(Listener):
    """Keeps the lines of metrics, the notes and the remarks."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.remarks: list[str] = []

    def metrics(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def remark(self, text: str) -> None:
        self.remarks.append(text)

    def column(self, name: str, kind: str = "train") -> list[Any]:
        """What each line of ``kind`` says under ``name``."""
        return [row[name] for row in self.rows if row["kind"] == kind]
