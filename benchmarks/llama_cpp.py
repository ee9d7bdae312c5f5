"""What `trimtab export` writes for llama.cpp, held against transformers on 200 prompts.

    python benchmarks/llama_cpp.py                          trains a short LoRA run on SmolLM2-135M first: some minutes
    python benchmarks/llama_cpp.py RUN --prompts 50         a finished run on a GGUF file
    python benchmarks/llama_cpp.py --written                and each file against transformers on that file's weights

llama.cpp runs in this process through the wheel xllamacpp. Both get the same token ids and write greedily. For each
prompt the tokens are compared one by one up to the first that differs: how many prompts get the same answer, at how
many steps the likeliest token is the same, and how far apart the logarithms of the tokens' probabilities are.

The reference is the run's model in float32 on the values of its base's file. llama.cpp rounds keys and values to 16
bits, and activations to 16 bits beside a matrix in F16 and to 8 bits beside a quantised one (the base is in Q4_1); a
merged file's own type rounds the weights besides. From that the tolerance of each file; a wrong order of rows or a
scale that is off is some hundred times as much. The base without its adapter shows what the adapter is worth.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import show, write_results

NEW_TOKENS, BATCH, TOP = 8, 25, 2
TOPICS = ("tides", "sails", "anchors", "rudders", "harbours", "lighthouses", "currents", "knots", "charts", "winds")
# Most that the mean difference of a logarithm of a probability may be, by the file. Of the base's own type nothing is
# asked: it may round away what was trained, which the export tells.
TOLERANCE = {"f32": 2e-3, "f16": 1e-2, "q8_0": 5e-2, "gguf-lora": 1e-1}


@dataclass(frozen=True)
class Answer:
    """What was written after one prompt: the tokens, and the logarithm of the probability of each."""

    tokens: list[int]
    logprobs: list[float]


def prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """Questions of many lengths, in the model's chat form, as token ids."""
    draw = random.Random(0)
    found = []
    for _ in range(count):
        topics = draw.sample(TOPICS, draw.randint(1, 4))
        text = f"Say {draw.randint(2, 9)} words on {' and '.join(topics)}."
        if draw.random() < 0.5:
            text += f" The {draw.choice(TOPICS)} of {draw.randint(1800, 2020)} were {draw.choice(('kind', 'cold'))}."
        asked = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        found.append(list(asked["input_ids"] if not isinstance(asked, list) else asked))
    return found


def by_transformers(model: Any, asked: Sequence[list[int]]) -> list[Answer]:
    """Greedy answers of transformers, in batches padded on the left."""
    import torch
    from transformers import GenerationConfig

    found = []
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    for start in range(0, len(asked), BATCH):
        batch = asked[start : start + BATCH]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(one)) + one for one in batch])
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in batch])
        model.generation_config = config
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True)
        tokens = out.sequences[:, width:]
        logprobs = torch.stack([step.float().log_softmax(-1) for step in out.logits], 1)
        chosen = logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        found += [Answer(*pair) for pair in zip(tokens.tolist(), chosen.tolist(), strict=True)]
    return found


def by_llama_cpp(file: Path, adapter: Path | None, asked: Sequence[list[int]]) -> list[Answer]:
    """Greedy answers of llama.cpp."""
    import xllamacpp

    said = xllamacpp.CommonParams()
    said.model.path, said.n_ctx, said.n_parallel, said.warmup = str(file), 512, 1, False
    said.verbosity = 0
    said.cpuparams.n_threads = said.cpuparams_batch.n_threads = 1
    if adapter is not None:
        said.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(said)
    found = []
    for prompt in asked:
        body = {"prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "n_probs": TOP, "ignore_eos": False}
        answer = server.handle_completions({**body, "cache_prompt": True})
        answer = json.loads(answer) if isinstance(answer, str) else answer
        content = answer["choices"][0]["logprobs"]["content"]
        found.append(Answer([one["id"] for one in content], [one["logprob"] for one in content]))
    return found


def compare(ours: Sequence[Answer], theirs: Sequence[Answer]) -> dict[str, float]:
    """How far ``theirs``, llama.cpp's, are from ``ours``; a step counts up to the first that differs, that included."""
    same_answers = same_steps = steps = 0
    differences: list[float] = []
    for one, other in zip(ours, theirs, strict=True):
        length = min(len(one.tokens), len(other.tokens))  # llama.cpp stops at an end token
        agree = next((at for at in range(length) if one.tokens[at] != other.tokens[at]), length)
        same_answers += agree == length
        same_steps += agree
        steps += min(agree + 1, length)
        differences += [abs(one.logprobs[at] - other.logprobs[at]) for at in range(agree)]
    return {
        "same answers": same_answers / len(ours),
        "same steps": same_steps / max(1, steps),
        "mean difference of log-probabilities": statistics.fmean(differences) if differences else math.nan,
        "largest difference": max(differences, default=math.nan),
        "compared log-probabilities": len(differences),
    }


def short_run(folder: Path) -> Path:
    """A LoRA run of some steps on SmolLM2-135M, so that it writes other answers than its base."""
    from trimtab.config.read import load_config
    from trimtab.training.run import finetune

    draw = random.Random(1)
    said = []
    for _ in range(160):
        topic = draw.choice(TOPICS)
        answer = f"Aye: {topic} need {draw.randint(2, 9)} hands and one steady helm, captain."
        turns = [{"role": "user", "content": f"Say {draw.randint(2, 9)} words on {topic}."}]
        said.append({"messages": [*turns, {"role": "assistant", "content": answer}]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    settings = {
        "model": "smollm2-135m",
        "data": {"train": str(folder / "rows.jsonl")},
        "plan": [{"match": "all-linear", "method": "lora", "rank": 8, "alpha": 16}],
        "train": {"max_steps": 12, "batch_size": 8, "learning_rate": 1e-3},
        "output": str(folder / "run"),
    }
    (folder / "run.yaml").write_text(json.dumps(settings))
    return finetune(load_config(folder / "run.yaml")).path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--types", nargs="+", default=["f16", "q8_0", "own"], help="of merged files; own: each its own")
    parser.add_argument("--written", action="store_true", help="read each file with transformers and compare that, too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run = arguments.run or short_run(folder)
        found = {}
        for name, figures in measure(run, folder, arguments):
            found[name] = figures
            print(name, figures, flush=True)
            write_results("llama-cpp", {"prompts": arguments.prompts, "new_tokens": NEW_TOKENS}, found)
    columns = ("same answers", "same steps", "mean difference of log-probabilities", "largest difference")
    rows = [[name, *(f"{figures[column]:.4f}" for column in columns)] for name, figures in found.items()]
    show(f"llama.cpp against transformers, {arguments.prompts} prompts, {NEW_TOKENS} tokens", ("file", *columns), rows)
    differ = {name: figures["mean difference of log-probabilities"] for name, figures in found.items()}
    beyond = [name for name, most in TOLERANCE.items() if not differ.get(name, 0.0) <= most]
    if beyond:
        sys.exit(f"beyond the tolerance of the type: {', '.join(beyond)}")


def measure(run: Path, folder: Path, arguments: Any) -> Iterator[tuple[str, dict[str, float]]]:
    """The figures of each file, by its name."""
    from trimtab.export import Wishes, export_format, hand_over
    from trimtab.export._subject import Subject
    from trimtab.models.gguf import dequantised_folder

    subject = Subject.load(run, Wishes())
    base = Path(subject.source.location)
    subject.load_anew(dtype="float32")
    asked = prompts(subject.tokenizer, arguments.prompts)
    tuned = by_transformers(subject.model, asked)
    subject.model = None
    yield "the base alone", compare(tuned, by_llama_cpp(base, None, asked))
    hand_over(export_format("gguf-lora"), run, folder / "lora", Wishes())
    yield "gguf-lora", compare(tuned, by_llama_cpp(base, folder / "lora" / "adapter.gguf", asked))
    for kind in arguments.types:
        file = folder / kind / "model.gguf"
        handed = hand_over(export_format("gguf"), run, file.parent, Wishes(type=None if kind == "own" else kind))
        print(f"{kind}: {handed.agreement}", *handed.notes, sep="\n    ", flush=True)
        theirs = by_llama_cpp(file, None, asked)
        yield kind, compare(tuned, theirs)
        if arguments.written:
            yield (
                f"{kind}, to its own weights",
                compare(by_transformers(_read(dequantised_folder(file)), asked), theirs),
            )


def _read(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


if __name__ == "__main__":
    main()
