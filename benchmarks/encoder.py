"""A classifier on the encoder MiniLM with DoRA: `trimtab finetune` of a YAML against PEFT with transformers' Trainer.

    python benchmarks/encoder.py                          both sets, seeds 0, 1, 2; half an hour on two quiet cores
    python benchmarks/encoder.py --sets harbour --seeds 0 --arms peft
    python benchmarks/encoder.py --sets fpb --order random --seeds 0 1 2 3 4 5 6 7

The sets are examples/harbour and the Financial PhraseBank of ../shared/data (960 of its training rows, all test rows),
which the repository does not hold; where it is not there, the program says so and goes on without.

Both arms train the same model on the same rows with the same rank, alpha, learning rate, schedule, batch size and
steps, in float32, with an adapter on every linear layer of the encoder and the head trained fully. PEFT follows
transformers' own example of text classification (AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer),
with what is documented as quicker: batches of rows of like length and fused AdamW. The two put rows of like length
together in ways of their own (trimtab shuffles such batches, transformers takes those of a quarter of an epoch from the
longest to the shortest), and in a hundred steps the order alone moves the accuracy by several points. So accuracies are
compared by ``--order random``, where both draw their rows at random. Each run is a process of its own, the arms taking
turns (A B A B) seed by seed. ``seconds`` and ``peak`` are those of training with a model that is loaded; ``process`` is
the whole of it, from the start to the test rows scored, and ``processor`` what that took of the processors' time, which
other work on the machine moves less. Ratios are ours over PEFT's, of medians; accuracies are means over seeds.
benchmarks/results/encoder-SET.json and encoder-SET-random.json have every figure.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common import child, show, write_results

ROOT = Path(__file__).resolve().parents[1]
FINANCE = ROOT.parent / "shared" / "data" / "finance"
ARMS = ("trimtab", "peft")
BATCH, WARMUP = 16, 0.1
STEPS = {"harbour": 90, "fpb": 120}  # three epochs and two
FPB_ROWS = 960
TIMES = ("seconds", "process", "processor", "peak_gib")
Rows = list[dict[str, str]]


def harbour_rows(part: str) -> Rows:
    from trimtab.files import read_jsonl

    rows = read_jsonl(ROOT / "examples" / "harbour" / f"{part}.jsonl")
    return _bare((row["prompt"], row["completion"]) for row in rows)


def finance_rows(part: str) -> Rows:
    from trimtab.files import read_jsonl

    rows = _bare((row["context"], row["target"]) for row in read_jsonl(FINANCE / f"fpb_{part}.jsonl"))
    return random.Random(0).sample(rows, FPB_ROWS) if part == "train" else rows


def _bare(pairs: Iterable[tuple[str, str]]) -> Rows:
    """Texts with labels, without the question around them that is the same for all: a head needs none."""
    texts, labels = zip(*pairs, strict=True)
    begin, end = len(_common(texts)), len(_common([text[::-1] for text in texts]))
    return [
        {"text": text[begin : len(text) - end].strip(), "label": label.strip()}
        for text, label in zip(texts, labels, strict=True)
    ]


def _common(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    low, high = min(texts), max(texts)
    return next((low[:at] for at, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), low)


SETS = {"harbour": harbour_rows, "fpb": finance_rows}


def run_ours(folder: Path, said: argparse.Namespace) -> dict[str, float]:
    """One YAML and one command; the run's own record has the figures."""
    from trimtab import cli
    from trimtab.files import read_json, write_text

    write_text(
        folder / "run.yaml",
        f"""\
model: minilm
task: sequence_classification
data: {{train: train.jsonl, test: {{test: test.jsonl}}, validation: null}}
plan: [{{match: all-linear, method: dora, rank: {said.rank}, alpha: {2 * said.rank}}}]
train: {{max_steps: {said.steps}, epochs: 1000, batch_size: {BATCH}, learning_rate: {said.learning_rate},
  schedule: linear, warmup: {WARMUP}, precision: float32, seed: {said.seed}, save_every: 100000,
  group_by_length: {str(said.order == "length").lower()}}}
evaluation: {{before: false}}
output: {folder / "run"}
""",
    )
    sys.argv[:] = ["trimtab", "finetune", str(folder / "run.yaml")]
    try:
        cli.main()
    except SystemExit as ended:
        if ended.code:
            raise
    run = folder / "run"
    summary, test = read_json(run / "summary.json"), read_json(run / "evaluation" / "test.after.json")
    return {
        "seconds": summary["training_seconds"],
        "peak_gib": summary["peak_memory_gib"],
        "trained": summary["trainable_parameters"],
        "accuracy": 100 * test["accuracy"],
        "macro_f1": 100 * test["macro_f1"],
    }


def run_peft(folder: Path, said: argparse.Namespace) -> dict[str, float]:
    """As transformers' example of text classification does it, with a PEFT model."""
    import datasets
    from peft import LoraConfig, get_peft_model
    from sklearn.metrics import accuracy_score, f1_score
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    from trimtab.files import read_jsonl
    from trimtab.machine import peak_memory_gib
    from trimtab.models.locate import locate

    set_seed(said.seed)
    datasets.disable_progress_bars()
    place = locate("minilm").location
    tokenizer = AutoTokenizer.from_pretrained(place)
    parts = {part: list(read_jsonl(folder / f"{part}.jsonl")) for part in ("train", "test")}
    labels = sorted({row["label"] for row in parts["train"]})

    def encode(row: dict[str, str]) -> dict[str, Any]:
        ids = tokenizer(row["text"], truncation=True)
        return {**ids, "label": labels.index(row["label"]), "length": len(ids["input_ids"])}

    rows = {part: datasets.Dataset.from_list([encode(row) for row in those]) for part, those in parts.items()}
    names = dict(enumerate(labels))
    model = AutoModelForSequenceClassification.from_pretrained(
        place, num_labels=len(labels), id2label=names, label2id={name: at for at, name in names.items()}
    )
    config = LoraConfig(
        task_type="SEQ_CLS", r=said.rank, lora_alpha=2 * said.rank, use_dora=True, target_modules="all-linear"
    )
    model = get_peft_model(model, config)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(folder / "peft"),
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=64,
            max_steps=said.steps,
            learning_rate=said.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=WARMUP,
            optim="adamw_torch_fused",
            train_sampling_strategy={"length": "group_by_length", "random": "random"}[said.order],
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=said.seed,
        ),
        train_dataset=rows["train"],
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    began = time.perf_counter()
    trainer.train()
    found = {"seconds": time.perf_counter() - began, "peak_gib": peak_memory_gib()}
    told: Any = trainer.predict(rows["test"])
    given = told.predictions.argmax(1)
    return {
        **found,
        "trained": sum(one.numel() for one in model.parameters() if one.requires_grad),
        "accuracy": 100 * float(accuracy_score(told.label_ids, given)),
        "macro_f1": 100 * float(f1_score(told.label_ids, given, average="macro")),
    }


def run_arm(said: argparse.Namespace) -> None:
    """Run one arm and print its figures as the last line."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("train", "test"):
            from trimtab.files import write_jsonl

            write_jsonl(folder / f"{part}.jsonl", SETS[said.set](part))
        found = (run_ours if said.arm == "trimtab" else run_peft)(folder, said)
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({**found, "processor": used.ru_utime + used.ru_stime}))


def measure(said: argparse.Namespace, name: str) -> dict[str, list[dict[str, float]]]:
    """Every arm's figures on one set, a run for each seed."""
    runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in said.arms}
    steps = str(said.steps or STEPS[name])
    for seed in said.seeds:
        for arm, found in runs.items():
            options = {"arm": arm, "set": name, "seed": seed, "steps": steps, "rank": said.rank}
            options |= {"learning-rate": said.learning_rate, "order": said.order}
            began = time.perf_counter()
            one = child(__file__, *(word for key, value in options.items() for word in (f"--{key}", str(value))))
            found.append({**one, "process": time.perf_counter() - began})
            print(f"{name}, seed {seed}, {arm}: {found[-1]}", flush=True)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS), metavar="SET")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=None, help=f"default: {STEPS}")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--order", default="length", choices=("length", "random"), help="how rows meet in a batch")
    parser.add_argument(
        "--out", default="encoder", metavar="NAME", help="what the files in benchmarks/results begin with"
    )
    for hidden in ("--arm", "--set"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.arm:
        run_arm(said)
        return

    table = []
    for name in said.sets:
        if name == "fpb" and not FINANCE.is_dir():
            print("fpb is left out: expected the folder ../shared/data/finance beside the repository", file=sys.stderr)
            continue
        runs = measure(said, name)
        medians = {
            arm: {key: statistics.median(one[key] for one in those) for key in those[0]} for arm, those in runs.items()
        }
        steps = said.steps or STEPS[name]
        what = {"set": name, "method": "dora", "rank": said.rank, "learning_rate": said.learning_rate}
        what |= {"batch_size": BATCH, "steps": steps, "seeds": said.seeds, "order": said.order}
        file = f"{said.out}-{name}" if said.order == "length" else f"{said.out}-{name}-{said.order}"
        write_results(file, what, {"runs": runs, "medians": medians})
        table += [_line(f"{name}, {arm}", runs[arm], medians[arm], medians.get("peft", medians[arm])) for arm in runs]
    columns = ("arm", "trained", "seconds", "process", "processor", "peak GiB", "accuracy %", "macro F1 %")
    show("In brackets: the ratio to PEFT's median; the range over seeds.", columns, table)


def _line(arm: str, runs: list[dict[str, float]], median: dict[str, float], floor: dict[str, float]) -> list[str]:
    """A line of the table."""
    of = {key: [one[key] for one in runs] for key in ("accuracy", "macro_f1")}
    return [
        arm,
        f"{median['trained']:,.0f}",
        *(f"{median[key]:.2f} ({median[key] / floor[key]:.2f})" for key in TIMES),
        *(f"{statistics.mean(those):.1f} ({min(those):.1f} to {max(those):.1f})" for those in of.values()),
    ]


if __name__ == "__main__":
    main()
