"""Peak memory of runs, measured, over what ``trimtab plan`` estimates before them.

    python benchmarks/memory.py                    every run, one process after the other; an hour or two
    python benchmarks/memory.py --only dora        those whose name holds a word: "real rows", a method
    python benchmarks/memory.py --again            estimate anew, and keep what was measured
    python benchmarks/memory.py --process          what a run's process holds beyond the process of ``trimtab plan``

Each is a run by ``trimtab finetune`` in a process of its own. Those on random words or pictures take three steps, on
rows that are all of one length, with nothing evaluated: the tensors alone are put to the test. Those of other tasks
than causal_lm are among these, on all-MiniLM-L6-v2 or on random weights of a usual size. Those on real rows take forty,
on rows of many lengths (of ../shared/data, which the repository does not hold), and validate and test, too: nothing may
grow with the number of widths. Measured is the largest resident memory of the process, as the run's own summary.json
has it: Python, libraries and all. The estimate is that of ``trimtab plan`` on the same file, in a process of its own,
too.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from common import RESULTS, show, write_results
from random_models import NAMES, PIXELS, write_model

TRIMTAB = [sys.executable, "-c", "from trimtab.cli import main; main()"]
WORDS = ("ship", "rope", "fog", "crane", "tide", "wind", "calm", "pilot")
SPARE_GIB = 1.0
ROWS = Path(__file__).resolve().parents[2] / "shared" / "data"
STEPS = {False: 3, True: 40}


@dataclass(frozen=True)
class Combination:
    """One run.

    ``rows``: of a batch. ``data``: real rows, a folder and the beginning of its files' names; else random words.
    ``length``: of the longest row, in tokens, or of a picture's side, in pixels. ``form`` of random words: text (every
    token carries loss) or answers (one does).
    ``match``: of the plan's rule.
    """

    method: str
    rows: int
    length: int = 512
    precision: str = "bfloat16"
    quantisation: str = "none"
    checkpointing: bool = False
    form: str = "text"
    attention: str = "auto"
    match: str = "all-linear"
    task: str = "causal_lm"
    layers: str = "all"
    dropout: float = 0.0
    accumulation: int = 1
    model: str = "smollm2-135m"
    data: str = ""

    @property
    def name(self) -> str:
        """Everything that differs from the plainest run."""
        size = f"{self.rows} rows" if self.data else f"{self.rows} x {self.length}"
        parts = [self.method, size, self.precision]
        parts += [self.quantisation] if self.quantisation != "none" else []
        parts += ["checkpointing"] if self.checkpointing else []
        parts += [self.form] if self.form != "text" else []
        parts += [self.attention] if self.attention != "auto" else []
        parts += [f"on {self.match}"] if self.match != "all-linear" else []
        parts += [f"blocks {self.layers}"] if self.layers != "all" else []
        parts += [f"dropout {self.dropout}"] if self.dropout else []
        parts += [f"accumulation {self.accumulation}"] if self.accumulation > 1 else []
        parts += [self.task] if self.task != "causal_lm" else []
        parts += [f"real rows of {self.data.split('/')[1]}"] if self.data else []
        parts += [f"{self.model} model"] if self.model != "smollm2-135m" else []
        return ", ".join(parts)


COMBINATIONS = (
    Combination("lora", 8, 128),
    Combination("lora", 8, 256, dropout=0.1),
    Combination("lora", 4, 512, checkpointing=True),
    Combination("lora", 8, 256, precision="float32"),
    Combination("lora", 16, 128, attention="eager", form="answers"),
    Combination("dora", 8, 256),
    Combination("dora", 16, 256, checkpointing=True),
    Combination("dora", 2, 1024),
    Combination("dora", 4, 256, precision="float32", checkpointing=True),
    Combination("dora", 8, 256, layers="outer:4", accumulation=2),
    Combination("dora", 16, 256, match="*.q_proj"),
    Combination("mora", 8, 256),
    Combination("mora", 4, 256, precision="float32"),
    Combination("full", 2, 128),
    Combination("full", 8, 256),
    Combination("full", 4, 256, precision="float32", checkpointing=True),
    Combination("lora", 8, 256, quantisation="int8"),
    Combination("lora", 8, 256, quantisation="nf4", checkpointing=True),
    Combination("dora", 8, 256, quantisation="nf4"),
    Combination("dora", 4, 512, quantisation="int8", checkpointing=True),
    Combination("lora", 16, 256, model="wide"),
    Combination("dora", 8, 256, "float32", model="wide"),
    Combination("dora", 16, 128, "float32", task="sequence_classification", model="minilm"),
    Combination("full", 8, 128, "float32", task="sequence_classification", model="minilm"),
    Combination("lora", 8, 256, "float32", task="regression", model="minilm"),
    Combination("dora", 16, 64, "float32", task="regression", model="minilm"),
    Combination("dora", 8, 256, "float32", task="token_classification", model="minilm"),
    Combination("lora", 16, 64, "float32", task="token_classification", model="minilm"),
    Combination("dora", 8, 256, "float32", task="seq2seq", model="t5-small"),
    Combination("full", 16, 64, "float32", task="seq2seq", model="t5-small"),
    Combination("dora", 16, PIXELS, "float32", task="image_classification", model="vit-small"),
    Combination("lora", 16, PIXELS, "float32", task="image_classification", model="resnet-50"),
    Combination("full", 8, PIXELS, "float32", task="image_classification", model="resnet-50"),
    Combination("dora", 16, data="finance/fpb", model="small"),
    Combination("mora", 16, data="commonsense/ARC-Challenge", model="small", precision="float32"),
    Combination("full", 32, data="finance/fpb", model="small"),
    Combination("lora", 32, data="commonsense/openbookqa", model="small", checkpointing=True),
    Combination("dora", 8, data="finance/fpb", model="small", precision="float32", accumulation=2),
    Combination("dora", 4, data="finance/fiqa"),
    Combination("lora", 4, data="finance/fiqa", precision="float32"),
    Combination("full", 2, data="finance/fiqa"),
    Combination("dora", 2, data="commonsense/ARC-Challenge", quantisation="int8"),
    Combination("lora", 4, data="finance/fiqa", quantisation="nf4", checkpointing=True),
)


def write_run(folder: Path, asked: Combination) -> Path:
    """The YAML of a run, and what it reads."""
    from trimtab.config.yaml_text import write_yaml

    rule: dict[str, Any] = {"match": asked.match, "layers": asked.layers, "method": asked.method}
    if asked.method != "full":
        rule |= {"rank": 16, "dropout": asked.dropout}
    model = write_model(folder / "model", asked.model) if asked.model in NAMES else asked.model
    said: dict[str, Any] = {
        "task": asked.task,
        "model": {"name": model, "attention": asked.attention},
        "quantisation": asked.quantisation,
        "data": rows_of(folder, asked),
        "plan": [rule],
        "train": {
            "max_steps": STEPS[bool(asked.data)],
            "batch_size": asked.rows,
            "gradient_accumulation": asked.accumulation,
            "precision": asked.precision,
            "gradient_checkpointing": asked.checkpointing,
            "learning_rate": 1e-5 if asked.method == "full" else 5e-4,
        },
        "evaluation": {"limit": 20},
        "output": str(folder / "run"),
    }
    path = folder / "run.yaml"
    path.write_text(write_yaml(said), encoding="utf-8")
    return path


def rows_of(folder: Path, asked: Combination) -> dict[str, Any]:
    """What ``data`` of the YAML says."""
    if asked.task == "image_classification":
        return random_pictures(folder / "pictures", asked)
    return (real_rows(asked.data) if asked.data else random_words(folder, asked)) | {"max_length": asked.length}


def random_pictures(folder: Path, asked: Combination) -> dict[str, Any]:
    """A folder of pictures for each of two labels."""
    import numpy
    from PIL import Image

    chance = numpy.random.default_rng(0)
    for number in range(STEPS[False] * asked.rows):
        path = folder / ("fog", "sun")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(chance.integers(0, 256, (asked.length, asked.length, 3), dtype=numpy.uint8)).save(path)
    return {"train": "pictures", "validation": None}


def random_words(folder: Path, asked: Combination) -> dict[str, Any]:
    """Rows that are all of one length."""
    from trimtab.models.locate import locate
    from trimtab.models.model_files import load_tokenizer

    tokenizer: Any = load_tokenizer(locate("smollm2-135m"))
    chance = random.Random(0)
    rows = []
    for _ in range(STEPS[False] * asked.rows * asked.accumulation):
        if asked.task != "causal_lm":
            rows.append(labelled([chance.choice(WORDS) for _ in range(asked.length - 2)], asked.task, chance))
            continue
        text = " ".join(chance.choice(WORDS) for _ in range(2 * asked.length))
        text = tokenizer.decode(tokenizer(text)["input_ids"][: asked.length - 1])
        rows.append({"text": text} if asked.form == "text" else {"prompt": text, "completion": chance.choice("ABC")})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"train": "rows.jsonl", "validation": None}


def labelled(words: list[str], task: str, chance: random.Random) -> dict[str, Any]:
    """A row of another task than causal_lm; each of ``words`` is one token."""
    if task == "token_classification":
        return {"tokens": words, "tags": [chance.choice(["O", "B-SHIP", "I-SHIP"]) for _ in words]}
    if task == "seq2seq":
        return {"source": " ".join(words), "target": " ".join(words[: len(words) // 4])}
    label = chance.choice("ABC") if task == "sequence_classification" else chance.gauss(50.0, 10.0)
    return {"text": " ".join(words), "label": label}


def real_rows(name: str) -> dict[str, Any]:
    """Rows of many lengths, of which some are for validation, and test rows."""
    middle, ending = ("/", "json") if name.startswith("commonsense") else ("_", "jsonl")
    train, test = (ROWS / f"{name}{middle}{part}.{ending}" for part in ("train", "test"))
    return {"train": str(train), "train_limit": 300, "validation": 0.1, "test": {"test": str(test)}}


def trimtab(*arguments: str) -> str:
    """What a verb of the command line prints."""
    done = subprocess.run([*TRIMTAB, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"trimtab {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def planned(yaml: Path) -> dict[str, Any]:
    """The estimate."""
    out = trimtab("plan", str(yaml), "--json")
    found: dict[str, Any] = json.loads(out[out.index("{") :])["memory"]
    return found


def measured(yaml: Path) -> float:
    """Peak memory of the run, GiB."""
    trimtab("finetune", str(yaml), "--overwrite")
    text = (yaml.parent / "run" / "summary.json").read_text(encoding="utf-8")
    return float(json.loads(text)["peak_memory_gib"])


def measure_process() -> None:
    """What a run's process holds at its peak beyond its tensors and the process of the plan: libraries, threads,
    compiled products. The model is so small that its tensors are few."""
    from trimtab.memory.estimate import BEYOND

    for precision in ("bfloat16", "float32"):
        with tempfile.TemporaryDirectory() as name:
            yaml = write_run(Path(name), Combination("dora", 4, data="finance/fiqa", model="tiny", precision=precision))
            tensors = planned(yaml)["peak"] * 2**10 - BEYOND / 2**20
            peak = measured(yaml) * 2**10
        print(f"{precision}: {peak:.0f} MiB, {peak - tensors:.0f} more than the plan's process and tensors", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="WORD", help="combinations whose name holds this")
    parser.add_argument("--again", action="store_true", help="estimate anew what has been measured before")
    parser.add_argument("--process", action="store_true", help="measure what a run's process holds beyond the plan's")
    said = parser.parse_args()
    if said.process:
        return measure_process()
    results = RESULTS / "memory.json"
    before = json.loads(results.read_text(encoding="utf-8"))["found"] if results.is_file() else []
    known = {row["name"]: row for row in before}

    for asked in COMBINATIONS:
        if said.only not in asked.name or (said.again and asked.name not in known):
            continue
        with tempfile.TemporaryDirectory() as name:
            yaml = write_run(Path(name), asked)
            memory = planned(yaml)
            free = psutil.virtual_memory().available / 2**30
            if not said.again and memory["peak"] + SPARE_GIB > free:
                print(f"{asked.name}: left out, since it needs {memory['peak']:.1f} GiB and {free:.1f} are free")
                continue
            peak = known[asked.name]["measured"] if said.again else measured(yaml)
        moments = {moment: sum(parts.values()) for moment, parts in memory["moments"].items()}
        known[asked.name] = {
            "name": asked.name,
            **asdict(asked),
            "measured": peak,
            "estimated": memory["peak"],
            "highest": max(moments, key=lambda moment: moments[moment]),
            "ratio": peak / memory["peak"],
            "moments": memory["moments"],
        }
        print(f"{asked.name}: {peak:.2f} / {memory['peak']:.2f} = {peak / memory['peak']:.3f}", flush=True)
        write_results("memory", {"steps": "3; 40 on real rows", "rank": 16}, list(known.values()))

    found = [known[asked.name] for asked in COMBINATIONS if asked.name in known]
    show(
        "The process's peak memory in GiB; SmolLM2-135M unless a run is said to be of another model",
        ["run", "highest", "estimated", "measured", "measured / estimated"],
        [
            [row["name"], row["highest"], f"{row['estimated']:.2f}", f"{row['measured']:.2f}", f"{row['ratio']:.3f}"]
            for row in found
        ],
    )


if __name__ == "__main__":
    main()
