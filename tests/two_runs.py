"""The runs that two processes do in the tests, and one beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sampling
from tiny_encoders import write_encoder
from tiny_runs import labelled, rows, write_config, write_model, write_rows
from tiny_seq2seq import pair_rows, write_t5

MODELS = {"heads": "encoder", "tags": "encoder", "pairs": "t5", "pictures": "vit"}
"""Those that are not trained on the usual one."""
SAID: dict[str, dict[str, Any]] = {
    # 21 rows in batches of 4: the last one has one row, and the second process none.
    "chosen": {
        "data": {"validation": 0.2},
        "train": {
            **{"epochs": 2, "early_stopping": 3, "average": 0.4, "save_every": 3, "gradient_accumulation": 2},
            "log_every": 3,
        },
    },
    "written": {
        "train": {"epochs": 1, "prompt_loss_weight": 0.1, "group_by_length": False},
        "evaluation": {"max_new_tokens": 4},
        "plan": [
            {"match": "all-linear", "method": "mora", "rank": 4},
            {"match": "lm_head", "method": "full"},
        ],
    },
}
OTHERS: dict[str, dict[str, Any]] = {
    "heads": {"data": {"validation": 0.2}, "train": {"epochs": 1, "class_weights": "balanced"}},
    "tags": {"data": {"validation": 0.2}, "train": {"epochs": 2}},
    "pairs": {"data": {"validation": 0.2}, "train": {"epochs": 2}, "evaluation": {"max_new_tokens": 4}},
    "pictures": {"data": {"validation": 0.2}, "train": {"epochs": 2}},
    "rates": {"data": {"validation": 0.2}, "train": {"max_steps": 60, "learning_rate": "auto"}},
}
"""Other tasks, and what is long: with ``--all``."""
SAID |= OTHERS if sampling.everything else {}
RUNS = [("chosen", "none"), ("written", "full")]
if sampling.everything:
    RUNS = [(name, way) for name in SAID for way in ("full", "none") if (name, way) != ("rates", "full")]


def write_models(root: Path) -> None:
    """Write the models that the runs train into ``root``."""
    write_model(root / "model", tie_word_embeddings=False)
    if sampling.everything:
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        write_encoder(root / "encoder", kind="BertForMaskedLM", **quiet)
        write_t5(root / "t5")
        _write_vit(root / "vit")


def yaml_of(root: Path, name: str, place: str, **train: Any) -> Path:
    """The run called ``name``, into the folder ``place``."""
    found = _rows(root, name)
    data = write_rows(root / f"{name}.jsonl", found[:26])
    tests = {"asked": str(write_rows(root / f"{name}-asked.jsonl", found[26:]))}
    sections = SAID[name]
    return write_config(
        root / f"{place}.yaml",
        root / MODELS.get(name, "model"),
        data,
        **{**sections, "data": {"test": tests, **sections.get("data", {})}, "train": {**sections["train"], **train}},
        output=str(root / place),
    )


def _rows(root: Path, name: str) -> list[dict[str, Any]]:
    if name == "written":
        return rows(35, "open")
    if name == "pairs":
        return pair_rows(35)
    if name == "tags":
        words = ["calm", "Anna", "Kiel", "asks", "fog", "Elbe", "berth"]
        tags = ["O", "B-PER", "B-LOC", "O", "O", "B-LOC", "O"]
        return [{"tokens": words[at % 4 :], "tags": tags[at % 4 :]} for at in range(35)]
    if name == "pictures":
        return [{"image": _picture(root, at), "label": ("red", "blue")[at % 2]} for at in range(35)]
    return labelled(35) if name == "heads" else rows(35)


def _picture(root: Path, at: int) -> str:
    from PIL import Image

    file = root / f"{at}.png"
    Image.new("RGB", (20, 24), ((220, 30, 7 * at), (20, 7 * at, 230))[at % 2]).save(file)
    return str(file)


def _write_vit(folder: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, hidden_dropout_prob=0.0, **sizes)).save_pretrained(
        folder
    )
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
