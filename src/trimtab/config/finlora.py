"""FinLoRA's ``finetune_configs.json``: a map from the name of a run to its settings, read as its own tool reads it.

    {"sentiment_8bits_r8_dora": {"base_model": "meta-llama/Llama-3.1-8B-Instruct",
                                 "dataset_path": "../data/train/finlora_sentiment_train.jsonl",
                                 "lora_r": 8, "quant_bits": 8, "peft_use_dora": true}}

What its template fixes is fixed here, too, unless an override says otherwise: adapters on the query, key and value
projections, dropout 0.05, a cosine schedule with 10 steps of warmup, 2 % of the rows for validation, 4,096 tokens, and
the adapter of the last step. Three things differ on purpose: paths are relative to the file and not to wherever the
command runs, an unknown key is an error, and a row is read as it stands, with no ``[INST]`` around it, in training as
in evaluation. ``quant_bits`` may also be 16 or 32, for a base in bfloat16 or float32 that is not quantised.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trimtab.adapters.safe_read import parse_description
from trimtab.config.errors import explain
from trimtab.config.read import build_config
from trimtab.config.run import RunConfig
from trimtab.config.yaml_text import show
from trimtab.errors import ConfigError, did_you_mean
from trimtab.reading import read_text

TARGETS = ("*.q_proj", "*.k_proj", "*.v_proj")

_QUANTISATION = {4: "nf4", 8: "int8"}
_PRECISION = {16: "bfloat16", 32: "float32"}


class Entry(BaseModel):
    """The settings of one run. The defaults are those of FinLoRA's template."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    base_model: str = Field(min_length=1, description="The pretrained model: a folder, a .gguf file, or a hub id.")
    dataset_path: str = Field(min_length=1, description="The training rows: a file, relative to this one, or a hub id.")
    quant_bits: Literal[4, 8, 16, 32] = Field(
        description="Bits of a frozen weight: 4 (nf4) or 8 (int8); 16 (bfloat16) or 32 (float32) for no quantisation."
    )
    lora_r: int = Field(8, ge=1, description="Rank of the adapter.")
    lora_alpha: float = Field(16, gt=0, description="Numerator of the scale.")
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate.")
    num_epochs: float = Field(4, gt=0, description="Passes over the training rows.")
    batch_size: int = Field(2, ge=1, description="Rows in one forward pass.")
    gradient_accumulation_steps: int = Field(4, ge=1, description="Forward passes to one step.")
    peft_use_dora: bool = Field(False, description="Train a magnitude, too: DoRA.")
    peft_use_rslora: bool = Field(False, description="Scale by alpha / sqrt(rank): rsLoRA.")

    @property
    def variant(self) -> str:
        """How FinLoRA names the folder of such adapters: ``8bits_r8``, ``8bits_r8_dora``, ``4bits_r4``, ..."""
        switches = {"dora": self.peft_use_dora, "rslora": self.peft_use_rslora}
        return "_".join([f"{self.quant_bits}bits_r{self.lora_r}", *(name for name, on in switches.items() if on)])

    def to_run(self, name: str) -> dict[str, Any]:
        """The same settings in the words of a run's YAML; the run folder is ``lora_adapters/VARIANT/NAME``."""
        quantised = self.quant_bits in _QUANTISATION
        return {
            "model": {"name": self.base_model},
            **({"quantisation": _QUANTISATION[self.quant_bits]} if quantised else {}),
            "data": {"train": [self.dataset_path], "validation": 0.02, "max_length": 4096},
            "plan": [
                {
                    "match": list(TARGETS),
                    "method": "dora" if self.peft_use_dora else "lora",
                    "rank": self.lora_r,
                    "alpha": self.lora_alpha,
                    "rank_stabilised": self.peft_use_rslora,
                    "dropout": 0.05,
                }
            ],
            "train": {
                "epochs": self.num_epochs,
                "batch_size": self.batch_size,
                "gradient_accumulation": self.gradient_accumulation_steps,
                "learning_rate": self.learning_rate,
                "schedule": "cosine",
                "warmup": 10,
                "keep_best": False,
                "precision": _PRECISION.get(self.quant_bits, "auto"),
            },
            "output": f"lora_adapters/{self.variant}/{name}",
        }


def read_entries(path: Path) -> dict[str, Any]:
    """Run names and what ``path`` says of each, not checked yet.

    Raises ConfigError for a file that is missing or is not a JSON object with at least one key.
    """
    if not path.is_file():
        others = [other.name for other in path.parent.glob("*.json")] if path.parent.is_dir() else []
        raise ConfigError(f"{path}: no such file.{did_you_mean(path.name, others)}")
    try:
        entries = parse_description(read_text(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected a JSON object of run names and their settings, but: {error}.") from None
    if not entries:
        raise ConfigError(f"{path}: no run in it; expected a JSON object of run names and their settings.")
    return entries


def check_entry(path: Path, name: str, value: Any) -> Entry:
    """The settings ``value`` of the run ``name`` in ``path``.

    Raises ConfigError, one line for each problem: an unknown key, one that is missing, a wrong value, a name that
    cannot be that of a folder.
    """
    if not re.fullmatch(r"[^\W_][^/\\\0]*", name):
        raise ConfigError(
            f"{path}: the run name {show(name)} is to be a folder's; begin it with a letter or a digit, and leave out "
            "slashes."
        )
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {name}: expected a JSON object of settings, got {show(value)}.")
    try:
        return Entry.model_validate(value)
    except ValidationError as error:
        problems = [explain(Entry, tuple(map(str, problem["loc"])), problem) for problem in error.errors()]
        raise ConfigError("\n".join(f"{path}: {name}: {problem}" for problem in problems)) from None


def load_finlora(path: Path, name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run ``name`` of ``path`` as a configuration of ours, with overrides in our words (``model=smollm2-135m``).

    Paths in the file are relative to its folder, those in overrides to the working directory.

    Raises ConfigError for a file, a name, a key or a value that is not what it should be.
    """
    entries = read_entries(path)
    if name not in entries:
        raise ConfigError(f"{path}: no run '{name}'.{did_you_mean(name, entries)} Its runs: {', '.join(entries)}.")
    raw = check_entry(path, name, entries[name]).to_run(name)
    return build_config(raw, path.parent, str(path), overrides)
