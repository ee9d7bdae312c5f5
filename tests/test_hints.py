"""Commands that are shown to be pasted: a shell reads each as the words that were meant."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from trimtab import listing
from trimtab.cli import verbs
from trimtab.hints import pasted

SOURCE = Path(__file__).resolve().parents[1] / "src" / "trimtab"
_VERB = rf"trimtab ({'|'.join(listing.names(verbs.__path__))})\b"


@pytest.mark.parametrize(
    "word",
    [
        "runs/run",
        "my runs/first",
        "it's here",
        'a "b" $HOME `ls` \\n',
        "*.yaml",
        "two\nlines\tand a tab's",
        "-5 degrees",
    ],
)
def test_a_shell_reads_the_words_that_were_meant(word: str) -> None:
    line = pasted("generate", word.lstrip("-"), text=word)
    assert "\n" not in line
    script = f"trimtab() {{ printf '%s\\0' \"$@\"; }}; {line}"
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    assert [each for each in said if each != "--"] == ["generate", word.lstrip("-"), word]
    assert ("--" in said) == word.startswith("-")


def test_no_command_with_a_path_in_it_is_written_elsewhere() -> None:
    """An f-string that puts a value after the name of a verb would break where the value has a space."""
    wrong = []
    for file in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else []
            said = "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in parts)
            if re.search(_VERB + r"[^.;,\n]* \{\}", said):
                wrong.append(f"{file.relative_to(SOURCE)}:{node.lineno}: {said}")
    for file in sorted(SOURCE.rglob("*.html")):
        if re.search(_VERB + r" \{\{", file.read_text(encoding="utf-8")):
            wrong.append(str(file.relative_to(SOURCE)))
    assert not wrong
