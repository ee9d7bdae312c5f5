"""Run folders with damaged or hostile files: the error names file and line, and nothing is left out in silence."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from known_runs import run as known_run
from trimtab.config.read import build_config
from trimtab.errors import RunError
from trimtab.reports.run.run_page import write_run_page
from trimtab.runs.folder import RunFolder
from trimtab.runs.load import load_run_model
from trimtab.runs.read import read_metrics, read_run

pytestmark = pytest.mark.timeout(60)
run = known_run

Spoil = Callable[[list[str]], list[str]]
LINES: dict[str, Spoil] = {
    "cut": lambda lines: [lines[0], lines[1][:20], *lines[2:]],
    "no JSON": lambda lines: ["x", *lines],
    "a list": lambda lines: [*lines[:3], "[]", *lines[3:]],
    "null": lambda lines: ["null", *lines],
    "a step in words": lambda lines: [lines[0].replace('"step": 1', '"step": "one"'), *lines[1:]],
    "no step": lambda lines: ['{"kind": "train"}', *lines],
    "a number of five thousand digits": lambda lines: ['{"kind": "train", "step": ' + "9" * 5000 + "}", *lines],
    "deep": lambda lines: ["[" * 100_000, *lines],
    "null bytes": lambda lines: ["\0" * 100, *lines],
    "an escape": lambda lines: ["\x1b[2J", *lines],
}


PREDICTIONS = "predictions/kind.after.jsonl"
CASES = [("metrics.jsonl", kind) for kind in LINES] + [(PREDICTIONS, kind) for kind in LINES if "step" not in kind]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_bad_early_line_is_told(kind: str, name: str, run: Path) -> None:
    """It drops neither itself nor what follows in silence, and resuming does not write the file anew without them."""
    file = run / name
    file.write_text("\n".join(LINES[kind](file.read_text("utf-8").splitlines())) + "\n", "utf-8")
    before = file.read_bytes()
    with pytest.raises(RunError, match=rf"{Path(name).name} is damaged: line \d") as caught:
        write_run_page(run)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    if name == "metrics.jsonl":
        for read in (lambda: RunFolder(run).read_metrics(), lambda: RunFolder(run).cut_metrics(10)):
            with pytest.raises(RunError, match=r"metrics\.jsonl is damaged: line \d"):
                read()
    assert file.read_bytes() == before


def test_a_last_line_that_was_cut_is_left_out(run: Path) -> None:
    file = run / "metrics.jsonl"
    whole = len(read_metrics(file))
    with file.open("a", encoding="utf-8") as lines:
        lines.write('{"kind": "train", "st')
    assert len(read_metrics(file)) == whole


TEXTS = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": b"[1]",
    "not UTF-8": b'{"status": "\xff"}',
    "deep": b"[" * 100_000,
    "many digits": b'{"steps": ' + b"9" * 5000 + b"}",
    "other kinds": b'{"steps": "many", "status": 7}',
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("name", ["summary.json", "plan.json", "evaluation/kind.after.json"])
def test_spoiled_records(kind: str, name: str, run: Path) -> None:
    (run / name).write_bytes(TEXTS[kind])
    with pytest.raises(RunError, match=rf"{Path(name).name} is damaged"):
        read_run(run)
    if name == "summary.json":
        with pytest.raises(
            RunError, match=r"summary\.json: a damaged file \([^\n]+\); .* remove it and go on with the run: "
        ):
            RunFolder(run).read_summary()


def test_a_precision_that_there_is_not(run: Path) -> None:
    config = build_config(
        {"model": "owner/name", "data": {"train": "rows.jsonl"}, "output": str(run)}, run, "config.yaml"
    )
    (run / "summary.json").write_text('{"status": "finished", "precision": "float7"}', "utf-8")
    with pytest.raises(RunError, match=r"summary\.json: 'precision' should be .* such as float32, and is 'float7'"):
        load_run_model(RunFolder(run), config, adapter=False)


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "metrics.jsonl", "evaluation/kind.after.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop"])
def test_what_is_no_file(kind: str, name: str, run: Path) -> None:
    (file := run / name).unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero" if kind == "device" else file)
    with pytest.raises(RunError, match=rf"{file.name} is damaged"):
        read_run(run)


def test_names_in_records_are_only_text(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    (run / "summary.json").write_text(json.dumps(summary | {"model": "../../etc/\x1b[2J<script>"}), "utf-8")
    page = write_run_page(run).read_text("utf-8")
    assert "<script" not in page
    assert "\x1b" not in page
