"""The whole server: a tiny model with adapters of three methods, asked by many clients, and ended in every way."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

import trimtab
from adapter_tools import trained
from run_fixtures import two_blocks as model_folder
from served import Running, running
from tiny_runs import tiny_model, tiny_tokenizer
from trimtab.asking import Asked, Drawing
from trimtab.questions import rendered
from trimtab.serving.engine import Engine
from trimtab.serving.requests import Limits

__all__ = ["model_folder"]

METHODS = {"legal": "lora", "fr": "dora", "de": "mora"}
TURNS = [[{"role": "user", "content": text}] for text in ("fog at noon", "the crane", "a tug for berth seven", "wind")]
LONGEST = 24


@pytest.fixture(scope="module")
def adapters(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, found = tmp_path_factory.mktemp("adapters"), {}
    for seed, (name, method) in enumerate(METHODS.items()):
        model = tiny_model(len(tiny_tokenizer()))
        trained(model, trimtab.Rule(match=["*.q_proj", "*.down_proj"], method=method, rank=4), seed=seed)
        found[name] = trimtab.save_adapter(model, root / name)
    return found


@pytest.fixture(scope="module")
def engine(model_folder: Path, adapters: dict[str, Path]) -> Iterator[Engine]:
    patch = pytest.MonkeyPatch()
    # In bfloat16, rounding may decide between two tokens; how answers reach their clients is what is looked at here.
    patch.setattr("trimtab.machine.best_precision", lambda: "float32")
    for name in [name for name, module in sys.modules.items() if hasattr(module, "best_precision")]:
        if name.startswith("trimtab."):
            patch.setattr(f"{name}.best_precision", lambda: "float32")
    with Engine.open(str(model_folder), adapters, limits=Limits(rows=8, queue=64), name="base") as made:
        patch.undo()
        yield made


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Running]:
    service = running(engine, ends=False)
    with service as up:
        yield up


@pytest.fixture(scope="module")
def alone(model_folder: Path, adapters: dict[str, Path]) -> dict[tuple[str, int], str]:
    """What each model says to each of `TURNS` by itself."""
    found = {}
    tokenizer = tiny_tokenizer()
    for name in ("base", *adapters):
        model = tiny_model(len(tokenizer))
        if name in adapters:
            trimtab.load_adapter(model, adapters[name])
        asked = Asked(model.eval(), tokenizer)
        for number, turns in enumerate(TURNS):
            written = asked.write(rendered(turns, tokenizer), Drawing(LONGEST), lambda _: None)
            found[name, number] = written.text
    return found


def client(up: Running, **more: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{up.address}/v1", api_key="-", max_retries=0, timeout=60, **more)


@pytest.mark.parametrize("clients", [1, 8, 64])
def test_every_client_gets_what_its_model_says_alone(
    clients: int, server: Running, alone: dict[tuple[str, int], str]
) -> None:
    assert len(set(alone.values())) > len(TURNS), "the adapters would not be told apart"
    asking, cases = client(server), list(alone)

    def ask(number: int) -> None:
        model, turn = cases[number % len(cases)]
        settings: Any = {"model": model, "messages": TURNS[turn], "temperature": 0, "max_tokens": LONGEST}
        if number % 2:
            chunks = list(asking.chat.completions.create(**settings, stream=True))
            said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        else:
            said = asking.chat.completions.create(**settings).choices[0].message.content or ""
        assert said == alone[model, turn], (model, turn)

    started = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, range(clients)))
    assert time.monotonic() - started < 60


def test_settings_reach_the_model(server: Running, alone: dict[tuple[str, int], str]) -> None:
    asking = client(server)
    (model, turn), whole = next((case, text) for case, text in alone.items() if re.search("[a-z]{4}", text[1:]))
    settings: Any = {"model": model, "messages": TURNS[turn], "max_tokens": LONGEST}

    def choice(**more: Any) -> Any:
        return asking.chat.completions.create(**settings, **more).choices[0]

    one, same, other = (choice(temperature=1.5, seed=seed).message.content for seed in (1, 1, 2))
    assert one == same != other
    told = choice(temperature=0, logprobs=True, top_logprobs=3).logprobs.content
    assert all(token.logprob == token.top_logprobs[0].logprob for token in told)  # the likeliest is taken
    assert [len(token.top_logprobs) for token in told] == [3] * len(told)
    assert b"".join(bytes(token.bytes) for token in told).decode(errors="replace").startswith(whole)
    found = re.search("[a-z]{4}", whole[1:])
    assert found is not None
    cut = choice(temperature=0, stop=["never", found[0]])
    assert cut.message.content == whole[: whole.index(found[0])]
    assert cut.finish_reason == "stop"


def test_bad_requests_leave_the_others_alone(server: Running) -> None:
    for body, status in (
        ({"model": "fr", "prompt": [10**6]}, 400),
        ({"model": "fr", "prompt": [-1]}, 400),
        ({"model": "fr", "prompt": []}, 400),
        ({"model": "fr", "prompt": ""}, 400),
        ({"model": "fr", "prompt": "fog " * 300}, 400),
        ({"model": "french", "prompt": "fog"}, 404),
    ):
        got = server.ask("POST", "/v1/completions", body)
        assert got.status == status, (body, got.raw)
        assert got.error["message"]
    assert server.ask("POST", "/v1/completions", {"model": "fr", "prompt": "fog"}).status == 200


def test_a_full_queue(model_folder: Path) -> None:
    with Engine.open(str(model_folder), limits=Limits(rows=1, queue=1)) as engine, running(engine, ends=False) as up:
        name = engine.models()[0].name
        body = {"model": name, "prompt": "fog", "max_tokens": 200, "ignore_eos": True}
        with ThreadPoolExecutor(6) as pool:
            got = list(pool.map(lambda _: up.ask("POST", "/v1/completions", body), range(6)))
        statuses = sorted(one.status for one in got)
        assert statuses[0] == 200
        assert statuses[-1] == 429
        assert set(statuses) == {200, 429}
        assert all("retry-after" in one.headers for one in got if one.status == 429)


def test_a_client_that_goes_away_frees_its_place(server: Running, engine: Engine) -> None:
    before = engine.stats().finished.get("cancelled", 0)
    asking = client(server)
    body: Any = {"model": "legal", "prompt": "fog", "max_tokens": 240, "extra_body": {"ignore_eos": True}}
    with asking.completions.create(**body, stream=True) as stream:
        next(iter(stream))
    end = time.monotonic() + 20
    while engine.stats().running and time.monotonic() < end:
        time.sleep(0.02)
    stats = engine.stats()
    assert stats.running == 0
    assert stats.finished.get("cancelled", 0) == before + 1


def test_adapters_come_and_go_while_others_are_asked(model_folder: Path, adapters: dict[str, Path]) -> None:
    shelf = adapters["fr"].parent
    with (
        Engine.open(str(model_folder), name="base") as engine,
        running(engine, key="k", adapters_from=shelf, ends=False) as up,
    ):
        assert [one["id"] for one in up.ask("GET", "/v1/models").body["data"]] == ["base"]

        def says(model: str) -> Any:
            body = {"model": model, "prompt": "the fog", "max_tokens": 8, "temperature": 0, "logprobs": 0}
            got = up.ask("POST", "/v1/completions", body)
            return got.body["choices"][0]["logprobs"]["token_logprobs"] if got.status == 200 else got.status

        base = says("base")
        assert up.ask("POST", "/v1/adapters", {"name": "new", "path": "fr"}).status == 200
        assert says("new") != base
        assert up.ask("POST", "/v1/adapters", {"name": "bad", "path": "../adapters"}).status == 400
        assert up.ask("DELETE", "/v1/adapters/new").status == 200
        assert says("new") == 404
        assert says("base") == base


# A process of its own: most of its time goes by until torch is loaded ------------------------------------------------


@contextmanager
def process(model: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """``trimtab serve`` and its port, once it answers."""
    command = [sys.executable, "-m", "trimtab", "serve", str(model), "--port", "0", *words]
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    try:
        assert started.stdout is not None
        line = started.stdout.readline()
        found = re.search(r"Serving at http://127\.0\.0\.1:(\d+)", line)
        assert found, (line, started.communicate(timeout=20))
        yield started, int(found[1])
    finally:
        started.kill()
        started.communicate()


@pytest.mark.full
def test_curl_and_then_a_signal(model_folder: Path, adapters: dict[str, Path]) -> None:
    """The line that it prints can be pasted; told to end in the middle of a stream, it ends that stream first."""
    with process(model_folder, "--adapter", f"legal={adapters['legal']}", "--grace", "20") as (server, port):
        assert server.stdout is not None
        printed = [server.stdout.readline() for _ in range(4)]
        command = next(line for line in printed if "try " in line).partition("try")[2].strip()
        pasted = subprocess.run(["bash", "-c", command.replace("curl", "curl -sS")], capture_output=True, text=True)
        assert json.loads(pasted.stdout)["model"] == "legal", pasted
        body = json.dumps({"model": "legal", "prompt": "fog", "max_tokens": 200, "ignore_eos": True, "stream": True})
        curl = ["curl", "-sSN", f"http://127.0.0.1:{port}/v1/completions", "--json", body]
        with subprocess.Popen(curl, stdout=subprocess.PIPE, text=True) as stream:
            assert stream.stdout is not None
            assert stream.stdout.readline().startswith("data: ")
            server.send_signal(signal.SIGTERM)
            assert stream.stdout.read().endswith("data: [DONE]\n\n")
        assert server.wait(30) == 143
        assert server.stderr is not None
        assert server.stderr.read().endswith("\ninterrupted; the server is closed\n")


@pytest.mark.full
def test_a_server_that_is_killed_leaves_its_port_free(model_folder: Path) -> None:
    with process(model_folder) as (server, port):
        asking = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0, timeout=30)
        name = next(iter(asking.models.list())).id
        more: Any = {"max_tokens": 240, "extra_body": {"ignore_eos": True}}
        stream = asking.completions.create(model=name, prompt="fog", stream=True, **more)
        next(iter(stream))
        server.kill()
        with pytest.raises(Exception, match=r"(?i)connection|closed|incomplete|peer"):
            list(stream)
        server.wait(10)
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", port))
