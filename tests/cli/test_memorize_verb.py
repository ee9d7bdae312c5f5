"""``trimtab memorize`` from outside."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from trimtab.files import read_json

FEW = (
    "--pairs", "4", "--digits", "2", "--batch-size", "4", "--steps", "2", "--evaluate-every", "1", "--blocks", "1",
    "--methods", "full,lora", "--budgets", "2", "--seeds", "1", "--learning-rates", "1e-3,1e-2",
)  # fmt: skip


def test_piped_and_again(cli: Any, model_folder: Path, tmp_path: Path) -> None:
    result = cli("memorize", "--model", model_folder, "--out", "here", *FEW)
    assert result.code == 0, result.err
    assert "\x1b" not in result.out
    for line in (
        r"4 pairs of 2 digits, 1 blocks? of .*, 2 steps: 6 cells",
        r"LoRA, rank 2: 928 parameters",
        r"1/6 full fine-tuning, search, lr 0\.001: ▁[▁-█]{2} \d+\.\d % right \(\d+ s\), \d+:\d\d left",
        r"6/6 LoRA, rank 2, seed 1, lr 0\.0",
        r"method +rank +trained +rate +area, % +end, % +learnt by +over LoRA",
        r"LoRA +2 +928 +0\.\d+\* ",
        r"\* the smallest or the largest rate tried was best",
        r"results: here/memorize\.json, here/memorize\.csv",
        r"picture: here/memorize\.html",
    ):
        assert re.search(line, result.out), f"{line}\n{result.out}"
    assert max(map(len, result.out.splitlines())) <= 130
    folder = tmp_path / "here"
    names = {file.name for file in folder.iterdir()}
    assert names == {"cells", "study.json", "memorize.csv", "memorize.html", "memorize.json", "memorize.png",
                     "memorize.svg"}  # fmt: skip
    before = read_json(folder / "memorize.json")
    again = cli("memorize", "--model", model_folder, "--out", "here", *FEW)
    assert again.out.count("(done before)") == 6
    assert read_json(folder / "memorize.json") == before


def test_live_on_a_terminal(cli: Any, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "100", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    result = cli("memorize", "--model", model_folder, *FEW)
    assert result.code == 0, result.err
    assert "\x1b[?25l" in result.out  # it was live: the cursor was hidden
    last = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", result.out).split("cells 6/6")[1]
    assert re.search(r"full fine-tuning +7,680 +seed 1, lr 0\.0\d* +▁[▁-█]{2} +\d+\.\d %", last)


def test_defaults_are_the_librarys() -> None:
    from trimtab.cli.verbs.memorize import command
    from trimtab.studies.memorize_study import MemoryStudy

    said = {name: one.default for name, one in inspect.signature(command, eval_str=True).parameters.items()}
    study = MemoryStudy()
    for name in ("model", "blocks", "pairs", "digits", "steps", "batch_size", "warmup", "evaluate_every", "seeds"):
        assert said[name] == getattr(study, name), name
    assert said["budgets"] == ",".join(map(str, study.budgets))
    assert said["learning_rates"] is said["methods"] is study.learning_rates is None


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--budgets", "four"), 2, "expected whole numbers separated by commas, got 'four'"),
        (("--learning-rates", "1e-3;1e-2"), 2, "expected numbers separated by commas"),
        (("--methods", "lora,mora"), 1, "methods: unknown 'mora'.*Did you mean 'lora'|mora-rotation"),
        (("--pairs", "200", "--digits", "2"), 1, "pairs: 200 keys of 2 hexadecimal digits would be more than half"),
        (("--batch-size", "5", "--pairs", "4"), 1, r"batch_size: 5 is more than there are pairs \(4\)"),
        (("--precision", "int8"), 1, "precision: expected 'bfloat16' or 'float32', got"),
        (("--blocks", "9"), 1, "blocks: expected at most what the model has, got 9; it has 2 blocks"),
        (("--budgets", "99"), 1, "rank 99 is larger than the matrix"),
    ],
)
def test_mistakes(cli: Any, model_folder: Path, words: tuple[str, ...], code: int, message: str) -> None:
    result = cli("memorize", "--model", model_folder, *FEW, *words)
    assert result.code == code, result.out
    assert result.matches(message), result.err
    assert "Traceback" not in result.err
