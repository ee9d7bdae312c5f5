"""What is written for llama.cpp, held against llama.cpp itself (the wheel ``xllamacpp``) and transformers.

The model is a tiny GGUF file whose rows of queries and keys are turned as llama.cpp turns a Llama's, so that a wrong
order shows. benchmarks/llama_cpp.py does the same on SmolLM2 with 200 prompts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from trimtab.export import Wishes, export_format, hand_over
from trimtab.export._gguf_file import GgufFile
from trimtab.export._subject import Subject

LORA = [{"match": "all-linear", "method": "lora", "rank": 4, "alpha": 8}]
MIXED = [
    {"match": ["*.q_proj", "*.k_proj"], "method": "lora", "rank": 2, "alpha": 8},
    {"match": ["*.v_proj", "*.down_proj"], "method": "lora", "rank": 3, "alpha": 3},
]
DORA = [{"match": ["*.q_proj", "*.k_proj", "*.down_proj"], "method": "dora", "rank": 4}]
STRONG = {"train": {"epochs": 6, "learning_rate": 3e-2}}
PROMPTS = [[5, 40, 60, 7, 80, 33], [9, 12, 100, 200, 4], [70, 71, 72], [30, 31, 200, 201, 9, 8, 7], [250, 3]]


@pytest.fixture
def server() -> Callable[..., Callable[[list[int]], dict[int, float]]]:
    """Open llama.cpp on a file, with an adapter or without: the logarithms of the likeliest tokens after a prompt."""
    xllamacpp = pytest.importorskip("xllamacpp")

    def opened(file: Path, adapter: Path | None = None) -> Callable[[list[int]], dict[int, float]]:
        said = xllamacpp.CommonParams()
        said.model.path, said.n_ctx, said.n_parallel, said.warmup = str(file), 64, 1, False
        said.cpuparams.n_threads = said.cpuparams_batch.n_threads = 1
        if adapter is not None:
            said.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        running = xllamacpp.Server(said)

        def ask(prompt: list[int]) -> dict[int, float]:
            asked = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "n_probs": 20, "cache_prompt": False}
            answer = running.handle_completions(asked)
            answer = json.loads(answer) if isinstance(answer, str) else answer
            top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            return {one["id"]: one["logprob"] for one in top}

        return ask

    return opened


@torch.no_grad()
def expected(model: Any, prompt: list[int]) -> torch.Tensor:
    found: torch.Tensor = model(torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1)
    return found


def worst(ask: Any, model: Any) -> float:
    """The largest difference of a logarithm of a probability, over the prompts and the 20 likeliest tokens of each."""
    return max(
        abs(said - float(expected(model, prompt)[token])) for prompt in PROMPTS for token, said in ask(prompt).items()
    )


def exact(run: Path) -> Any:
    """The run's model on the values of its GGUF file."""
    subject = Subject.load(run, Wishes())
    subject.load_anew(dtype="float32")
    return subject.model


# llama.cpp rounds activations: to 8 bits where a matrix is quantised, to 16 bits where it is in F16, and keys and
# values to 16 bits. In F32 only the latter is left. A row in a wrong order, or a scale that is off, is 100 times that.
@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        ("f32", 2e-3),
        pytest.param("f16", 1e-2, marks=pytest.mark.full),
        pytest.param("q8_0", 8e-2, marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("plan", [pytest.param(DORA, id="dora"), pytest.param(LORA, id="lora", marks=pytest.mark.full)])
def test_llama_cpp_answers_as_the_merged_model_does(
    plan: Any, kind: str, tolerance: float, trained: Any, server: Any, tmp_path: Path
) -> None:
    run = trained("gguf-" + plan[0]["method"], plan, on_gguf=True, **STRONG)
    handed = hand_over(export_format("gguf"), run, tmp_path / "out", Wishes(type=kind))
    model, bare = exact(run), GgufFile(tmp_path / "out" / "model.gguf")
    assert worst(server(tmp_path / "out" / "model.gguf"), model) < tolerance
    assert handed.agreement.kl < tolerance**2
    assert {one.tensor_type.name for one in bare.reader.tensors if len(one.shape) > 1} == {kind.upper()}


@pytest.mark.parametrize(
    "plan", [pytest.param(LORA, id="one scale", marks=pytest.mark.full), pytest.param(MIXED, id="scales of its own")]
)
def test_llama_cpp_takes_the_adapter_beside_the_base(plan: Any, trained: Any, server: Any, tmp_path: Path) -> None:
    run = trained(f"beside-{len(plan)}", plan, on_gguf=True, **STRONG)
    hand_over(export_format("gguf-lora"), run, tmp_path / "out", Wishes())
    base = Path(Subject.load(run, Wishes()).source.location)
    model = exact(run)
    assert worst(server(base), model) > 0.5  # without the adapter it is another model
    # The base is in Q4_1, by which llama.cpp multiplies activations of 8 bits.
    assert worst(server(base, tmp_path / "out" / "adapter.gguf"), model) < 8e-2
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    assert len(reader.tensors) == (28 if plan is LORA else 16)
