"""Many requests for many adapters through the server: at once, and one after the other.

    python benchmarks/serving.py                     SmolLM2-135M, bfloat16: 64 requests, some minutes
    python benchmarks/serving.py --http              through the HTTP server, each request by a client of its own
    python benchmarks/serving.py --requests 16 --tokens 8 --repeats 1
    python benchmarks/serving.py --transformers      transformers' own continuous batching beside padded rows

Eight models take turns: three LoRA, three DoRA and one MoRA adapter of rank 16 on all seven projections, and the bare
model. Prompts have 8 to 40 tokens, and every answer has so many tokens as ``--tokens`` says. The arms are

    one after another     a request is sent when the one before has its answer
    at once               all requests are sent together; 16 are answered at one time

They live in one process and take turns (A B A B). The table gives medians: seconds, and seconds of processor time, in
which other programs on the machine count less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import torch

from adapters import MIXED, smollm2
from common import show, write_results
from step import disturb

Ask = Callable[[int], None]
"""Sends the request of that number, and waits for its answer."""


def saved(model: Any, rank: int, place: Path) -> dict[str, Path]:
    """Folders with the adapters."""
    import trimtab

    found = {}
    for name, method in MIXED.items():
        trimtab.attach(model, trimtab.Rule(match="all-linear", method=method, rank=rank), name=name)
        disturb(model)
        key = name.replace(" ", "-")
        found[key] = trimtab.save_adapter(model, place / key, name)
        trimtab.delete_adapter(model, name)
    return found


def prompts(count: int) -> list[tuple[int, ...]]:
    """Tokens by chance, 8 to 40 of them."""
    drawn = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 41, (count,), generator=drawn).tolist()
    return [tuple(torch.randint(100, 40_000, (length,), generator=drawn).tolist()) for length in lengths]


@contextmanager
def engine(said: argparse.Namespace) -> Iterator[Any]:
    from trimtab.serving.engine import Engine
    from trimtab.serving.requests import Limits

    with tempfile.TemporaryDirectory() as place:
        folders = saved(smollm2(30), said.rank, Path(place))
        with Engine.open("smollm2-135m", folders, limits=Limits(rows=said.rows)) as made:
            yield made


def by_engine(made: Any, said: argparse.Namespace) -> Ask:
    from trimtab.serving.requests import Request

    names, texts = [one.name for one in made.models()], prompts(said.requests)

    def ask(number: int) -> None:
        request = Request(names[number % 8], texts[number], max_new_tokens=said.tokens, ignore_end=True)
        last = list(made.submit(request))[-1]
        assert last.completion_tokens == said.tokens

    return ask


@contextmanager
def by_http(made: Any, said: argparse.Namespace) -> Iterator[Ask]:
    from trimtab.serving.guards import Access
    from trimtab.serving.routes import HttpLimits, Service
    from trimtab.serving.server import Serving, address_of, listen

    socket = listen("127.0.0.1", 0)
    service = Service(made, Access(), HttpLimits(), told=lambda _: None)
    server = Serving(service, made, grace=1.0, told=lambda _: None)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    names, texts = [one.name for one in made.models()], prompts(said.requests)
    port = int(address_of(socket).rpartition(":")[2])

    def ask(number: int) -> None:
        body = {"model": names[number % 8], "prompt": texts[number], "max_tokens": said.tokens, "temperature": 0}
        connection = HTTPConnection("127.0.0.1", port, timeout=600)
        sent = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps({**body, "ignore_eos": True}), sent)
        answer = json.loads(connection.getresponse().read())
        connection.close()
        assert answer["usage"]["completion_tokens"] == said.tokens, answer

    try:
        yield ask
    finally:
        server.should_exit = True
        thread.join(30)


def measured(ask: Ask, said: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Seconds, and those of processor time, of each arm."""

    def one_after_another() -> None:
        for number in range(said.requests):
            ask(number)

    def at_once() -> None:
        with ThreadPoolExecutor(said.requests) as clients:
            list(clients.map(ask, range(said.requests)))

    for number in range(8):  # every adapter once, before the clock starts
        ask(number)
    found: dict[str, list[tuple[float, float]]] = {"one after another": [], "at once": []}
    for _ in range(said.repeats):
        for arm, run in (("one after another", one_after_another), ("at once", at_once)):
            began = time.perf_counter(), time.process_time()
            run()
            found[arm].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    return found


def of_transformers(said: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """The same of 16 prompts through the bare model: rows that are padded, and ``generate_batch``."""
    from transformers import GenerationConfig

    from trimtab.evaluation.generation import greedy, padded_left

    model, texts = smollm2(30), [list(one) for one in prompts(16)]
    ids, mask = padded_left(texts, 0, torch.device("cpu"))
    settings = GenerationConfig(max_new_tokens=said.tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)

    @torch.no_grad()
    def padded() -> None:
        greedy(model, ids, mask, max_new_tokens=said.tokens)

    def packed() -> None:
        model.generate_batch(texts, generation_config=settings, progress_bar=False)

    found: dict[str, list[tuple[float, float]]] = {"padded rows": [], "generate_batch": []}
    for number in range(1 + said.repeats):
        for arm, run in (("padded rows", padded), ("generate_batch", packed)):
            began = time.perf_counter(), time.process_time()
            run()
            if number:
                found[arm].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--rows", type=int, default=16, help="answered at one time")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--http", action="store_true", help="through the HTTP server")
    parser.add_argument("--transformers", action="store_true", help="transformers' own continuous batching")
    said = parser.parse_args()

    if said.transformers:
        found, title = of_transformers(said), f"16 requests through the bare model, {said.tokens} new tokens each"
    else:
        with engine(said) as made:
            if said.http:
                with by_http(made, said) as ask:
                    found = measured(ask, said)
            else:
                found = measured(by_engine(made, said), said)
        way = "HTTP" if said.http else "the engine"
        title = f"{said.requests} requests to 8 models through {way}, {said.tokens} new tokens each"
    first, second = found
    medians = {arm: [statistics.median(each) for each in zip(*times, strict=True)] for arm, times in found.items()}
    ratios = [after / before for before, after in zip(medians[first], medians[second], strict=True)]
    rows = [[arm, *(f"{seconds:.2f}" for seconds in each)] for arm, each in medians.items()]
    rows.append([f"{second} / {first}", *(f"{one:.3f}" for one in ratios)])
    show(f"{title}, bfloat16, medians of {said.repeats}", ["arm", "seconds", "of processor time"], rows)
    suffix = "_transformers" if said.transformers else "_http" if said.http else ""
    write_results(f"serving{suffix}", vars(said), {"seconds": found, "ratios": ratios})


if __name__ == "__main__":
    main()
