"""Ctrl-C, SIGTERM and SIGHUP: one line that says what is kept, the exit code of the signal, and no traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from command_line import Result, signals_are_heard
from tiny_runs import rows, write_rows
from trimtab.cli.exits import exit_code, program
from trimtab.errors import STOPS, Interrupted, Terminated
from trimtab.signals import listening

__all__ = ["signals_are_heard"]

SIGNALS = [pytest.param(signal.SIGINT, 130, id="Ctrl-C"), pytest.param(signal.SIGTERM, 143, id="SIGTERM")]


def raising(number: int) -> Callable[..., Any]:
    def work(*_: Any, **__: Any) -> Any:
        signal.raise_signal(number)
        pytest.fail("the signal was not heard")

    return work


# What each verb is stopped in, and what it is given.
STOPPED = {
    "plan": ("trimtab.config.read.load_config", ("run.yaml",), "nothing was written; the same command begins again"),
    "finetune": (
        "trimtab.config.read.load_config",
        ("run.yaml",),
        "nothing was changed; the same command begins again",
    ),
    "merge": ("trimtab.export.export_format", ("run", "out"), "nothing was written"),
    "evaluate": ("trimtab.assessing.measure", ("run",), "the sets that are measured are kept"),
    "compare": ("trimtab.studies.study_cells.load_study", ("study.yaml",), "every run that is done is kept"),
    "explore": ("trimtab.config.search.load_explore", ("search.yaml",), "every run that is done is kept"),
    "analyze": ("trimtab.models.locate.locate", ("model", "run"), "nothing was written"),
    "doctor": ("trimtab.diagnosis.diagnose", (), "nothing was written"),
}


@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize("verb", STOPPED)
def test_a_verb_that_is_stopped_says_what_is_kept(
    verb: str, number: int, code: int, cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    where, words, kept = STOPPED[verb]
    monkeypatch.setattr(where, raising(number))
    result = cli(verb, *words)
    assert result.code == code, result
    assert result.err.startswith(f"\ninterrupted; {kept}"), result
    assert result.err.count("\n") == 2


@pytest.mark.usefixtures("bare_runs")
def test_a_run_that_is_told_to_end(
    cli: Callable[..., Result], make_yaml: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any stage it says how to go on, and does."""
    from trimtab.cli.displays.run import RunDisplay

    test = write_rows(Path("test.jsonl").absolute(), rows(4))
    file = make_yaml(data={"test": str(test)}, train={"max_steps": 3})
    stages: list[str] = []
    stop = ["Reading the rows", "Loading", "Evaluating test before", "Training", "Evaluating test after"]

    def stage(display: RunDisplay, text: str) -> None:
        stages.append(text)
        if stop and text.startswith(stop[0]):
            stop.pop(0)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(RunDisplay, "stage", stage)
    said = [cli("finetune", file, *(["--resume"] if file.with_suffix("").exists() else [])) for _ in range(6)]
    assert [result.code for result in said] == [143] * 5 + [0]
    assert [result.err.endswith("\ninterrupted; nothing was begun\n") for result in said[:2]] == [True, True]
    command = r"\ninterrupted; everything so far is in .*\nGo on with: trimtab finetune .*config\.yaml --resume\n"
    assert all(result.matches(command) for result in said[2:5])
    assert stages.count("Training") == 2


def test_a_question_that_is_left_unanswered(cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any, **__: Any) -> Any:
        raise typer.Abort

    def ended(*_: Any, **__: Any) -> Any:
        try:
            raise EOFError
        except EOFError:
            raise typer.Abort from None

    monkeypatch.setattr("trimtab.cli.verbs.init._model", asked)
    result = cli("init", "new.yaml")
    assert (result.code, result.err) == (130, "\ninterrupted; nothing was written; the same command begins again\n")
    monkeypatch.setattr("trimtab.cli.verbs.init._model", ended)
    result = cli("init", "new.yaml")
    assert result.code == 1
    assert "the input ended before the question was answered" in result.err
    assert not Path("new.yaml").exists()


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_before_there_is_a_verb_nothing_was_begun(number: int, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with listening():
        assert exit_code(raising(number)) == code
    assert capsys.readouterr().err == "\ninterrupted; nothing was begun\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # as before


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_study_of_its_own_says_how_to_go_on(number: int, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert program(["study.yaml"], "help", raising(number)) == code
    assert capsys.readouterr().err == "\ninterrupted; what is done is kept. Go on with the same command.\n"


def test_what_a_script_runs_in_the_background_can_be_interrupted() -> None:
    """A shell without job control lets it ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with listening(), pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is none on Windows")
def test_a_terminal_that_is_closed_ends_a_run_in_good_order(capsys: pytest.CaptureFixture[str]) -> None:
    def putting_down() -> int:
        try:
            signal.raise_signal(signal.SIGHUP)
        except STOPS as stop:
            signal.raise_signal(signal.SIGHUP)  # the shell sends one, and the system another
            raise Interrupted.by(stop, "interrupted; all is kept") from None
        return 0

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    asked: list[Any] = []
    try:
        with listening():
            assert exit_code(putting_down) == 129
        assert capsys.readouterr().err == "\ninterrupted; all is kept\n"
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
        with listening(asked.append):
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGHUP)
        assert [stop.code for stop in asked] == [129]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with listening():
            signal.raise_signal(signal.SIGHUP)  # under nohup nothing ends
    finally:
        signal.signal(signal.SIGHUP, before)


AT_THE_END = """
import atexit, signal, sys
atexit.register(signal.raise_signal, signal.SIGINT)  # what was registered first is done last
sys.argv = ["trimtab", "--version"]
from trimtab.cli import main
main()
"""


def test_a_second_one_while_python_ends_leaves_no_traceback() -> None:
    done = subprocess.run([sys.executable, "-c", AT_THE_END], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


TWICE = """
import signal, sys
from trimtab.signals import listening, forget
from trimtab.errors import STOPS
with listening():
    for _ in range(3):  # each is dealt with, as in a conversation
        try:
            signal.raise_signal(signal.SIGINT)
        except STOPS:
            forget()
    try:
        signal.raise_signal(signal.SIGTERM)
    except STOPS:
        print("putting things down", flush=True)
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            print("not at once")
"""


def test_the_second_one_ends_the_process_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "putting things down\n", "")


def test_an_interruption_knows_what_it_came_from() -> None:
    assert Interrupted("x").code == Interrupted.by(KeyboardInterrupt(), "x").code == 130
    assert Interrupted.by(Terminated(), "x").code == Interrupted.by(Interrupted("", 143), "x").code == 143
    with pytest.raises(SystemExit):
        raise Terminated
