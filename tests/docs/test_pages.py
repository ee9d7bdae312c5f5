"""The documentation: it builds without a warning, and what its pages say can be typed does what they say.

A page's blocks run in their order, in a folder in which ``smollm2-135m`` is a tiny model. Where a page speaks of a run
that it does not make (``runs/run``, ``runs/first``), it is there, and has its page left to make:

    ```yaml title="run.yaml"     is written to that file; so is any block with a title
    ```console                   each line that begins with ``$`` is run: trimtab in this process, make if it has such a
                                 target; a line with a pipe in a shell; pip and source are not
    ```python                    is run
    ```text                      is not
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import Result, cli
from trimtab.config.read import load_config
from trimtab.config.search import load_explore
from trimtab.studies.study_cells import load_study

__all__ = ["cli"]

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
MODEL = ROOT / "tests" / "data" / "before" / "model"
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
QUICK = ("how-to/come-from-another-tool.md",)  # tests/test_examples.py types what the README says
PAGES = sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if BLOCK.search(page.read_text("utf-8")))
PAGES.remove("index.md")


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[] if page in QUICK else [pytest.mark.full]) for page in PAGES]
)
def test_what_a_page_says_can_be_typed(page: str, cli: Callable[..., Result], tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "smollm2-135m")
    text = (DOCS / page).read_text("utf-8")
    for name in sorted(set(re.findall(r"^(?:\$ .*|adapter: )\bruns/(run|first)\b", text, re.MULTILINE))):
        if f"trimtab finetune {name}.yaml" not in text:
            _make_run(name, cli, tmp_path)
    names: dict[str, object] = {}
    for kind, title, text in BLOCK.findall((DOCS / page).read_text("utf-8")):
        if title:
            (tmp_path / title).write_text(text, "utf-8")
        elif kind == "python":
            exec(compile(text, page, "exec"), names)
        elif kind == "console":
            for line in text.splitlines():
                if line.startswith("$ "):
                    _run(line[2:], cli)
        elif kind == "yaml":
            raise AssertionError(f"{page}: a YAML without a title, which nobody has tried")


def _make_run(name: str, cli: Callable[..., Result], folder: Path) -> None:
    turns = [{"role": "user", "content": "Is berth seven free?"}, {"role": "assistant", "content": "It is."}]
    (folder / "made.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 8, "utf-8")
    settings = {
        **{"model": "smollm2-135m", "output": f"runs/{name}", "plan": [{"match": "*.q_proj", "method": "lora"}]},
        "data": {"train": "made.jsonl", "validation": None, "choices": None, "test": "made.jsonl"},
        "evaluation": {"before": False, "limit": 1, "max_new_tokens": 2},
        "train": {"epochs": 1, "batch_size": 4, "learning_rate": 1e-3},
    }
    (folder / "made.yaml").write_text(json.dumps(settings), "utf-8")
    assert cli("finetune", "made.yaml").code == 0
    (folder / "runs" / name / "report.html").unlink()


def _run(line: str, cli: Callable[..., Result]) -> None:
    if "|" in line or ">" in line:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(["bash", "-c", line], check=True, env=os.environ | {"PATH": path})
        return
    program, *words = shlex.split(line, comments=True)
    if program == "trimtab":
        result = cli(*words)
        assert result.code == 0, f"{line}\n{result.out}\n{result.err}"
    elif program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE), line


def test_a_line_to_type_is_of_a_program_that_is_tried_here() -> None:
    for page in PAGES:
        for kind, _, text in BLOCK.findall((DOCS / page).read_text("utf-8")):
            for line in text.splitlines() if kind == "console" else ():
                if line.startswith("$ ") and "|" not in line and ">" not in line:
                    assert shlex.split(line[2:])[0] in ("trimtab", "make", "pip", "source"), f"{page}: {line}"


def test_a_yaml_of_ours_says_what_can_be_said(tmp_path: Path) -> None:
    """Also where no line of the page reads it."""
    for page in (*PAGES, "index.md"):
        folder = tmp_path / page
        (folder / "smollm2-135m").mkdir(parents=True, exist_ok=True)
        for kind, title, text in BLOCK.findall((DOCS / page).read_text("utf-8")):
            if kind == "yaml" and title != "theirs.yml":
                (file := folder / title).write_text(text, "utf-8")
                load = load_explore if "budget:" in text else load_study if "arms:" in text else load_config
                load(file)


def test_the_front_page_is_tried_on_rows_of_its_kind(cli: Callable[..., Result], tmp_path: Path) -> None:
    """Its YAML stands alone, without rows: they are put beside it here."""
    shutil.copytree(MODEL, tmp_path / "smollm2-135m")
    for name in ("rows.jsonl", "test.jsonl"):
        (tmp_path / name).write_text('{"prompt": "one", "completion": " two"}\n' * 20)
    ((_, title, text), *_) = BLOCK.findall((DOCS / "index.md").read_text("utf-8"))
    (tmp_path / title).write_text(text)
    assert cli("plan", title).code == 0


def test_every_page_is_under_a_screen_where_it_promises_to_be() -> None:
    pages = [page for page in (DOCS / "how-to").glob("*.md") if page.name != "index.md"]
    assert len(pages) >= 8
    for page in pages:
        assert len(page.read_text("utf-8").splitlines()) <= 60, page.name


@pytest.mark.full
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for place in re.findall(r"([\w/-]+)\.md", (ROOT / "mkdocs.yml").read_text("utf-8").partition("nav:")[2]):
        assert (tmp_path / f"{place.replace('README', 'index')}.html").is_file(), place
    page = (tmp_path / "reference" / "run-yaml.html").read_text("utf-8")
    assert "train.learning_rate" in page
    for folder in tmp_path.rglob("*.html"):
        assert not re.search(r'<(?:script|link|img)[^>]+(?:src|href)="https?:', folder.read_text("utf-8")), folder
