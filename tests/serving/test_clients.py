"""OpenAI's own client, and curl."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from served import WORDS, FakeEngine, Running, running

SAID = "".join(WORDS)
HELLO: Any = [{"role": "user", "content": [{"type": "text", "text": "Is berth seven free?"}]}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(FakeEngine(), key="s3cret") as up:
        yield up


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="s3cret", max_retries=0, timeout=30) as made:
        yield made


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", "legal", "fr"]
    assert client.models.retrieve("fr").owned_by == "trimtab"


def test_a_chat(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(model="legal", messages=HELLO, logprobs=True, top_logprobs=1, user="me", n=2)
    assert [choice.message.content for choice in got.choices] == [SAID, SAID]
    assert got.choices[0].logprobs is not None
    assert len(got.choices[0].logprobs.content or ()) == len(WORDS)
    assert got.usage is not None
    assert got.usage.completion_tokens == 2 * len(WORDS)
    assert (got._request_id or "").startswith("req-")


def test_a_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="legal", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == SAID
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(WORDS)


def test_a_completion(client: openai.OpenAI) -> None:
    got = client.completions.create(model="fr", prompt=["a", "b"], max_tokens=2, logprobs=1, seed=1)
    assert [choice.text for choice in got.choices] == ["the tug "] * 2
    assert [choice.finish_reason for choice in got.choices] == ["length"] * 2


def test_refusals_are_the_client_s_own_errors(server: Running, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="Did you mean 'legal'"):
        client.chat.completions.create(model="legals", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="temperature: expected at most 2") as refused:
        client.chat.completions.create(model="legal", messages=HELLO, temperature=3)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_a_stream_that_fails_in_the_middle_raises(server: Running) -> None:
    from trimtab.serving.requests import RequestFailed

    with running(FakeEngine(failing=RequestFailed("the model failed"), after=2)) as up:
        client = openai.OpenAI(base_url=f"{up.address}/v1", api_key="-", max_retries=0)
        stream = client.chat.completions.create(model="legal", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError, match="the model failed"):
            list(stream)


def test_a_client_that_finds_a_full_queue_comes_again() -> None:
    """OpenAI's client waits as long as it is told to, and asks again."""
    with running(FakeEngine(seconds=0.05, most=4)) as up:
        client = openai.OpenAI(base_url=f"{up.address}/v1", api_key="-", max_retries=8, timeout=30)
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(client.chat.completions.create, model="fr", messages=HELLO) for _ in range(8)]
            assert {one.result().choices[0].message.content for one in asked} == {SAID}
        assert any(" 429 " in line for line in up.lines)


@pytest.mark.parametrize("clients", [1, 8, 64])
def test_many_clients_at_once(clients: int) -> None:
    """Each gets its own answer, half of them as a stream; nothing waits for anybody else."""
    with running(FakeEngine(seconds=0.02)) as up:
        client = openai.OpenAI(base_url=f"{up.address}/v1", api_key="-", max_retries=0, timeout=60)

        def ask(number: int) -> str:
            model = ("base", "legal", "fr")[number % 3]
            if number % 2:
                stream = client.chat.completions.create(model=model, messages=HELLO, stream=True)
                return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.model == model)
            got = client.chat.completions.create(model=model, messages=HELLO)
            assert got.model == model
            return got.choices[0].message.content or ""

        started = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            assert list(pool.map(ask, range(clients))) == [SAID] * clients
        assert time.monotonic() - started < 20


# curl -----------------------------------------------------------------------------------------------------------------


def curl(server: Running, path: str, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = ["curl", "-sS", "--max-time", "20", f"{server.address}{path}", *words]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)


KEY = ("-H", "Authorization: Bearer s3cret")
JSON = ("-H", "Content-Type: application/json")


def test_curl(server: Running) -> None:
    body = json.dumps({"model": "legal", "messages": HELLO})
    got = json.loads(curl(server, "/v1/chat/completions", *KEY, *JSON, "-d", body).stdout)
    assert got["choices"][0]["message"]["content"] == SAID
    streamed = curl(server, "/v1/chat/completions", "-N", *KEY, "--json", body.replace("{", '{"stream": true, ', 1))
    assert streamed.stdout.startswith('data: {"id":"chatcmpl-')
    assert streamed.stdout.endswith("data: [DONE]\n\n")


def test_curl_without_what_it_has_to_say(server: Running) -> None:
    body = json.dumps({"model": "legal", "messages": HELLO})
    assert "the key is missing or wrong" in curl(server, "/v1/models").stdout
    assert "expected application/json" in curl(server, "/v1/chat/completions", *KEY, "-d", body).stdout


def test_curl_with_a_body_that_is_too_large(server: Running) -> None:
    """It is told so whether it waits for leave to send, or sends at once."""
    large = "x" * 5_000_000
    for words in ((), ("-H", "Expect:"), ("-H", "Transfer-Encoding: chunked")):
        got = curl(server, "/v1/chat/completions", *KEY, *JSON, *words, "-w", "%{http_code}", "-d", "@-", stdin=large)
        assert got.stdout.endswith("413"), (words, got)
