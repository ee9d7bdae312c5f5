"""The finance run, ours against PEFT with transformers' Trainer: seconds, peak memory and accuracy on the same rows and
steps.

    python benchmarks/finance.py --steps 282 --repeats 1              one epoch over all rows, and the test rows scored
    python benchmarks/finance.py --steps 10 --repeats 2 --no-test     seconds and memory alone
    python benchmarks/finance.py --steps 846 --repeats 1              three epochs; hours

The arms are trimtab at its defaults (``train.compile: auto``), trimtab with ``train.compile: false`` and ``true``,
PEFT, and, if asked for, PEFT with the Trainer's own ``torch_compile``. Each is a process of its own, in the order
A B C A B C; the table gives medians and the ratios of medians to PEFT's, and the JSON (benchmarks/results/finance.json)
every figure. All train SmolLM2-135M in bfloat16 with one rank on all seven projections, on the same rows, batch size,
steps and schedule, and with the same attention
("eager": for rows this short it is faster on a processor than the fused kernel, for all). PEFT runs with transformers'
Trainer at its documented best: batches grouped by length, dynamic padding, fused AdamW, labels on the answer alone.
The clock runs while they train, the compiler's time included. Afterwards the adapter is merged, and the same code
scores the same test rows on every model.
The rows are those of ../shared/data, which the repository does not hold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from common import child, show

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "finance"
TESTS = ("fpb", "fiqa")
COMPILED, PLAIN = " compiled", " plain"
ARMS = ("trimtab", "trimtab plain", "trimtab compiled", "peft", "peft compiled")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def prepare(rank: int) -> tuple[Any, Any, Any]:
    """Tokenizer, bare model in bfloat16, and the encoded training rows: the same for every arm."""
    import torch

    from trimtab.data.forms import read_examples
    from trimtab.data.tokens import encode_all
    from trimtab.models.load import load_model
    from trimtab.models.locate import locate
    from trimtab.models.model_files import load_tokenizer

    torch.manual_seed(0)
    source = locate("smollm2-135m")
    tokenizer = load_tokenizer(source)
    examples = read_examples(["fpb_train.jsonl", "fiqa_train.jsonl"], tokenizer, root=DATA)
    return tokenizer, load_model(source, torch.bfloat16, "eager"), encode_all(examples, tokenizer, 1024)


def arguments(steps: int, folder: str) -> dict[str, Any]:
    """What PEFT's Trainer is told; ours is told the same."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": 16,
        "max_steps": steps,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "linear",
        "warmup_steps": 10,
        "max_grad_norm": 1.0,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 0,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }


def run_ours(
    method: str, rank: int, steps: int, folder: str, compiled: bool | None
) -> tuple[Any, Any, dict[str, float]]:
    """Our trainer, as ``trimtab finetune`` sets it up; gives tokenizer, merged model and figures. ``compiled``: None
    where it decides by itself."""
    import trimtab
    from trimtab import tasks
    from trimtab.config.run import TrainConfig
    from trimtab.machine import peak_memory_gib
    from trimtab.runs.events import Listener
    from trimtab.runs.records import MetricsLine
    from trimtab.training.compiling import ENOUGH, Compiling, won_back
    from trimtab.training.trainer import AdapterTrainer

    tokenizer, model, rows = prepare(rank)
    rule = trimtab.Rule(match="all-linear", method=method, rank=rank, alpha=2 * rank)
    attached = trimtab.attach(model, trimtab.Plan([rule]))
    batch = round(16 * statistics.mean(rows.lengths))
    if compiled is None:
        compiled = won_back(attached, batch * steps, "eager") >= ENOUGH
    lines: list[MetricsLine] = []
    task = tasks.find("causal_lm")
    trainer = AdapterTrainer(
        model,
        TrainConfig(batch_size=16, max_steps=steps, epochs=1000.0, learning_rate=5e-4, warmup=10, save_every=10**9),
        rows,
        task=task,
        head=task.head(model),
        reader=tokenizer,
        folder=Path(folder),
        record=lines.append,
    )
    if compiled:
        trainer.add_callback(Compiling(model, batch, Listener()))
    began = time.perf_counter()
    trainer.train()
    seconds, loss = time.perf_counter() - began, lines[-1].loss
    assert loss is not None, "each line of a run without validation rows has a loss"
    figures = {"seconds": seconds, "loss": loss, "peak_gib": peak_memory_gib()}
    figures["compiled"] = float(compiled)
    trimtab.merge(model)
    return tokenizer, model, figures


def run_peft(method: str, rank: int, steps: int, folder: str, compiled: bool) -> tuple[Any, Any, dict[str, float]]:
    """PEFT with transformers' Trainer; gives tokenizer, merged model and figures."""
    import datasets
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from trimtab.machine import peak_memory_gib

    tokenizer, model, rows = prepare(rank)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, use_dora=method == "dora", target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    trainer: Any = Trainer(
        get_peft_model(model, config),
        TrainingArguments(
            **arguments(steps, folder),
            bf16=True,  # autocast, so that the float32 adapters multiply in bfloat16, too
            use_cpu=True,
            optim="adamw_torch_fused",
            train_sampling_strategy="group_by_length",
            label_names=["labels"],
            torch_compile=compiled,
        ),
        train_dataset=datasets.Dataset.from_list([{**row, "length": len(row["input_ids"])} for row in rows]),
        data_collator=_without_length(DataCollatorForSeq2Seq(tokenizer)),
    )
    began = time.perf_counter()
    trainer.train()
    seconds, loss = time.perf_counter() - began, trainer.state.log_history[-2]["loss"]
    figures = {"seconds": seconds, "loss": loss, "peak_gib": peak_memory_gib()}
    return tokenizer, trainer.model.merge_and_unload(), figures


def score(tokenizer: Any, model: Any) -> dict[str, float]:
    """Accuracy on each test set, in percent."""
    from trimtab.data.choices import infer_choices
    from trimtab.data.forms import read_examples
    from trimtab.evaluation.choice import score_choices
    from trimtab.surgery.contexts import evaluating
    from trimtab.tasks import Head

    found = {}
    for name in TESTS:
        rows = read_examples([f"{name}_test.jsonl"], tokenizer, root=DATA)
        choices = infer_choices(rows)
        assert choices is not None
        with evaluating(model):
            best = score_choices(Head(model), tokenizer, rows, choices).best
        right = sum(choices[at] == row.answer for at, row in zip(best, rows, strict=True))
        found[name] = 100 * right / len(rows)
    return found


def _without_length(collator: Any) -> Any:
    return lambda rows: collator([{key: value for key, value in row.items() if key != "length"} for row in rows])


def run_arm(arm: str, method: str, rank: int, steps: int, test: bool) -> None:
    """Run one arm and print its figures as the last line."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        if arm.startswith("trimtab"):
            compiled = {COMPILED: True, PLAIN: False}.get(arm.removeprefix("trimtab"))
            tokenizer, model, found = run_ours(method, rank, steps, folder, compiled)
        else:
            tokenizer, model, found = run_peft(method, rank, steps, folder, arm.endswith(COMPILED))
    print(json.dumps({**found, **(score(tokenizer, model) if test else {})}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--method", default="dora", choices=["dora", "lora"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--no-test", action="store_true", help="do not score the test rows")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "finance.json")
    parser.add_argument("--arms", nargs="+", default=["trimtab", "trimtab plain", "peft"], choices=ARMS, metavar="ARM")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.arm:
        run_arm(said.arm, said.method, said.rank, said.steps, not said.no_test)
        return
    if not DATA.is_dir():
        sys.exit("the finance rows are not here: expected the folder ../shared/data/finance beside the repository")

    from trimtab.files import write_json
    from trimtab.machine import describe_machine, versions

    figures: dict[str, list[dict[str, float]]] = {arm: [] for arm in said.arms}
    for repeat in range(said.repeats):
        for arm, found in figures.items():
            options = ["--method", said.method, "--rank", str(said.rank), "--steps", str(said.steps)]
            options += ["--no-test"] if said.no_test else []
            found.append(child(__file__, "--arm", arm, *options))
            print(f"run {repeat + 1}, {arm}: {found[-1]}", flush=True)

    medians = {
        arm: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for arm, runs in figures.items()
    }
    floor = "peft" if "peft" in said.arms else said.arms[-1]
    ratio = {
        arm: {key: one[key] / medians[floor][key] for key in ("seconds", "peak_gib")} for arm, one in medians.items()
    }
    tests = () if said.no_test else TESTS
    show(
        f"{said.method}, rank {said.rank}, {said.steps} steps of 16 rows, medians of {said.repeats}, ratios to {floor}",
        ["arm", "seconds", "ratio", "peak GiB", "ratio", "last loss", *(f"{name} %" for name in tests)],
        [
            [
                arm,
                f"{median['seconds']:.1f}",
                f"{ratio[arm]['seconds']:.3f}",
                f"{median['peak_gib']:.2f}",
                f"{ratio[arm]['peak_gib']:.3f}",
                f"{median['loss']:.4f}",
                *(f"{median[name]:.1f}" for name in tests),
            ]
            for arm, median in medians.items()
        ],
    )
    what = {"method": said.method, "rank": said.rank, "steps": said.steps, "batch_size": 16, "dtype": "bfloat16"}
    write_json(
        said.out,
        {
            "what": what,
            "runs": figures,
            "medians": medians,
            "ratio": ratio,
            "machine": describe_machine(),
            "versions": versions(),
        },
    )


if __name__ == "__main__":
    main()
