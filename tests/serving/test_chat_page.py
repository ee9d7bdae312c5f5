"""The page to chat by, clicked in a headless browser, where there is one."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from served import FakeEngine, running

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.full, pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")]


class Browser:
    """A page of Chromium, driven over a pipe by its own protocol."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, os.fdopen(read, "rb", buffering=0)
        self._numbers = itertools.count(1)
        self._held = b""
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Runtime", "Log", "Page"):
            self.call(f"{domain}.enable", session=True)

    def call(self, method: str, params: dict[str, Any] | None = None, *, session: bool = False) -> Any:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params or {}}
        if session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._held:
                self._held += self._read.read(65536)
            raw, _, self._held = self._held.partition(b"\0")
            got = json.loads(raw)
            if got.get("id") == number:
                assert "error" not in got, got
                return got["result"]
            if got.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(json.dumps(got["params"]))

    def run(self, script: str) -> Any:
        """The value of ``script`` on the page."""
        got = self.call("Runtime.evaluate", {"expression": script, "returnByValue": True}, session=True)
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    def wait(self, script: str) -> None:
        """Wait until ``script`` is true."""
        end = time.monotonic() + 20
        while not self.run(script):
            assert time.monotonic() < end, (script, self.complaints)
            time.sleep(0.05)

    def look(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", size, session=True)

    def close(self) -> None:
        os.close(self._write)
        self._read.close()


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    assert BROWSER is not None
    theirs, ours = os.pipe()
    mine, yours = os.pipe()
    # Chromium reads from 3 and writes to 4.
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={folder}"]
    command = ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{yours}', "-", BROWSER, *words]
    process = subprocess.Popen(command, pass_fds=(theirs, yours), stderr=subprocess.DEVNULL)
    os.close(theirs)
    os.close(yours)
    page = Browser(ours, mine)
    try:
        yield page
    finally:
        page.close()
        process.kill()
        process.wait()


def fill(element: str, text: str) -> str:
    return f"document.getElementById({element!r}).value = {text!r}"


def click(selector: str) -> str:
    return f"document.querySelector({selector!r}).click()"


def texts(selector: str) -> str:
    return f"[...document.querySelectorAll({selector!r})].map((one) => one.textContent)"


def test_one_message_goes_to_two_adapters(tmp_path: Path) -> None:
    said = ("The tug ", "is <b>free</b>", "<script>document.title = 'taken'</script>", " & so on.")
    engine = FakeEngine(words=said, seconds=0.02)
    with running(engine, key="s3cret") as up, browser(tmp_path) as page:
        page.look(390, 844)
        page.call("Page.navigate", {"url": up.address}, session=True)
        page.wait("document.getElementById('door')?.hidden === false")
        for key, then in (("wrong", "That is not its key."), ("s3cret", "")):
            page.run(fill("key", key))
            page.run(click("#door button"))
            page.wait(f"document.getElementById('door-said').textContent === {then!r} || door.hidden")
        page.wait("document.getElementById('door').hidden")
        assert page.run("[left.value, right.value]") == ["legal", "fr"]
        assert "401" in "".join(page.complaints)
        page.complaints.clear()

        page.run(fill("message", "Is berth seven free?"))
        page.run(click("#send"))
        page.wait("document.querySelectorAll('.answer.live').length === 2")
        page.wait("document.querySelectorAll('.answer.live').length === 0")
        assert page.run(texts(".said-text")) == ["".join(said)] * 2
        assert page.run(texts(".answer h2")) == ["legal", "fr"]
        assert all("4 tokens" in text for text in page.run(texts(".answer small")))
        assert page.run("document.querySelectorAll('main b, main script').length") == 0
        assert page.run("document.title") == "trimtab chat"
        assert page.run("document.documentElement.scrollWidth") <= 390
        assert sorted(one.model for one in engine.asked) == ["fr", "legal"]

        # Each model reads its own earlier answers; one that is stopped keeps what it said.
        engine.seconds = 0.5
        page.run(fill("message", "And tomorrow?"))
        page.run(fill("system", "Be brief."))
        page.run(click("#send"))
        page.wait("document.querySelectorAll('.answer.live .said-text').length === 2")
        page.wait("[...document.querySelectorAll('.answer.live .said-text')].every((one) => one.textContent)")
        page.run(click("#stop"))
        page.wait("document.querySelectorAll('.answer.live').length === 0")
        up.wait_for_line("POST /v1/chat/completions")
        assert page.run(texts(".answer .fine")) == ["Stopped."] * 2
        prompt = engine.decoded(-1)
        assert prompt.count("so on.") == 1
        assert prompt.startswith("<|im_start|>system\nBe brief.")
        assert page.complaints == []
        page.run(click("#fresh"))
        assert page.run("document.querySelectorAll('.turn').length") == 0
        end = time.monotonic() + 5
        while engine.running and time.monotonic() < end:
            time.sleep(0.05)
        assert not engine.running
