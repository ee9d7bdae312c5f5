"""``python studies/memorize/run.py`` from outside."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from memory_study import MemoryStudy, load_memory_study
from trimtab.errors import ConfigError
from trimtab.files import read_json

STUDY = Path(__file__).resolve().parents[3] / "studies" / "memorize" / "study.yaml"
FEW = {
    "pairs": 4, "digits": 2, "batch_size": 4, "steps": 2, "evaluate_every": 1, "blocks": 1,
    "methods": ["full", "lora"], "budgets": [2], "seeds": 1, "learning_rates": [1e-3, 1e-2], "output": "here",
}  # fmt: skip


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


@pytest.fixture
def run(
    program: Callable[[str], Callable[[Sequence[str]], int]],
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Said]:
    """Run the program on a small study in the test's folder."""

    def go(*overrides: str) -> Said:
        file = tmp_path / "small.yaml"
        file.write_text(yaml.safe_dump({"model": str(model_folder), **FEW}), encoding="utf-8")
        capsys.readouterr()
        code = program("memorize")([str(file), *overrides])
        return Said(code, *capsys.readouterr())

    return go


@pytest.mark.full
def test_piped_and_again(run: Callable[..., Said], tmp_path: Path) -> None:
    result = run()
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
        r"results: .*/here/memorize\.json, .*/here/memorize\.csv",
        r"page: .*/here/memorize\.html",
    ):
        assert re.search(line, result.out), f"{line}\n{result.out}"
    assert max(len(line) for line in result.out.splitlines() if str(tmp_path) not in line) <= 130
    folder = tmp_path / "here"
    names = {file.name for file in folder.iterdir()}
    assert names == {"cells", "study.json", "memorize.csv", "memorize.html", "memorize.json", "memorize.png",
                     "memorize.svg"}  # fmt: skip
    before = read_json(folder / "memorize.json")
    again = run()
    assert again.out.count("(done before)") == 6
    assert read_json(folder / "memorize.json") == before


def test_live_on_a_terminal(run: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "100", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    result = run()
    assert result.code == 0, result.err
    assert "\x1b[?25l" in result.out  # it was live: the cursor was hidden
    last = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", result.out).split("cells 6/6")[1]
    assert re.search(r"full fine-tuning +7,680 +seed 1, lr 0\.0\d* +▁[▁-█]{2} +\d+\.\d %", last)


def test_the_shipped_study_is_what_the_program_does_by_itself() -> None:
    study, folder = load_memory_study(STUDY)
    assert study == MemoryStudy()
    assert folder == STUDY.parent / "results"
    published = read_json(folder / "memorize.json")["study"]
    assert {**study.model_dump(mode="json"), "precision": published["precision"]} == published


def test_help_and_no_study(program: Callable[[str], Callable[[Sequence[str]], int]], tmp_path: Path) -> None:
    main = program("memorize")
    assert main(["--help"]) == 0
    assert main([]) == 2
    assert main([str(tmp_path / "none.yaml")]) == 1


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("model: ./tiny\noutput: out\n", encoding="utf-8")
    study, folder = load_memory_study(tmp_path / "study.yaml")
    assert (study.model, folder) == (str(tmp_path / "tiny"), tmp_path / "out")
    assert load_memory_study(tmp_path / "study.yaml", ["output=there"])[1] == Path.cwd() / "there"
    with pytest.raises(ConfigError, match=r"command line: pears: unknown key\. Did you mean 'pairs'\?"):
        load_memory_study(tmp_path / "study.yaml", ["pears=3"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["budgets=[four]"], "command line: budgets.0: "),
        (["methods=[lora,mora]"], "methods: unknown 'mora'.*Did you mean '(lora|mora-rotation)'"),
        (["pairs=200", "digits=2"], "pairs: 200 keys of 2 hexadecimal digits would be more than half"),
        (["batch_size=5"], r"batch_size: 5 is more than there are pairs \(4\)"),
        (["precision=int8"], "precision: expected 'bfloat16' or 'float32', got"),
        (["blocks=9"], "blocks: expected at most what the model has, got 9; it has 1 blocks"),
        (["budgets=[99]"], "rank 99 is larger than the matrix"),
    ],
)
def test_mistakes_are_told_in_a_sentence(run: Callable[..., Said], words: list[str], message: str) -> None:
    result = run(*words)
    assert result.code == 1, result.out
    assert re.search(message, result.err), result.err
    assert "Traceback" not in result.err
