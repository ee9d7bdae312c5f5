"""The server from outside: plain HTTP, over an engine without a model."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from served import WORDS, FakeEngine, Running, running
from trimtab.errors import ConfigError
from trimtab.serving.requests import OutOfTime, RequestFailed
from trimtab.serving.routes import HttpLimits
from trimtab.serving.server import listen

SAID = "".join(WORDS)


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def server(engine: FakeEngine) -> Iterator[Running]:
    with running(engine, limits=HttpLimits(body=200_000, rows=20)) as up:
        yield up


# Answers --------------------------------------------------------------------------------------------------------------


def test_a_chat_is_answered_in_openai_s_shape(server: Running, engine: FakeEngine) -> None:
    got = server.chat(max_completion_tokens=3, temperature=0, seed=7, stop=["x"], user="me", x_unused=None)
    assert got.status == 200, got.raw
    (choice,) = got.body["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "the tug is "},
        "logprobs": None,
        "finish_reason": "length",
    }
    assert (got.body["object"], got.body["model"]) == ("chat.completion", "legal")
    request = engine.asked[-1]
    assert (request.max_new_tokens, request.temperature, request.seed, request.stop) == (3, 0, 7, ("x",))
    text = "<|im_start|>user\nIs berth seven free?<|im_end|>\n<|im_start|>assistant\n"
    assert list(request.prompt) == engine.encode(text, "legal")
    assert got.body["usage"] == {
        "prompt_tokens": len(request.prompt),
        "completion_tokens": 3,
        "total_tokens": len(request.prompt) + 3,
    }
    assert got.headers["x-request-id"].startswith("req-")


def test_what_a_request_leaves_open_is_as_openai_has_it(server: Running, engine: FakeEngine) -> None:
    server.chat()
    asked = engine.asked[-1]
    assert (asked.temperature, asked.top_p, asked.top_k, asked.seed, asked.max_new_tokens) == (1.0, 1.0, 0, None, None)
    server.ask("POST", "/v1/completions", {"model": "base", "prompt": "fog"})
    assert engine.asked[-1].max_new_tokens == 16


def test_several_answers_have_seeds_of_their_own(server: Running, engine: FakeEngine) -> None:
    got = server.ask(
        "POST", "/v1/completions", {"model": "fr", "prompt": ["a", "b"], "n": 2, "seed": 5, "max_tokens": 2}
    )
    assert [choice["index"] for choice in got.body["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in got.body["choices"]] == ["the tug "] * 4
    assert [request.seed for request in engine.asked[-4:]] == [5, 6, 7, 8]
    assert engine.asked[-4].prompt == engine.asked[-3].prompt != engine.asked[-1].prompt
    assert got.body["usage"] == {"prompt_tokens": 2, "completion_tokens": 8, "total_tokens": 10}


@pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7], [5, 6, 7]]])
def test_prompts_may_be_tokens(server: Running, engine: FakeEngine, prompt: Any) -> None:
    got = server.ask("POST", "/v1/completions", {"model": "base", "prompt": prompt})
    assert got.status == 200, got.raw
    assert engine.asked[-1].prompt == (5, 6, 7)


def test_a_stream_is_the_answer_in_pieces(server: Running) -> None:
    got = server.chat(stream=True, stream_options={"include_usage": True})
    assert got.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert got.raw.endswith(b"data: [DONE]\n\n")
    *chunks, last = got.events
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == SAID
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * len(WORDS) + ["stop"]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(WORDS)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({chunk["id"] for chunk in got.events}) == 1


def test_a_stream_of_several_answers_tells_them_apart(server: Running) -> None:
    got = server.ask("POST", "/v1/completions", {"model": "fr", "prompt": "a", "n": 3, "stream": True, "max_tokens": 8})
    said = {0: "", 1: "", 2: ""}
    for chunk in got.events:
        (choice,) = chunk["choices"]
        said[choice["index"]] += choice["text"]
        assert "usage" not in chunk
    assert said == dict.fromkeys(range(3), SAID)


def test_logprobs_of_a_chat(server: Running) -> None:
    told = server.chat(logprobs=True, top_logprobs=2, max_tokens=2).body["choices"][0]["logprobs"]["content"]
    assert [one["token"] for one in told] == ["the ", "tug "]
    assert told[0]["logprob"] == -0.5
    assert told[0]["bytes"] == list(b"the ")
    assert [(one["token"], one["logprob"], one["bytes"]) for one in told[0]["top_logprobs"]] == [
        ("the ", -0.5, list(b"the ")),
        ("\ufffd", -9999.0, [0xE2]),
    ]
    streamed = server.chat(logprobs=True, top_logprobs=2, max_tokens=2, stream=True).events
    parts = [one for chunk in streamed for one in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert parts == told


def test_logprobs_of_a_completion(server: Running) -> None:
    body = {"model": "base", "prompt": "a", "logprobs": 2, "max_tokens": 3}
    told = server.ask("POST", "/v1/completions", body).body["choices"][0]["logprobs"]
    assert told["tokens"] == ["the ", "tug ", "is "]
    assert told["text_offset"] == [0, 4, 8]
    assert told["top_logprobs"][0] == {"the ": -0.5, "bytes:\\xe2": -9999.0}
    streamed = server.ask("POST", "/v1/completions", {**body, "stream": True}).events
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in streamed] == [[0], [4], [8]]


def test_a_client_of_ours_may_give_its_request_a_number(server: Running) -> None:
    assert server.ask("GET", "/v1/models", x_request_id="mine-1").headers["x-request-id"] == "mine-1"
    server.wait_for_line("mine-1")
    assert server.ask("GET", "/v1/models", x_request_id="a b\tc").headers["x-request-id"].startswith("req-")


# Refusals -------------------------------------------------------------------------------------------------------------

CHAT = {"model": "legal", "messages": [{"role": "user", "content": "x"}]}
WRONG = {
    "no JSON": (b"{", "no JSON"),
    "a list": (b"[]", "must be a JSON object"),
    "bytes": (b"\xff\xfe", "no JSON"),
    "deep": (b'{"model": ' + b"[" * 5000 + b"]" * 5000 + b"}", "no JSON"),
    "half a pair": (b'{"model": "legal", "messages": [{"role": "user", "content": "\\ud800"}]}', "no JSON"),
    "no model": ({"messages": []}, "model: missing"),
    "no messages": ({"model": "legal"}, "messages: missing"),
    "no message": ({"model": "legal", "messages": []}, "messages: expected at least one"),
    "text": ({"model": "legal", "messages": "x"}, "messages: expected a list, got 'x'"),
    "role": ({"model": "legal", "messages": [{"role": "boss", "content": "x"}]}, r"messages.0.role: expected one of"),
    "no content": ({"model": "legal", "messages": [{"role": "user"}]}, "messages.0.content: expected text"),
    "picture": (
        {"model": "legal", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content.0: only text can be read, and this is image_url",
    ),
    "calls": (
        {"model": "legal", "messages": [{"role": "assistant", "content": "x", "tool_calls": 5}]},
        "messages.0.tool_calls: expected a list",
    ),
    "temperature": ({**CHAT, "temperature": -1}, "temperature: expected at least 0, got -1"),
    "a number in quotes": ({**CHAT, "temperature": "1"}, "temperature: expected a number, got '1'"),
    "truth": ({**CHAT, "max_tokens": True}, "max_tokens: expected a whole number, got true"),
    "nothing": ({**CHAT, "max_tokens": 0}, "max_tokens: expected at least 1, got 0"),
    "NaN": (json.dumps({**CHAT, "top_p": float("nan")}).encode(), "top_p: expected"),
    "seed": ({**CHAT, "seed": 2**63}, "seed: expected at most 9223372036854775807, got 9223372036854775808"),
    "huge": ({**CHAT, "n": 10**30}, "n: expected"),
    "more than are taken": ({**CHAT, "n": 21}, "n: 21 answers in one request are more than"),
    "penalty": ({**CHAT, "frequency_penalty": 0.5}, "frequency_penalty: not supported here"),
    "format": ({**CHAT, "response_format": {"type": "json_object"}}, "response_format: not supported.*in the messages"),
    "misspelt": ({**CHAT, "temprature": 1}, "temprature: unknown field. Did you mean 'temperature'?"),
    "stop": ({**CHAT, "stop": 5}, "stop: expected a text, or a list of texts, got 5"),
    "empty stop": ({**CHAT, "stop": ""}, "stop: expected a text of 1 to 1,000"),
    "options of a stream": ({**CHAT, "stream_options": {"include_usage": True}}, "stream_options: goes with stream"),
    "top without logprobs": ({**CHAT, "top_logprobs": 2}, "top_logprobs: goes with logprobs"),
    "tools": (
        {**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]},
        "tools: the chat template of legal",
    ),
    "a tool that is none": ({**CHAT, "tools": [{"name": "f"}]}, "tools.0: expected"),
    "forced": ({**CHAT, "tool_choice": "required"}, "tool_choice: the model cannot be made to"),
    "tokenizer": ({**CHAT, "chat_template_kwargs": {"tokenizer": "x"}}, "tokenizer is not for a request"),
    "template": ({**CHAT, "chat_template_kwargs": {"chat_template": "x"}}, "chat_template is not for a request"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_bad_body_is_refused_in_words(server: Running, name: str) -> None:
    body, said = WRONG[name]
    got = server.ask("POST", "/v1/chat/completions", body)
    assert got.status == 400, got.raw
    assert re.search(said.replace("?", r"\?"), got.error["message"]), got.error["message"]
    assert got.error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": 5}, "prompt: expected a text, a list of texts"),
        ({"prompt": []}, "prompt: expected at least one"),
        ({"prompt": ["a", 1]}, "prompt: expected a text"),
        ({"prompt": "a", "echo": True}, "echo: not supported"),
        ({"prompt": "a", "suffix": "b"}, "suffix: not supported"),
        ({"prompt": "a", "best_of": 2}, "best_of: not supported"),
        ({"prompt": "a", "logprobs": True}, "logprobs: expected a whole number"),
        ({"prompt": list(range(600))}, "600 tokens are too many"),
    ],
)
def test_a_bad_completion_is_refused_in_words(server: Running, body: dict[str, Any], said: str) -> None:
    got = server.ask("POST", "/v1/completions", {"model": "base", **body})
    assert got.status == 400, got.raw
    assert said in got.error["message"]


def test_fields_that_ask_for_nothing_are_taken(server: Running) -> None:
    off = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "response_format": {"type": "text"}}
    habits = {"user": "me", "store": False, "metadata": {"a": "b"}, "parallel_tool_calls": True, "functions": None}
    assert server.chat(**off, **habits, tool_choice="none").status == 200


def test_an_unknown_model_is_named_with_those_near_it(server: Running) -> None:
    got = server.chat("lega")
    assert (got.status, got.error["code"], got.error["param"]) == (404, "model_not_found", "model")
    assert "Did you mean 'legal'? There are: base, legal, fr" in got.error["message"]
    assert server.ask("GET", "/v1/models/nowhere").status == 404
    assert server.ask("GET", "/v1/models/legal").body["parent"] == "base"


def test_a_very_long_name_is_refused_without_comparing_it(server: Running) -> None:
    for body in ({**CHAT, "model": "ab" * 5000}, {**CHAT, "ab" * 5000: 1}):
        with patch("trimtab.errors.difflib.get_close_matches", side_effect=AssertionError):
            got = server.ask("POST", "/v1/chat/completions", body)
        assert got.status in (400, 404)
        assert len(got.error["message"]) < 300


def test_too_many_tokens_and_too_many_bytes(server: Running) -> None:
    long = server.chat(text="fog " * 600)
    assert (long.status, long.error["code"]) == (400, "context_length_exceeded")
    for headers in ({}, {"Transfer_Encoding": "chunked"}):
        body = json.dumps({**CHAT, "user": "x" * 300_000}).encode()
        framed = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if headers else body
        got = server.ask("POST", "/v1/chat/completions", framed, **headers)
        assert (got.status, got.error["code"]) == (413, "body_too_large")


def test_only_json_is_read(server: Running) -> None:
    for content in ("application/x-www-form-urlencoded", "text/plain", ""):
        got = server.ask("POST", "/v1/chat/completions", CHAT, Content_Type=content)
        assert got.status == 415, content
    assert (
        server.ask("POST", "/v1/chat/completions", CHAT, Content_Type="application/json; charset=utf-8").status == 200
    )
    packed = server.ask("POST", "/v1/chat/completions", b"\x1f\x8b", Content_Encoding="gzip")
    assert (packed.status, "content-encoding" in packed.error["message"]) == (415, True)


def test_addresses_that_are_none(server: Running) -> None:
    got = server.ask("GET", "/v1/model")
    assert (got.status, got.error["code"]) == (404, "unknown_url")
    assert "Did you mean '/v1/models'?" in got.error["message"]
    wrong = server.ask("GET", "/v1/chat/completions")
    assert (wrong.status, wrong.error["message"]) == (405, "Method Not Allowed")
    assert server.ask("POST", "/v1/../etc/passwd", {}).status == 404


def test_odd_requests_do_not_end_it(server: Running) -> None:
    for raw in (
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST /v1/models HTTP/9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"G" * 100_000,
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as line:
            line.sendall(raw)
            line.shutdown(socket.SHUT_WR)
            while line.recv(4096):
                pass
    assert server.ask("GET", "/health").body == {"status": "ok"}


def test_a_request_that_nobody_foresaw_is_told_without_its_words(caplog: pytest.LogCaptureFixture) -> None:
    with running(FakeEngine(failing=ZeroDivisionError("secret"))) as up:
        got = up.chat()
        assert got.status == 500
        assert b"secret" not in got.raw
        assert "ZeroDivisionError" in caplog.text
        assert up.ask("GET", "/health").status == 200


def test_a_failure_before_the_first_word_has_a_status_and_a_later_one_is_an_event() -> None:
    engine = FakeEngine(failing=RequestFailed("the adapter could not be read"))
    with running(engine) as up:
        assert up.chat(stream=True).status == 500
        engine.failing = OutOfTime("not begun in time")
        assert [up.chat(stream=True).status, up.chat().status] == [504, 504]
        engine.after = 2
        got = up.chat(stream=True)
        assert got.status == 200
        assert got.events[-1]["error"]["code"] == "out_of_time"
        assert b"[DONE]" not in got.raw
        assert up.ask("POST", "/v1/completions", {"model": "fr", "prompt": ["a", "b"]}).status == 504
        assert not engine.running


def test_an_answer_that_runs_out_of_time_is_no_answer() -> None:
    with running(FakeEngine(reason="time")) as up:
        got = up.chat()
        assert (got.status, got.error["code"]) == (504, "out_of_time")
        assert "8 tokens" in got.error["message"]


def test_a_full_queue_says_when_to_come_again() -> None:
    engine = FakeEngine(seconds=0.2, most=2)
    with running(engine) as up, ThreadPoolExecutor(3) as pool:
        first = [pool.submit(up.chat) for _ in range(2)]
        while len(engine.running) < 2:
            time.sleep(0.01)
        got = up.chat()
        assert (got.status, got.error["type"], got.error["code"]) == (429, "rate_limit_error", "queue_full")
        assert int(got.headers["retry-after"]) >= 1
        assert [one.result().status for one in first] == [200, 200]
        # Of a request with several answers either all are taken or none.
        assert up.chat(n=3).status == 429
        assert not engine.running


# Clients that go away, and the end ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_rows(stream: bool) -> None:
    engine = FakeEngine(words=WORDS * 10, seconds=0.1)
    with running(engine) as up:
        body = json.dumps({**CHAT, "n": 2, "stream": stream}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        with socket.create_connection(("127.0.0.1", up.port), timeout=10) as line:
            line.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            if stream:
                assert b"200 OK" in line.recv(4096)
            while len(engine.running) < 2:
                time.sleep(0.01)
        line = up.wait_for_line("POST")
        assert " gone " in line or stream
        assert not engine.running


def test_a_client_that_sends_half_a_body_is_not_waited_for_by_others(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as line:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        line.sendall(head + b"Content-Length: 50\r\n\r\n{")
        assert server.chat().status == 200


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET"])
def test_a_connection_without_a_whole_head_is_closed(sent: bytes) -> None:
    with patch("trimtab.serving.server._HEAD", 0.5), running(FakeEngine()) as up:
        started = time.monotonic()
        with socket.create_connection(("127.0.0.1", up.port), timeout=10) as line:
            line.sendall(sent)
            said = b""
            while time.monotonic() < started + 10:
                line.settimeout(0.1)
                try:
                    if not (some := line.recv(4096)):
                        break
                    said += some
                except TimeoutError:
                    if sent:
                        line.sendall(b"P")  # byte by byte does not make it longer
        assert 0.4 < time.monotonic() - started < 5
        assert said.startswith(b"HTTP/1.1 200 OK") == (b"\r\n\r\n" in sent)
        assert up.chat().status == 200


def test_a_request_takes_no_longer_than_it_may() -> None:
    with running(FakeEngine(seconds=5), seconds=0.3) as up:
        started = time.monotonic()
        assert up.chat().status == 504
        assert time.monotonic() - started < 3


def test_running_requests_finish_when_the_server_ends_and_new_ones_are_refused() -> None:
    engine = FakeEngine(seconds=0.1)
    with running(engine) as up, ThreadPoolExecutor(1) as pool:
        running_one = pool.submit(up.chat)
        while not engine.running:
            time.sleep(0.01)
        ending = threading.Thread(target=up.stop)
        ending.start()
        up.wait_for_line("Closing: 1 request has 2 seconds")
        late = up.chat()
        assert (late.status, late.error["code"]) == (503, "closing")
        assert up.ask("GET", "/health").status == 503
        assert running_one.result().body["choices"][0]["message"]["content"] == SAID
        ending.join()


def test_requests_that_do_not_finish_in_the_time_of_grace_are_told() -> None:
    engine = FakeEngine(words=WORDS * 100, seconds=0.1)
    with running(engine, grace=0.2) as up, ThreadPoolExecutor(2) as pool:
        plain, streamed = pool.submit(up.chat), pool.submit(lambda: up.chat(stream=True))
        while len(engine.running) < 2:
            time.sleep(0.01)
        time.sleep(0.3)
        up.stop()
        assert plain.result().status == 503
        assert streamed.result().events[-1]["error"]["code"] == "closing"


# Who may ask ----------------------------------------------------------------------------------------------------------


def test_a_key_is_asked_for_everywhere_but_at_the_door() -> None:
    with running(FakeEngine(), key="s3cret") as up:
        assert up.chat().status == 200
        for given in ("", "Bearer wrong", "Bearer ", "s3cret", "Basic s3cret", "Bearer s3cret2", "Bearer \xe9"):
            for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/chat/completions")):
                got = up.ask(method, path, CHAT if method == "POST" else None, Authorization=given)
                assert (got.status, got.error["code"]) == (401, "invalid_api_key"), given
                assert got.headers["www-authenticate"] == "Bearer"
        for path in ("/", "/health"):
            assert up.ask("GET", path, Authorization="").status == 200


def test_pages_of_others_cannot_ask(server: Running) -> None:
    own = f"http://127.0.0.1:{server.port}"
    assert server.ask("POST", "/v1/chat/completions", CHAT, Origin=own).status == 200
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "http://localhost"):
        got = server.ask("POST", "/v1/chat/completions", CHAT, Origin=origin)
        assert (got.status, got.error["code"]) == (403, "foreign_origin"), origin
        assert "access-control-allow-origin" not in got.headers
    assert server.ask("GET", "/v1/models", Sec_Fetch_Site="cross-site").status == 403
    assert server.ask("GET", "/", Sec_Fetch_Site="cross-site").status == 200  # a link to the page
    preflight = server.ask("OPTIONS", "/v1/models", Origin="https://evil.example", Access_Control_Request_Method="GET")
    assert preflight.status == 403


def test_a_name_that_leads_here_from_elsewhere_is_refused_without_a_key(server: Running) -> None:
    for host in ("evil.example", f"evil.example:{server.port}", "", "127.0.0.1.evil.example"):
        assert server.ask("GET", "/v1/models", Host=host).status == 403, host
    for host in ("localhost", f"127.0.0.1:{server.port}", "[::1]:8000", "192.168.3.4:8000", "model.localhost"):
        assert server.ask("GET", "/v1/models", Host=host).status == 200, host
    with running(FakeEngine(), key="k") as up:
        assert up.ask("GET", "/v1/models", Host="models.example").status == 200


def test_an_origin_may_be_allowed() -> None:
    with running(FakeEngine(), origins=("https://good.example",)) as up:
        asked = {"Origin": "https://good.example", "Access_Control_Request_Method": "POST"}
        preflight = up.ask("OPTIONS", "/v1/chat/completions", **asked, Access_Control_Request_Headers="content-type")
        assert preflight.headers["access-control-allow-origin"] == "https://good.example"
        got = up.ask("POST", "/v1/chat/completions", CHAT, Origin="https://good.example", Sec_Fetch_Site="cross-site")
        assert (got.status, got.headers["access-control-allow-origin"]) == (200, "https://good.example")
        assert up.ask("POST", "/v1/chat/completions", CHAT, Origin="https://evil.example").status == 403


# Adapters that come and go --------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """A folder with an adapter, a link out of it, and an adapter whose file is one."""
    outside, inside = tmp_path / "outside", tmp_path / "shelf"
    for folder in (outside, inside / "legal2", inside / "linked"):
        folder.mkdir(parents=True)
    (outside / "adapter_config.json").write_text("{}")
    (inside / "legal2" / "adapter_config.json").write_text("{}")
    (inside / "out").symlink_to(outside)
    (inside / "loop").symlink_to(inside / "loop")
    (inside / "linked" / "adapter_config.json").symlink_to(outside / "adapter_config.json")
    (inside / "empty").mkdir()
    return inside


def test_adapters_are_added_and_dropped(shelf: Path) -> None:
    with running(FakeEngine(), key="k", adapters_from=shelf) as up:
        added = up.ask("POST", "/v1/adapters", {"name": "two", "path": "legal2"})
        assert (added.status, added.body["id"], added.body["parent"]) == (200, "two", "base")
        assert up.chat("two").status == 200
        assert up.ask("POST", "/v1/adapters", {"name": "two", "path": "legal2"}).status == 409
        assert up.ask("DELETE", "/v1/adapters/two").body == {"id": "two", "object": "model", "deleted": True}
        assert up.chat("two").status == 404
        assert up.ask("DELETE", "/v1/adapters/two").status == 404
        assert up.ask("DELETE", "/v1/adapters/base").status == 400
        whole = {"lora_name": "three", "lora_path": str(shelf / "legal2")}
        assert up.ask("POST", "/v1/load_lora_adapter", whole).status == 200
        assert up.ask("POST", "/v1/unload_lora_adapter", {"lora_name": "three"}).status == 200
        empty = up.ask("POST", "/v1/adapters", {"name": "four", "path": "empty"})
        assert (empty.status, empty.error["code"]) == (400, "bad_adapter")
    with running(FakeEngine(adapters={"team/legal": Path("legal")}), key="k", adapters_from=shelf) as up:
        assert up.ask("GET", "/v1/models/team/legal").status == 200
        assert up.ask("DELETE", "/v1/adapters/team/legal").status == 200


@pytest.mark.parametrize(
    "path",
    [
        "../outside",
        "out",
        "linked",
        "loop",
        "",
        ".",
        "/etc",
        "legal2/../../outside",
        "nowhere",
        "a\x00b",
        "legal2/adapter_config.json",
    ],
)
def test_nothing_outside_of_the_folder_is_an_adapter(shelf: Path, path: str) -> None:
    with running(FakeEngine(), key="k", adapters_from=shelf) as up:
        got = up.ask("POST", "/v1/adapters", {"name": "two", "path": path})
        assert (got.status, got.error["code"]) == (400, "bad_path")
        assert "outside/" not in got.error["message"]


def test_names_that_cannot_be_asked_for(shelf: Path) -> None:
    with running(FakeEngine(), key="k", adapters_from=shelf) as up:
        for name in ("", "a/b", "../x", "a b", "x" * 200, "é"):
            assert up.ask("POST", "/v1/adapters", {"name": name, "path": "legal2"}).status == 400, name


def test_without_a_key_or_a_folder_adapters_stay_as_they_are(shelf: Path, server: Running) -> None:
    assert server.ask("POST", "/v1/adapters", {"name": "two", "path": "legal2"}).status == 403
    assert server.ask("DELETE", "/v1/adapters/legal").status == 403
    with running(FakeEngine(), key="k") as up:
        assert up.ask("POST", "/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "b"}).status == 403
    with running(FakeEngine(), adapters_from=shelf) as up:
        assert up.ask("DELETE", "/v1/adapters/legal").status == 403
    with running(FakeEngine(), key="k", adapters_from=shelf) as up:
        assert up.ask("POST", "/v1/adapters", {"name": "two", "path": "legal2"}, Authorization="").status == 401


# What is told ---------------------------------------------------------------------------------------------------------


def test_a_line_for_each_request_without_what_was_said(server: Running) -> None:
    number = server.chat(text="the secret of berth seven", max_tokens=2).headers["x-request-id"]
    line = server.wait_for_line(number)
    assert " 127.0.0.1 POST /v1/chat/completions 200 legal " in line
    assert "+2 tokens" in line
    assert "secret" not in "".join(server.lines)
    server.ask("GET", "/%0a%1b[31m" + "x" * 200)
    server.ask("GET" + "X" * 3000, "/health")
    assert all(one.isprintable() and len(one) < 250 for one in server.lines)


def test_metrics_are_prometheus_s(server: Running) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    server.chat(max_tokens=2)
    server.ask("GET", "/nowhere-at-all")
    got = server.ask("GET", "/metrics")
    assert got.headers["content-type"].startswith("text/plain; version=")
    found = {sample.name: sample for one in text_string_to_metric_families(got.raw.decode()) for sample in one.samples}
    assert found["trimtab_ready"].value == 1
    assert found["trimtab_adapters_known"].value == 2
    assert found["trimtab_duration_seconds_count"].value > 0
    assert found["trimtab_steps_total"].value == 9
    text = got.raw.decode()
    assert 'trimtab_http_requests_total{route="/v1/chat/completions",status="200"}' in text
    assert 'trimtab_http_requests_total{route="",status="404"}' in text
    assert "nowhere" not in text
    assert 'trimtab_model_tokens_total{kind="completion",model="legal"}' in text


def test_the_page_runs_its_own_script_and_no_other(server: Running) -> None:
    got = server.ask("GET", "/")
    policy = got.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    text = got.raw.decode()
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    assert "innerHTML" not in text
    assert " style=" not in text
    assert " onclick" not in text


# Addresses ------------------------------------------------------------------------------------------------------------


def test_a_port_in_use_and_a_host_that_is_none(server: Running) -> None:
    for host, port, said in (
        ("127.0.0.1", server.port, "another program has this port"),
        ("no.such.host.invalid", 8000, "there is no such address"),
        ("192.0.2.7", 8000, "this machine has no such address"),
    ):
        with pytest.raises(ConfigError, match=said):
            listen(host, port)
