"""Peak memory of runs, measured, over what ``trimtab plan`` estimates before them.

    python benchmarks/memory.py                    every combination, one process after the other; about an hour
    python benchmarks/memory.py --only dora        those whose name holds a word
    python benchmarks/memory.py --again            estimate anew, and keep what was measured

Each combination is a run of SmolLM2-135M by ``trimtab finetune`` in a process of its own: three steps on rows of
random words, all of the same number of tokens, with nothing evaluated. Measured is the largest resident memory of that
process, as the run's own summary.json has it: Python, libraries and all. The estimate is that of ``trimtab plan`` on
the same file, in a process of its own, too.
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

TRIMTAB = [sys.executable, "-c", "from trimtab.cli import main; main()"]
WORDS = ("ship", "rope", "fog", "crane", "tide", "wind", "calm", "pilot")
SPARE_GIB = 1.0


@dataclass(frozen=True)
class Combination:
    """One run. ``form``: text (every token carries loss) or answers (one does). ``match``: of the plan's rule."""

    method: str
    rows: int
    length: int
    precision: str = "bfloat16"
    quantisation: str = "none"
    checkpointing: bool = False
    form: str = "text"
    attention: str = "auto"
    match: str = "all-linear"
    layers: str = "all"
    dropout: float = 0.0
    accumulation: int = 1

    @property
    def name(self) -> str:
        """Everything that differs from the plainest run."""
        parts = [self.method, f"{self.rows} x {self.length}", self.precision]
        parts += [self.quantisation] if self.quantisation != "none" else []
        parts += ["checkpointing"] if self.checkpointing else []
        parts += [self.form] if self.form != "text" else []
        parts += [self.attention] if self.attention != "auto" else []
        parts += [f"on {self.match}"] if self.match != "all-linear" else []
        parts += [f"blocks {self.layers}"] if self.layers != "all" else []
        parts += [f"dropout {self.dropout}"] if self.dropout else []
        parts += [f"accumulation {self.accumulation}"] if self.accumulation > 1 else []
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
)


def write_run(folder: Path, asked: Combination) -> Path:
    """The rows and the YAML of a run."""
    from trimtab.config.yaml_text import write_yaml
    from trimtab.models.load import load_tokenizer
    from trimtab.models.locate import locate

    tokenizer: Any = load_tokenizer(locate("smollm2-135m"))
    chance = random.Random(0)
    rows = []
    for _ in range(3 * asked.rows * asked.accumulation):
        text = " ".join(chance.choice(WORDS) for _ in range(2 * asked.length))
        text = tokenizer.decode(tokenizer(text)["input_ids"][: asked.length - 1])
        rows.append({"text": text} if asked.form == "text" else {"prompt": text, "completion": chance.choice("ABC")})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    rule: dict[str, Any] = {"match": asked.match, "layers": asked.layers, "method": asked.method}
    if asked.method != "full":
        rule |= {"rank": 16, "dropout": asked.dropout}
    said: dict[str, Any] = {
        "model": {"name": "smollm2-135m", "attention": asked.attention},
        "data": {"train": "rows.jsonl", "validation": None, "max_length": asked.length},
        "plan": [rule],
        "train": {
            "max_steps": 3,
            "batch_size": asked.rows,
            "gradient_accumulation": asked.accumulation,
            "precision": asked.precision,
            "gradient_checkpointing": asked.checkpointing,
        },
        "output": str(folder / "run"),
    }
    if asked.quantisation != "none":
        said["quantisation"] = asked.quantisation
    path = folder / "run.yaml"
    path.write_text(write_yaml(said), encoding="utf-8")
    return path


def trimtab(*arguments: str) -> str:
    """What a verb of the command line prints."""
    done = subprocess.run([*TRIMTAB, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"trimtab {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def planned(yaml: Path) -> dict[str, Any]:
    """The estimate."""
    out = trimtab("plan", str(yaml), "--json")
    return json.loads(out[out.index("{") :])["memory"]


def measured(yaml: Path) -> float:
    """Peak memory of the run, GiB."""
    trimtab("finetune", str(yaml), "--overwrite")
    return json.loads((yaml.parent / "run" / "summary.json").read_text(encoding="utf-8"))["peak_memory_gib"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="WORD", help="combinations whose name holds this")
    parser.add_argument("--again", action="store_true", help="estimate anew what has been measured before")
    said = parser.parse_args()
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
        write_results("memory", {"steps": 3, "model": "smollm2-135m", "rank": 16}, list(known.values()))

    found = [known[asked.name] for asked in COMBINATIONS if asked.name in known]
    show(
        "SmolLM2-135M, three steps: the process's peak memory in GiB",
        ["run", "highest", "estimated", "measured", "measured / estimated"],
        [
            [row["name"], row["highest"], f"{row['estimated']:.2f}", f"{row['measured']:.2f}", f"{row['ratio']:.3f}"]
            for row in found
        ],
    )


if __name__ == "__main__":
    main()
