"""``trimtab serve`` from outside: what it prints, what it refuses before a model is loaded, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from command_line import Result, cli, signals_are_heard
from served import FakeEngine

__all__ = ["cli", "signals_are_heard"]


class Opened(FakeEngine):
    """Stands in for the engine; notes what it was opened with."""

    made: dict[str, Any]

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(0)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Opened:
    made = Opened(seconds=0.05, notes=("requests are answered one after the other",))

    def open_(target: str, adapters: Any, **more: Any) -> Opened:
        made.made = {"target": target, "adapters": adapters, **more}
        return made

    module = SimpleNamespace(Engine=SimpleNamespace(open=open_))
    monkeypatch.setitem(sys.modules, "trimtab.serving.engine", module)  # type: ignore[arg-type]
    return made


@pytest.fixture
def port() -> int:
    """A port that is free now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def ask(port: int, method: str, path: str, body: bytes | None = None) -> int:
    """The status of the answer, once it has come."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        got = connection.getresponse()
        got.read()
        return got.status


def while_it_serves(port: int, number: int, work: Callable[[], None] = lambda: None) -> threading.Thread:
    """A thread that waits for the server at ``port``, does ``work`` and sends the signal."""

    def wait() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                ask(port, "GET", "/health")
                break
            except OSError:
                time.sleep(0.02)
        work()
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def hangups_are_heard() -> Iterator[None]:
    """Whatever began the tests may have them ignored, as nohup does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangups_are_heard")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_it_says_where_it_is_and_ends_in_good_order(
    number: int, code: int, cli: Callable[..., Result], engine: Opened, port: int
) -> None:
    """A request that runs when the signal comes is answered to its end."""
    answers: list[int] = []

    def begin() -> None:
        def one() -> None:
            answers.append(ask(port, "POST", "/v1/completions", b'{"model": "legal", "prompt": "x"}'))

        asking.append(threading.Thread(target=one))
        asking[0].start()
        while not engine.running:
            time.sleep(0.01)

    asking: list[threading.Thread] = []
    thread = while_it_serves(port, number, begin)
    result = cli(
        "serve", "m", "--adapter", "legal=a", "--adapter", "b/fr", "--port", port, "--batch-size", 3, "--name", "x"
    )
    thread.join()
    asking[0].join()
    assert result.code == code, result
    assert answers == [200]
    assert engine.closed
    assert f"Serving at http://127.0.0.1:{port} (Ctrl-C ends it)" in result.out
    assert re.search(r"models +base, legal, fr\n", result.out)
    assert f"curl http://127.0.0.1:{port}/v1/chat/completions -H 'Content-Type: application/json' -d '{{" in result.out
    assert re.search(r"POST /v1/completions 200 legal 1\+8 tokens", result.out)
    assert "Closing: 1 request has 10 seconds to finish" in result.err
    assert result.err.endswith("\ninterrupted; the server is closed\n")
    assert "Warning" not in result.err
    assert "Note: requests are answered one after the other\n" in result.err
    assert engine.made["adapters"] == {"legal": Path("a"), "fr": Path("b/fr")}
    assert (engine.made["target"], engine.made["name"], engine.made["limits"].rows) == ("m", "x", 3)


def test_a_server_for_everybody_says_so(cli: Callable[..., Result], engine: Opened, port: int) -> None:
    thread = while_it_serves(port, signal.SIGTERM)
    result = cli("serve", "m", "--host", "0.0.0.0", "--port", port, "--quiet")
    thread.join()
    assert f"Warning: everybody who reaches 0.0.0.0:{port} can use this server" in result.err
    assert "GET /health" not in result.out


def test_a_server_whose_engine_cannot_go_on_ends(cli: Callable[..., Result], engine: Opened, port: int) -> None:
    """Whoever watches over it starts it again."""
    engine.broken = True
    result = cli("serve", "m", "--port", port)
    assert result.code == 1, result
    assert "one after the other; the server has ended\n" in result.err


def test_a_key_is_taken_from_the_environment_and_not_shown(
    cli: Callable[..., Result], engine: Opened, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_API_KEY", "s3cret")
    engine.use(SimpleNamespace(chat_template=None))
    thread = while_it_serves(port, signal.SIGTERM)
    result = cli("serve", "m", "--host", "0.0.0.0", "--port", port)
    thread.join()
    assert "Warning" not in result.err
    assert "s3cret" not in result.out + result.err
    assert 'v1/completions -H "Authorization: Bearer $TRIMTAB_API_KEY"' in result.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--adapter", "legal="), "--adapter legal=: expected NAME=FOLDER"),
        (("--adapter", "le\ngal=runs"), "--adapter 'le\\ngal=runs': a name is text on one line"),
        (("--adapter", "a=x", "--adapter", "a=y"), "there is an adapter a already, x"),
        (("--adapters-from", "."), "whoever adds adapters has to show a key"),
        (("--adapters-from", "nowhere", "--api-key", "k"), "--adapters-from nowhere: no such folder"),
        (("--api-key", "a b"), "--api-key: expected letters"),
        (("--api-key", "schlüssel"), "--api-key: expected letters"),
        (("--allow-origin", "*"), "every page could ask this server"),
        (("--allow-origin", "example.org"), "expected a scheme and a host"),
        (("--host", "no.such.host.invalid"), "there is no such address"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(
    words: tuple[str, ...], said: str, cli: Callable[..., Result], engine: Opened
) -> None:
    result = cli("serve", "m", *words)
    assert (result.code, said in result.err) == (1, True), result
    assert not hasattr(engine, "made")
    assert result.err.count("\n") == 1


def test_a_port_in_use(cli: Callable[..., Result], engine: Opened) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        result = cli("serve", "m", "--port", taken.getsockname()[1])
    assert (result.code, "another program has this port" in result.err) == (1, True), result


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "prometheus_client"])
def test_without_its_packages(
    package: str, cli: Callable[..., Result], engine: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith(("trimtab.serving.", f"{package}."))]:
        if name not in ("trimtab.serving.engine", "trimtab.serving.requests"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]
    result = cli("serve", "m")
    assert result.code == 1, result
    assert f"serving needs {package}, which is not installed: pip install 'trimtab[serve]'" in result.err
