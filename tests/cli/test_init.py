"""``trimtab init``: a YAML that runs, made from answers or from options, from the rows and from the machine."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sampling import sample
from source_paths import paths
from trimtab import drafting
from trimtab.cli.app import app
from trimtab.cli.verbs import init
from trimtab.config.read import load_config
from trimtab.errors import ConfigError, DataError

MODEL = Path(__file__).parents[1] / "data" / "before" / "model"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model and rows whose answers are a closed set."""
    shutil.copytree(MODEL, tmp_path / "tiny model")
    write(
        tmp_path / "rows.jsonl", [{"prompt": f"{number} goes", "completion": "ab"[number % 2]} for number in range(30)]
    )
    write(tmp_path / "test.jsonl", [{"prompt": "3 goes", "completion": "b"}])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(*arguments: str, typed: str = "") -> str:
    answer = CliRunner().invoke(app, ["init", *arguments], input=typed)
    if answer.exception is not None and not isinstance(answer.exception, SystemExit):
        raise answer.exception
    assert answer.exit_code == 0, answer.output
    return answer.output


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate of memory is told and not made: quicker, where it is not what is tested."""
    told: dict[str, Any] = {"needed": 0.5, "free": 9.0, "fits": True, "suggestions": []}
    monkeypatch.setattr(drafting, "describe_run", lambda job: {"memory": told})


SAID = ("--model", "tiny model", "--train", "rows.jsonl")


@pytest.mark.parametrize("method", sample(["dora", "lora", "mora", "full"], 4))
def test_the_file_reads_back_and_says_what_was_seen(here: Path, method: str) -> None:
    output = run("sub/one.yaml", *SAID, "--test", "test.jsonl", "--method", method)
    config = load_config(here / "sub" / "one.yaml")
    assert Path(config.model.name) == here / "tiny model"
    assert [Path(name).resolve() for name in paths(config.data.train)] == [here / "rows.jsonl"]
    assert config.plan[0]["method"] == method
    assert config.data.validation is None
    assert config.train.learning_rate == "auto"
    assert config.train.epochs == 8, "4 steps a pass, and fewer than 30 are hardly a beginning"
    assert "30 rows of the form 'completion'" in output
    assert "a closed set of 2" in output
    assert "trimtab finetune sub/one.yaml" in output


@pytest.mark.usefixtures("fits")
def test_patterns_and_parts_are_counted_and_written_as_seen_from_the_file(here: Path) -> None:
    said = ("--model", "tiny model", "--train", "ro*.jsonl", "--train", "test.jsonl[:2]", "--method", "lora")
    output = run("sub/parts.yaml", *said, "--test", "rows.jsonl[-3:]")
    assert "ro*.jsonl: 30 rows (completion)" in output
    assert "test.jsonl[:2]: 1 row (completion)" in output
    assert '  train: ["../ro*.jsonl", "../test.jsonl[:2]"]' in (here / "sub" / "parts.yaml").read_text()
    config = load_config(here / "sub" / "parts.yaml")
    assert paths(config.data.train) == (str(here / "ro*.jsonl"), str(here / "test.jsonl[:2]"))
    assert paths(config.data.test) == {"rows": str(here / "rows.jsonl[-3:]")}


@pytest.mark.usefixtures("fits")
def test_questions_are_asked_with_what_lies_here_as_answers(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "_can_ask", lambda: True)
    run(typed="tiny model\n\n\nlora\n")
    config = load_config(here / "run.yaml")
    assert [Path(name).name for name in (*paths(config.data.train), *paths(config.data.test).values())] == [
        "rows.jsonl",
        "test.jsonl",
    ]
    assert config.plan[0]["method"] == "lora"


@pytest.mark.usefixtures("fits")
def test_a_compressed_table_is_offered_as_an_answer_too(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "rows.jsonl.gz").write_bytes(gzip.compress((here / "rows.jsonl").read_bytes()))
    (here / "rows.jsonl").unlink()
    monkeypatch.setattr(init, "_can_ask", lambda: True)
    run(typed="tiny model\n\n\n\n")
    assert paths(load_config(here / "run.yaml").data.train) == (str(here / "rows.jsonl.gz"),)


@pytest.mark.usefixtures("fits")
def test_open_answers_get_room_for_the_longest(here: Path) -> None:
    write(
        here / "rows.jsonl", [{"prompt": f"{number}", "completion": "a b c d e " * number} for number in range(1, 13)]
    )
    run(*SAID, "--test", "none")
    config = load_config(here / "run.yaml")
    assert config.evaluation.max_new_tokens >= 50
    assert config.data.test == {}


@pytest.mark.usefixtures("fits")
def test_many_rows_are_validated_on_and_seen_once(here: Path) -> None:
    write(here / "rows.jsonl", [{"prompt": "x", "completion": "ab"[number % 2]} for number in range(10_000)])
    run(*SAID)
    config = load_config(here / "run.yaml")
    assert config.data.validation == 0.05
    assert config.train.epochs == 1


def test_what_does_not_fit_is_made_to_fit(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change = {"change": "train.batch_size=2 train.gradient_accumulation=4 quantisation=nf4", "needed": 0.7}
    told: dict[str, Any] = {"needed": 9.0, "free": 1.0, "fits": False, "suggestions": [change]}
    monkeypatch.setattr(drafting, "describe_run", lambda job: {"memory": told})
    output = run(*SAID)
    config = load_config(here / "run.yaml")
    assert (config.train.batch_size, config.train.gradient_accumulation, config.quantisation) == (2, 4, "nf4")
    assert "needs about 9.0 GiB of memory, 1.0 are free" in output
    assert "so that it fits: 0.7 GiB" in (here / "run.yaml").read_text()
    told["suggestions"] = []
    assert "take a smaller model" in run("other.yaml", *SAID)


@pytest.mark.usefixtures("fits")
def test_settings_that_are_said_are_looked_at_the_rows_with_and_stand_in_the_file(here: Path) -> None:
    write(here / "reviews.jsonl", [{"review": f"{number} goes", "sentiment": "ab"[number % 2]} for number in range(30)])
    rows = ("--model", "tiny model", "--train", "reviews.jsonl", "--test", "reviews.jsonl[:3]")
    with pytest.raises(DataError, match=r"data\.columns=\{prompt: its name"):
        run(*rows, "--method", "lora")
    columns = "data.columns={prompt: review, completion: sentiment}"
    said = ("plan.0.rank=3", "train.tune.budget=0.3", "train.epochs=2")
    output = run(columns, *said, *rows, "--method", "lora")
    config = load_config(here / "run.yaml")
    assert (config.plan[0]["method"], config.plan[0]["rank"]) == ("lora", 3)
    assert (config.train.epochs, config.train.tune.budget) == (2, 0.3)
    assert config.data.columns == {"prompt": "review", "completion": "sentiment"}
    assert "  columns: { prompt: review, completion: sentiment } # as said" in (here / "run.yaml").read_text()
    assert "a closed set of 2" in output
    assert "3 rows to test on" in output
    run("other.yaml", columns, *rows, "--method", "lora")
    assert load_config(here / "other.yaml").data.columns == config.data.columns
    carried = here / "adapter_config.json"
    carried.write_text(json.dumps({"peft_type": "LORA", "r": 4, "target_modules": "all-linear"}))
    run("carried.yaml", "train.epochs=5", *rows[:4], "--from", str(carried))
    assert load_config(here / "carried.yaml").train.epochs == 5


@pytest.mark.usefixtures("fits")
def test_a_file_that_is_there_stays(here: Path) -> None:
    (here / "run.yaml").write_text("mine")
    with pytest.raises(ConfigError, match="already there"):
        run(*SAID)
    assert (here / "run.yaml").read_text() == "mine"
    run(*SAID, "--overwrite")
    load_config(here / "run.yaml")


@pytest.mark.usefixtures("fits")
def test_a_file_that_another_process_writes_meanwhile_stays(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = drafting.draft

    def meanwhile(*said: Any) -> Any:
        (here / "run.yaml").write_text("theirs")
        return whole(*said)

    monkeypatch.setattr(drafting, "draft", meanwhile)
    with pytest.raises(ConfigError, match="already there"):
        run(*SAID)
    assert (here / "run.yaml").read_text() == "theirs"
    assert sorted(file.name for file in here.iterdir() if file.name.startswith(".saving")) == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("--model", "tiny model"), ConfigError, "--train: needed, since there is no terminal"),
        ((*SAID, "--method", "dorra"), ConfigError, "Did you mean 'dora'"),
        (("data.train=rows.jsonl", *SAID), ConfigError, "data.train: say it with --train"),
        (("train.epoch=3", *SAID), ConfigError, "Did you mean 'epochs'"),
        (("--model", "tiny model", "--train", "rowz.jsonl"), DataError, "Did you mean rows.jsonl"),
    ],
)
def test_what_is_missing_or_wrong_is_said_and_nothing_is_written(
    here: Path, arguments: tuple[str, ...], error: type[Exception], message: str
) -> None:
    if "tiny model" in arguments and "--train" not in arguments:
        (here / "rows.jsonl").unlink()
    with pytest.raises(error, match=message):
        run(*arguments)
    assert not (here / "run.yaml").exists()
