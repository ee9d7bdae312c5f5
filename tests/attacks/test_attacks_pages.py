"""Hostile rows, names and plans on every page that is written: in a browser nothing runs and nothing is fetched."""

from __future__ import annotations

import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from known_runs import run as known_run
from sampling import sample
from trimtab.reports.run.run_page import write_run_page
from trimtab.reports.search.search_page import write_explore_page
from trimtab.reports.shared.shell import write_page
from trimtab.reports.study.study_page import write_study_page
from trimtab.reports.study.weight_changes import write_changes_page

pytestmark = pytest.mark.timeout(180)
run = known_run
STUDIES = Path(__file__).parents[2] / "studies"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
BROWSER = next((name for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)), None)


def payload(server: str) -> str:
    """What runs a script or fetches something wherever it is not taken as text; and what is markup to our own tools."""
    return (
        f"\"'></pre></title></style></svg><script>new Image().src='{server}/script'</script>"
        f"<img src={server}/image onerror=\"new Image().src='{server}/error'\"><iframe src={server}/frame></iframe>"
        f"<svg onload=\"new Image().src='{server}/load'\"></svg><style>@import '{server}/sheet';</style>"
        f"<link rel=stylesheet href={server}/link><base href={server}/><object data={server}/object></object>"
        f"<meta http-equiv=refresh content='0;url={server}/refresh'>{{{{ 7 * 7 }}}} $\\frac{{1}}$ \x1b[2J \u202e"
    )


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A server of this machine, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *said: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}", asked
        serving.shutdown()


def opened(pages: list[Path], folder: Path) -> None:
    """Open all of ``pages`` in a browser, in frames of one page, and wait until they are there."""
    assert BROWSER is not None
    frames = "".join(f'<iframe src="{page.as_uri()}" width=900 height=900></iframe>' for page in pages)
    (folder / "all.html").write_text(f"<!doctype html><body>{frames}", "utf-8")
    subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom"),
            *(
                f"--user-data-dir={folder / 'profile'}",
                "--allow-file-access-from-files",
                (folder / "all.html").as_uri(),
            ),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )


def spoiled(value: Any, text: str, keys: tuple[str, ...]) -> Any:
    """``value`` with every text under one of ``keys`` replaced."""
    if isinstance(value, dict):
        return {
            key: text if key in keys and isinstance(one, str) else spoiled(one, text, keys)
            for key, one in value.items()
        }
    if isinstance(value, list):
        return [spoiled(one, text, keys) for one in value]
    return value


def spoil_json(source: Path, target: Path, text: str, *keys: str) -> None:
    known = spoiled(json.loads(source.read_text("utf-8")), text, keys)
    target.write_text(json.dumps(known), "utf-8")


def report(folder: Path, text: str) -> Path:
    run = known_run.__wrapped__(folder)
    for file in (*run.glob("*.json"), *run.glob("evaluation/*.json")):
        spoil_json(file, file, text, "model", "dataset", "match", "layers", "module", "processor", "answer", "choices")
    for file in run.glob("predictions/*.jsonl"):
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        changed = [spoiled(row, text, ("prompt", "answer", "predicted")) for row in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in changed), "utf-8")
    (run / "config.yaml").write_text(f"model: {json.dumps(text)}\n", "utf-8")
    return write_run_page(run)


def compared(folder: Path, text: str) -> Path:
    source = STUDIES / "folding" / "results.json"
    spoil_json(source, folder / "results.json", text, "title", "question", "file", "processor", "name", "train")
    known = (folder / "results.json").read_text("utf-8")
    for name in ("factored low rate", "fpb"):  # an arm and a test set
        known = known.replace(json.dumps(name)[1:-1], json.dumps(text[:60])[1:-1])
    (folder / "results.json").write_text(known, "utf-8")
    return write_study_page(folder)


def explored(folder: Path, text: str) -> Path:
    source = STUDIES / "mixing" / "nuance-explore" / "explore.json"
    spoil_json(source, folder / "explore.json", text, "model", "processor", "why")
    known = (folder / "explore.json").read_text("utf-8").replace("outer attention", json.dumps(text[:60])[1:-1])
    (folder / "explore.json").write_text(known, "utf-8")
    return write_explore_page(folder)


def changed(folder: Path, text: str) -> Path:
    both = {"tuned": text[:40], "method": "$\\frac{1}$"}
    one = both | {"kind": None, "points": 2, "correlation": 0.5}
    weight = both | {"module": text, "state": text, "block": 0, "delta_magnitude": 0.1, "delta_direction": 0.2}
    analysis = {"base": text, "correlations": [one, one | {"kind": text}], "changes": [weight]}
    (folder / "changes.json").write_text(json.dumps(analysis), "utf-8")
    return write_changes_page(folder)


def memorized(folder: Path, text: str) -> Path:
    sys.path.insert(0, str(STUDIES / "memorize"))
    from memory_page import write_memory_page

    spoil_json(STUDIES / "memorize" / "results" / "memorize.json", folder / "memorize.json", text, "model", "processor")
    return write_memory_page(folder)


def patterned(folder: Path, text: str) -> Path:
    sys.path.insert(0, str(STUDIES / "pattern"))
    from pattern_page import write_pattern_page

    results = STUDIES / "pattern" / "results"
    shutil.copy(results / "pattern.csv", folder)
    spoil_json(results / "pattern.json", folder / "pattern.json", text, "name", "processor", "attention", "file")
    return write_pattern_page(folder)


PAGES: dict[str, Callable[[Path, str], Path]] = {
    **{"report": report, "compare": compared, "explore": explored, "analyze": changed},
    **{"memorize": memorized, "pattern": patterned},
}


KINDS = sample(list(PAGES), every=6, always=["report", "compare", "explore", "analyze"])


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_texts_on_a_page_are_text(kind: str, tmp_path: Path) -> None:
    text = PAGES[kind](tmp_path, payload("http://host.invalid")).read_text("utf-8")
    assert f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">' in text
    assert text.index("Content-Security-Policy") < text.index("<title>")
    for tag in ("<script", "<img", "<iframe", "<object", "<link", "<base", 'onload="', "<meta http-equiv=refresh"):
        assert tag not in text.lower(), tag
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "host.invalid" in text, "the page shows nothing of what is hostile"


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_in_a_browser_nothing_runs_and_nothing_is_fetched(server: tuple[str, list[str]], tmp_path: Path) -> None:
    address, asked = server
    pages = []
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        pages.append(PAGES[kind](tmp_path / kind, payload(address)))
    opened(pages, tmp_path)
    assert asked == []


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_the_policy_holds_what_was_not_escaped(server: tuple[str, list[str]], tmp_path: Path) -> None:
    """Were a text once let through, the policy would still keep it from doing anything; without both, it does."""
    address, asked = server
    raw = "{% block title %}x{% endblock %}{% block body %}{{ text | safe }}{% endblock %}"
    (tmp_path / "raw.html").write_text('{% extends "shared/shell.html" %}' + raw, "utf-8")
    page = write_page(tmp_path / "page.html", "raw.html", {"text": payload(address)}, folder=tmp_path)
    assert "<script>" in page.read_text("utf-8")
    kept = page.read_text("utf-8").replace(f"<meta http-equiv=refresh content='0;url={address}/refresh'>", "")
    page.write_text(kept, "utf-8")
    opened([page], tmp_path)
    assert asked == []
    page.write_text(kept.replace("Content-Security-Policy", "Nothing"), "utf-8")
    opened([page], tmp_path)
    assert {"/script", "/error"} & set(asked)
    assert {"/image", "/frame"} & set(asked)


def test_published_pages_have_the_policy() -> None:
    pages = [page for page in STUDIES.rglob("*.html") if not page.stem.endswith("_page")]
    assert len(pages) > 5
    assert [str(page) for page in pages if POLICY not in page.read_text("utf-8")] == []
