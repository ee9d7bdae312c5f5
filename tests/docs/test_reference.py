"""The reference is whole: every key of the YAMLs, every task, every public name, every page of the how-to."""

from __future__ import annotations

import inspect
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

import trimtab
from trimtab import listing
from trimtab.config.run import RunConfig
from trimtab.evaluation.benchmark_tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    made = runpy.run_path(str(DOCS / "hooks" / "reference.py"))["PAGES"]
    return {place: make() for place, make in made.items()}


def keys(section: type[BaseModel], before: str = "") -> Iterator[str]:
    """Every key of a YAML, as it is given on the command line."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if inspect.isclass(kind) and issubclass(kind, BaseModel):
            yield from keys(kind, f"{before}{name}.")
        else:
            yield before + name


def test_every_key_of_a_run_has_a_line(pages: dict[str, str]) -> None:
    told = re.findall(r"<a id='([\w.]+)'>", pages["reference/run-yaml.md"])
    assert "train.tune.budget" in told
    assert set(keys(RunConfig)) <= set(told)
    required = re.findall(r"<a id='([\w.]+)'>.*\| required \|", pages["reference/run-yaml.md"])
    assert required == ["model.name", "data.train", "path"]


def test_a_search_sends_to_the_runs_keys_and_lists_no_others(pages: dict[str, str]) -> None:
    text = pages["reference/search-yaml.md"]
    assert "[the run's YAML](run-yaml.md)" in text
    assert "id='base." not in text
    assert "`NAME.match`" in text


def test_every_task_is_named_with_its_rows(pages: dict[str, str]) -> None:
    line = next(line for line in pages["reference/run-yaml.md"].splitlines() if "<a id='task'>" in line)
    for task in listing.names_of("tasks"):
        assert task in line
        assert task == "causal_lm" or f"### `{task}`" in pages["reference/rows.md"]


def test_every_public_name_is_on_the_librarys_page(pages: dict[str, str]) -> None:
    told = set(re.findall(r"^::: .*\.(\w+)$", pages["reference/library.md"], re.MULTILINE))
    assert told == {*trimtab.__all__} - {"__version__"}


def test_what_a_verb_takes_is_written_as_its_help_writes_it(pages: dict[str, str]) -> None:
    for shown in re.findall(r"^\| `(.+?)` \|", pages["reference/command-line.md"], re.MULTILINE):
        assert shown.count("[") == shown.count("]"), shown


def test_every_variable_that_is_read_is_told() -> None:
    told = (DOCS / "reference" / "files.md").read_text("utf-8")
    sources = "".join(file.read_text("utf-8") for file in (ROOT / "src").rglob("*.py"))
    for variable in sorted(set(re.findall(r"\bTRIMTAB_[A-Z_]+", sources))):
        assert f"`{variable}`" in told, variable


def test_every_how_to_page_is_on_their_list() -> None:
    listed = re.findall(r"\]\(([\w-]+\.md)\)", (DOCS / "how-to" / "index.md").read_text("utf-8"))
    assert sorted(listed) == sorted(page.name for page in (DOCS / "how-to").glob("*.md") if page.name != "index.md")


def test_every_task_of_finlora_is_told() -> None:
    text = (DOCS / "how-to" / "finlora.md").read_text("utf-8")
    for task in TASKS:
        assert f"`{task.rpartition('/')[2]}`" in text or f"`{task}`" in text, task
