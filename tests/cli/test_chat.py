"""``trimtab chat``: over a pipe, with lines from a script, and once at a real terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import tiny_model, tiny_tokenizer
from trimtab.asking import Asked, Conversation, Drawing
from trimtab.cli.displays.talk import Talk
from trimtab.errors import printable


class Person:
    """Types lines; an entry that is an exception is what the terminal raises in its place."""

    def __init__(self, *lines: Any) -> None:
        self._lines = iter(lines)
        self.prompted: list[str] = []

    def __call__(self, prompt: str) -> str:
        self.prompted.append(prompt)
        line = next(self._lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return str(line)


@pytest.fixture(scope="module")
def asked() -> Asked:
    return Asked(tiny_model(400), tiny_tokenizer())


@pytest.fixture
def talk(asked: Asked, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Conversation, Person, str, str]]:
    """Talk, and see the conversation, the person, and what was said on stdout and on stderr."""

    def run(*lines: Any, interactive: bool = True, tokens: int = 5) -> tuple[Conversation, Person, str, str]:
        conversation, person = Conversation(asked, Drawing(max_new_tokens=tokens)), Person(*lines)
        Talk(conversation, person, interactive=interactive).run()
        said = capsys.readouterr()
        return conversation, person, said.out, said.err

    return run


def asked_in(conversation: Conversation) -> list[str]:
    return [message["content"] for message in conversation.messages if message["role"] == "user"]


def test_lines_of_one_message(talk: Any) -> None:
    conversation, person, _, _ = talk(
        "fog \\", "at noon", '"""two', "lines", '"""', '"""one"""', "//etc", "", "  ", "a \\ b"
    )
    assert asked_in(conversation) == ["fog \nat noon", "two\nlines", "one", "/etc", "a \\ b"]
    assert person.prompted[:4] == ["> ", ". ", "> ", ". "]
    conversation, _, _, _ = talk('"""no end', "of it")
    assert asked_in(conversation) == ["no end\nof it"]


def test_commands(talk: Any, tmp_path: Path) -> None:
    file = tmp_path / "my rows" / "rows.jsonl"
    conversation, _, _, err = talk(
        *("/undo", "/save x.jsonl", "/system be brief", "the fog", "tug", "/undo", f"/save {file}", "/sistem x"),
        *("/save", f"/save {tmp_path}", "/system", "/help", "/reset", "crane", f"/save {file}", "/exit", "not asked"),
    )
    assert asked_in(conversation) == ["crane"]
    for said in (
        *("there is no turn to take back", "there is nothing to save yet", "the system message is set", "name a file"),
        *("/sistem: there is no such command. Did you mean '/system'?", "cannot be written", "/undo: take the last"),
        *("there is no system message now", "all turns are forgotten", "as a row (2 messages)"),
    ):
        assert said in err, said
    first, second = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    assert [turn["role"] for turn in first["messages"]] == ["system", "user", "assistant"]
    assert next(turn["content"] for turn in second["messages"]) == "crane"


def test_what_was_saved_can_be_trained_on(talk: Any, tmp_path: Path) -> None:
    from trimtab.data.forms import read_examples

    file = tmp_path / "rows.jsonl"
    talk("/system be brief", "the fog שלום", "tug", f"/save {file}")
    (example,) = read_examples(str(file), tiny_tokenizer(), root=tmp_path)
    assert "be brief" in example.text
    assert "שלום" in example.text


def test_interrupts_and_errors_do_not_end_it(talk: Any, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation, _, out, err = talk(
        KeyboardInterrupt(), "fog " * 300, '"""half', KeyboardInterrupt(), "name \udce9", "the fog"
    )
    assert asked_in(conversation) == ["the fog"]
    assert "Ctrl-D or /exit ends" in err
    assert "this turn has" in err
    assert "not text in UTF-8" in err
    assert out.strip() == printable(conversation.messages[-1]["content"])


def test_a_pipe_gets_answers_and_nothing_else(talk: Any) -> None:
    conversation, person, out, err = talk("the fog", "tug", interactive=False)
    answers = [message["content"] for message in conversation.messages if message["role"] == "assistant"]
    assert out == "".join(f"{printable(answer)}\n" for answer in answers)
    assert set(person.prompted) == {""}
    assert "cut off after 5 tokens; --max-new-tokens allows more" in err


def test_what_outgrows_the_model_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    asked = Asked(tiny_model(400, max_position_embeddings=120), tiny_tokenizer())
    Talk(Conversation(asked, Drawing(max_new_tokens=5)), Person(*["fog at noon"] * 8), interactive=False).run()
    err = capsys.readouterr().err
    assert "outgrown the model's positions: the first" in err
    assert err.count("outgrown") < 5


def test_over_a_pipe(cli: Any, model_folder: Path, tmp_path: Path) -> None:
    result = cli("chat", model_folder, "--max-new-tokens", "4", "--system", "be brief", stdin="fog\n/save a.jsonl\ntug")
    assert result.code == 0, result.err
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 1
    with_adapter = cli("chat", model_folder, "--adapter", "nowhere", stdin="fog\n")
    assert (with_adapter.code, with_adapter.matches("nowhere")) == (1, True)


def test_a_model_without_a_template(cli: Any, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    tiny_model(400).save_pretrained(folder)
    tiny_tokenizer(None).save_pretrained(folder)
    result = cli("chat", folder, stdin="fog\n")
    assert result.code == 1
    assert result.matches(r"no chat template.*model\.chat_template.*trimtab generate")


@pytest.fixture
def terminal(model_folder: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[str], str], int]]:
    """A chat at a pseudo terminal; waits until a text is on it, and gives what came until then."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "trimtab", "chat", str(model_folder), "--max-new-tokens", "240"]
    settings = {"TRIMTAB_CACHE": str(tmp_path / "cache"), "TERM": "xterm", "HF_HUB_OFFLINE": "1"}
    environment = os.environ | settings
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    seen = ""

    def wait_for(text: str) -> str:
        nonlocal seen
        end = time.monotonic() + 120
        while text not in seen and time.monotonic() < end:
            try:
                seen += os.read(ours, 4096).decode(errors="replace")
            except OSError:
                break
        assert text in seen, seen
        came, seen = seen.split(text, 1)[0], seen.split(text, 1)[1]
        return came

    yield process, wait_for, ours
    process.kill()
    process.wait()
    os.close(ours)


@pytest.mark.full
def test_at_a_terminal(terminal: Any, tmp_path: Path) -> None:
    process, wait_for, keyboard = terminal
    wait_for("> ")
    os.write(keyboard, b"the fog at noon\n")
    wait_for("the fog at noon")
    process.send_signal(signal.SIGINT)
    wait_for("> ")
    os.write(keyboard, f"/save {tmp_path}/rows.jsonl\n".encode())
    wait_for("> ")
    os.write(keyboard, b"\x04")
    assert process.wait(timeout=60) == 0
    assert "the fog at noon" in (tmp_path / "cache" / "chat_history").read_text()
    assert (tmp_path / "cache" / "chat_history").stat().st_mode & 0o077 == 0
