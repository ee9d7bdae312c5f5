"""Names, rows and answers that try to drive the terminal, or to turn the text around them, are shown as escapes: in
everything that is printed, in every error and on every page."""

from __future__ import annotations

import ast
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

import trimtab
from command_line import Result
from tiny_runs import write_rows
from trimtab.cli.displays.console import Terminal
from trimtab.cli.displays.run import RunDisplay
from trimtab.cli.exits import exit_code, say
from trimtab.errors import TrimtabError, printable

CLI = Path(trimtab.__file__).parent / "cli"
CLEAR, TITLE, LINK = "\x1b[2J\x1b[H", "\x1b]0;owned\x07", "\x1b]8;;http://host.invalid\x1b\\here\x1b]8;;\x1b\\"
HOSTILE = [
    CLEAR,
    TITLE,
    LINK,
    "\x9b2J",
    "a\rb",
    "a\x08b",
    "\x0c",
    "\u202egpj.exe",
    "\u2066a\u2069",
    "\u2028",
    "\x00",
    "\ud800",
]


def acts(text: str) -> list[str]:
    """The characters in ``text`` that a terminal, or the text around them, would obey."""
    odd = {*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
    return [char for char in text if (ord(char) in odd and char not in "\n\t") or 0xD800 <= ord(char) < 0xE000]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_what_acts_is_shown_as_its_escape(text: str) -> None:
    shown = printable(f"before {text} after")
    assert not acts(shown)
    assert shown.startswith("before ")
    assert shown.endswith(" after")
    assert "\\" in shown
    shown.encode("utf-8")


@pytest.mark.parametrize("text", ["späť", "שלום", "مرحبا", "日本語\n\t🏴󠁧󠁢󠁥󠁮󠁧󠁿👩‍👩‍👧", "a\\x1b", "[bold]a[/bold] :bomb:"])
def test_what_people_write_stays(text: str) -> None:
    assert printable(text) == text
    Terminal(file=(out := io.StringIO()), width=200).print(text)
    assert out.getvalue() == text.expandtabs(8) + "\n"


def test_lines_of_windows_end_as_lines() -> None:
    assert printable("a\r\nb\r") == "a\nb\\r"


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_errors_are_printable_when_they_are_made(text: str) -> None:
    for error in (TrimtabError(text), trimtab.AdapterError(f"{text}: no such folder", 7)):
        assert not acts(str(error))
        assert not acts(error.args[0])


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_terminal_draws_nothing_that_acts(text: str) -> None:
    """With colours off, no control character is left at all: none of rich's own, and none of the text's."""
    console = Terminal(file=(out := io.StringIO()), width=80, color_system=None)
    table = Table(text, title=text, caption=text)
    table.add_row(text)
    table.add_row(Text(text, style="bold"))
    for shown in (text, Text(text), table, f"[link=http://host.invalid]{text}[/link]"):
        console.print(shown)
    display = RunDisplay(console)
    display.stage(text)
    display.note(text)
    display.evaluating(text, 1, 2)
    assert not acts(out.getvalue())
    assert "[link=" in out.getvalue()
    assert ascii(text)[1:5] in out.getvalue()


def test_a_bar_draws_no_names_that_act() -> None:
    console = Terminal(file=(out := io.StringIO()), width=200, force_terminal=True, color_system=None)
    with Progress(TextColumn("{task.description}"), console=console) as progress:
        progress.add_task(f"{CLEAR}[bold]set")
    assert CLEAR not in out.getvalue()
    assert r"\x1b[2J" in out.getvalue()


def test_lines_and_errors_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise OSError(2, f"No such{CLEAR} file", f"a{TITLE}b")

    for text in HOSTILE:
        say(text)
        say(text, error=True)
    assert exit_code(fails) == 1
    said = capsys.readouterr()
    assert not acts(said.out + said.err)
    assert r"a\x1b]0;owned\x07b: No such\x1b[2J\x1b[H file" in said.err


def test_an_answer_is_printed_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    from trimtab.cli.verbs.generate import _say

    _say(f"north {CLEAR}gate\n")
    assert capsys.readouterr().out == "north \\x1b[2J\\x1b[Hgate\n"


@pytest.mark.parametrize("file", list(CLI.rglob("*.py")), ids=lambda file: f"{file.parent.name}/{file.name}")
def test_nothing_is_printed_in_another_way(file: Path) -> None:
    """Neither by print, nor by typer, nor on a console that takes markup and lets escapes through."""
    calls = [node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call)]
    # What is written there and then quotes nobody.
    names = {ast.unparse(one.func) for one in calls if not all(isinstance(said, ast.Constant) for said in one.args[:1])}
    ways = {"print", "typer.echo", "typer.secho", "click.echo", "Console", "sys.stdout.write", "sys.stderr.write"}
    allowed = {"print"} if file == CLI / "exits.py" else set()
    assert names & ways <= allowed


EVIL = f"fog{CLEAR}{TITLE}\u202e[bold red]"
WRONG: dict[str, tuple[str, list[dict[str, object]]]] = {
    "an unknown key": ("", [{f"prompt{EVIL}": "a", "completion": "b"}]),
    "no answer": ("", [{"messages": [{"role": EVIL, "content": EVIL}]}]),
    "a value of another kind": ("", [{"prompt": [EVIL], "completion": {EVIL: 1}}]),
    "an unknown key of the YAML": (json.dumps({EVIL: 1})[1:-1], [{"prompt": "a", "completion": "b"}]),
    "a rule that matches nothing": (f"plan: [{{match: {json.dumps(EVIL)}, method: lora}}]", []),
    "a method that there is not": (f"plan: [{{match: '*', method: {json.dumps(EVIL)}}}]", []),
    "layers that there are not": (f"plan: [{{match: '*', method: lora, rank: 1, layers: {json.dumps(EVIL)}}}]", []),
    "rows that are not there": (f"evaluation: {{max_new_tokens: {json.dumps(EVIL)}}}", []),
    "a template that fails": (
        "model: {name: MODEL, chat_template: \"{{ raise_exception('\\x1b[2J') }}\"}",
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_told_without_what_acts(
    kind: str, cli: Callable[..., Result], make_yaml: Callable[..., Path], model_folder: Path, tmp_path: Path
) -> None:
    said, rows = WRONG[kind]
    file = make_yaml(count=6)
    known = yaml.safe_load(file.read_text("utf-8"))
    if rows:
        write_rows(tmp_path / "completion.jsonl", rows)
    known |= yaml.safe_load(said.replace("MODEL", str(model_folder)) or "{}")
    file.write_text(yaml.safe_dump(known), "utf-8")
    result = cli("finetune", file)
    assert result.code == 1
    assert not acts(result.out + result.err)
    assert result.err.startswith("trimtab: ")


def test_a_whole_run_prints_and_writes_nothing_that_acts(
    cli: Callable[..., Result], make_yaml: Callable[..., Path], model_folder: Path, tmp_path: Path
) -> None:
    """Prompts, answers, the model's folder and the test set's file are hostile, and go through every verb."""
    model = shutil.copytree(model_folder, tmp_path / f"model{CLEAR}[red]")
    rows = [{"prompt": f"{EVIL} {number} ", "completion": f"{EVIL}"} for number in range(6)]
    file = make_yaml(model={"name": str(model)}, train={"max_steps": 1}, data={"test": f"te{CLEAR}st.jsonl"})
    write_rows(tmp_path / "completion.jsonl", rows)
    write_rows(tmp_path / f"te{CLEAR}st.jsonl", rows)
    run, merged = file.with_suffix(""), tmp_path / f"merged{TITLE}"
    for words in (
        ("plan", file, "--modules"),
        ("finetune", file, "evaluation.max_new_tokens=4"),
        ("evaluate", run, "--data", tmp_path / "completion.jsonl"),
        ("generate", run, EVIL, "--max-new-tokens", "2"),
        ("merge", run, merged),
        ("analyze", model, run, "--out", tmp_path / f"out{CLEAR}"),
        (
            "init",
            tmp_path / f"new{CLEAR}.yaml",
            "--model",
            model,
            "--train",
            tmp_path / "completion.jsonl",
            "--method",
            "dora",
        ),
    ):
        result = cli(*words)
        assert result.code == 0, (words[0], result.err)
        assert not acts(result.out + result.err), words[0]
    for page in tmp_path.rglob("*.html"):
        assert not acts(page.read_text("utf-8"))


def test_arms_of_a_study_are_named_as_text(cli: Callable[..., Result], tmp_path: Path) -> None:
    arm = {"plan": [{"match": "all-linear", "method": "lora", "rank": 1}]}
    base = {"model": "./model", "data": {"train": "a.jsonl", "test": "b.jsonl"}}
    study = {"base": base, "arms": {EVIL: arm, "other": arm}, "reference": "other", "seeds": [0]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study), "utf-8")
    for words in (("--only", "nothing"), ("--plan",)):
        result = cli("compare", "study.yaml", *words)
        assert not acts(result.out + result.err)
        assert "2J" in result.out + result.err
