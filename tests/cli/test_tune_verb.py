"""``trimtab tune`` finds a rate and writes the YAML that names it; ``trimtab plan`` says beforehand what it takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trimtab.config.read import load_config
from trimtab.runs.rate_record import RateTrial
from trimtab.training import rate_plan, rate_trials

pytestmark = pytest.mark.usefixtures("bare_runs")

TRAIN = {"max_steps": 30, "epochs": 10, "tune": {"budget": 1.0}}


@pytest.mark.full
def test_tune_shows_its_trials_and_writes_a_yaml_that_trains_with_the_rate(
    cli: Any, make_yaml: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate_plan, "SHORTEST", 2)
    yaml = make_yaml(train=TRAIN)
    told = cli("plan", yaml, "train.learning_rate=auto")
    assert "5 of 2 steps, then 3 of 4 steps" in told.out
    result = cli("tune", yaml)
    assert result.code == 0, result.err
    assert len(re.findall(r"trial at", result.out)) == 8
    assert "best" in result.out
    tuned = load_config(yaml.with_name("run-tuned.yaml"))
    assert f"learning rate {tuned.train.rate:g}" in result.out
    assert tuned.train.model_copy(update={"learning_rate": 1e-2}) == load_config(yaml).train
    again = cli("tune", yaml)
    assert again.code == 1
    assert "--out" in again.err


def test_a_tune_that_was_stopped_goes_on_from_the_trials_that_are_done(
    cli: Any, make_yaml: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(rate_plan, "SHORTEST", 2)
    made: list[tuple[int, float]] = []

    def trial(_: Any, rate: float, turn: int, steps: int) -> RateTrial:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append((turn, rate))
        return RateTrial(round=turn, rate=rate, steps=steps, loss=1.0 + len(made) % 3, seconds=0.1)

    monkeypatch.setattr(rate_trials._Search, "trial", trial)
    yaml = make_yaml(train=TRAIN)
    stopped = cli("tune", yaml)
    assert stopped.code == 130
    assert "the trials that are done are kept. Go on with the same command" in stopped.err
    other = cli("tune", yaml, "train.seed=1")  # the trials of another run
    assert other.code == 130
    assert "kept" not in other.err
    made.append((0, 0.0))
    assert cli("tune", yaml).code == 0
    assert len(made) == 1 + 8
    assert len(set(made)) == len(made)  # none was made twice
    assert not any((tmp_path / "cache").rglob("trials/*"))


def test_tune_refuses_what_it_cannot_do_before_anything_is_loaded(cli: Any, make_yaml: Callable[..., Path]) -> None:
    yaml = make_yaml()
    assert cli("tune", yaml, "--in-place", "--out", "other.yaml").code == 2
    untrained = cli("tune", yaml, "train.epochs=0")
    assert untrained.code == 1
    assert "train.epochs" in untrained.err


def test_in_place_a_short_run_gets_the_likely_rate(cli: Any, make_yaml: Callable[..., Path]) -> None:
    yaml = make_yaml(train={"learning_rate": "auto"})
    assert "too few for trials" in cli("plan", yaml).out
    result = cli("tune", yaml, "--in-place")
    assert result.code == 0, result.err
    assert 1e-4 < load_config(yaml).train.rate < 1e-1


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trials are over at once."""
    monkeypatch.setattr("trimtab.training.tune.tune", lambda *_: SimpleNamespace(rate=0.00123))


@pytest.mark.usefixtures("found")
def test_a_link_stays_a_link_and_nobody_else_may_read_what_was_private(
    cli: Any, make_yaml: Callable[..., Path]
) -> None:
    yaml = make_yaml()
    yaml.write_text(f"# mine\n{yaml.read_text()}")
    yaml.chmod(0o600)
    link = yaml.with_name("link.yaml")
    link.symlink_to(yaml.name)
    assert cli("tune", link, "--in-place").code == 0
    assert link.is_symlink()
    assert yaml.read_text().startswith("# mine\n")
    assert load_config(yaml).train.rate == 0.00123
    assert yaml.stat().st_mode & 0o777 == 0o600


@pytest.mark.usefixtures("found")
def test_comments_are_not_lost_where_a_setting_has_no_place(cli: Any, make_yaml: Callable[..., Path]) -> None:
    yaml = make_yaml()
    text = f"# mine\n{yaml.read_text()}"
    yaml.write_text(text)
    for name in ("run-tuned.yaml", "run-tuned-2.yaml"):
        result = cli("tune", yaml, "--in-place", "data.validation=0.25")
        assert (result.code, yaml.read_text()) == (0, text)
        assert f"{name} says all of them" in result.err
        assert load_config(yaml.with_name(name)).data.validation == 0.25


@pytest.mark.usefixtures("found")
def test_a_rate_that_cannot_be_written_is_said(cli: Any, make_yaml: Callable[..., Path]) -> None:
    yaml = make_yaml()
    result = cli("tune", yaml, "--out", yaml / "below" / "a.yaml")
    assert result.code == 1
    assert "a file is in the way of a folder" in result.err
    assert "The rate that was found is 0.00123" in result.err


def test_a_file_that_another_process_writes_meanwhile_stays(
    cli: Any, make_yaml: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    yaml = make_yaml()
    tuned = yaml.with_name("run-tuned.yaml")

    def meanwhile(*_: Any) -> Any:
        tuned.write_text("theirs")
        return SimpleNamespace(rate=0.00123)

    monkeypatch.setattr("trimtab.training.tune.tune", meanwhile)
    result = cli("tune", yaml)
    assert result.code == 1
    assert "another process has made it meanwhile. The rate that was found is 0.00123" in result.err.replace("\n", " ")
    assert tuned.read_text() == "theirs"


@pytest.mark.usefixtures("found")
def test_the_folder_of_a_run_is_tuned_beside_it_for_a_run_of_its_own(
    cli: Any, make_yaml: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "v1.5"
    assert cli("finetune", make_yaml(train={"max_steps": 1}), f"output={run}").code == 0
    record = (run / "config.yaml").read_text()
    assert cli("tune", run, "--in-place").matches("what the run in its folder began with")
    assert cli("tune", run / "config.yaml", "--in-place").code == 1
    assert cli("tune", run).code == 0
    assert (run / "config.yaml").read_text() == record
    tuned = load_config(tmp_path / "v1.5-tuned.yaml")
    assert (tuned.train.rate, tuned.output) == (0.00123, tmp_path / "v1.5-tuned")
    assert tuned.data == load_config(run).data
    monkeypatch.chdir(run)
    result = cli("tune", ".", "train.epochs=2", "--out", tmp_path / "again.yaml")
    assert result.code == 0, result.err
    assert load_config(tmp_path / "again.yaml").output == tmp_path / "v1.5-tuned"


@pytest.mark.usefixtures("found")
def test_a_setting_within_a_list_has_its_place_and_lost_comments_are_told(
    cli: Any, make_yaml: Callable[..., Path]
) -> None:
    yaml = make_yaml()
    yaml.write_text(f"# mine\n{yaml.read_text()}")
    result = cli("tune", yaml, "plan.0.rank=3", "plan.0.alpha=6")
    assert result.err == ""
    tuned = yaml.with_name("run-tuned.yaml")
    assert tuned.read_text().startswith("# mine\n")
    assert load_config(tuned).plan[0] == {**load_config(yaml).plan[0], "rank": 3, "alpha": 6}
    result = cli("tune", yaml, "data.validation=0.25", "--out", "other.yaml")
    assert "without its comments" in result.err
