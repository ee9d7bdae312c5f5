"""``trimtab serve``: a model and its adapters behind one address, for OpenAI's clients and for a browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli.exits import say
from trimtab.cli.importing import importing
from trimtab.cli.verbs._arguments import Target
from trimtab.errors import ConfigError, RunError
from trimtab.hints import quoted

if TYPE_CHECKING:
    from trimtab.serving.engine import Engine

SHORT_HELP = "Serve a model and many adapters: OpenAI's API, a page to chat by."
INTERRUPTED = "the server is closed"

_MIB, _GIB = 2**20, 2**30
_HERE = ("127.0.0.1", "localhost", "::1")


def command(
    target: Target,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER",
            help="An adapter, asked for as the model NAME: a run, or an adapter's folder, ours or PEFT's. May be given "
            "many times.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="What the base model is asked for as. Default: its own name.", show_default=False
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at. 0.0.0.0 is every network that this machine is in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at. 0: any free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            envvar="TRIMTAB_API_KEY",
            help="Requests have to show this key, as a bearer token. The variable keeps it out of the process list.",
            show_default=False,
        ),
    ] = None,
    adapters_from: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Adapters below this folder may be added and dropped while the server runs, by whoever has the key.",
            show_default=False,
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="Pages of this origin, such as https://example.org, may ask from a browser. May be given many times.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests that are answered at one time, in one batch.")] = 16,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; further ones are refused (429).")] = 128,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Most tokens of a prompt and its answer together. Default: the model's positions.",
            show_default=False,
        ),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Most tokens of all requests in the batch together: bounds the memory of their caches.",
            show_default=False,
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take in all (504).")] = 600.0,
    max_body: Annotated[float, typer.Option(min=0.001, help="Most MiB of a request's body (413).")] = 2.0,
    max_adapters: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Most adapters in memory; the one that was not asked for the longest leaves it. Default: all.",
            show_default=False,
        ),
    ] = None,
    adapter_memory: Annotated[
        float | None,
        typer.Option(min=0.001, help="Most GiB of all adapters in memory together.", show_default=False),
    ] = None,
    grace: Annotated[
        float, typer.Option(min=0.0, help="Seconds that running requests get to finish once the server is told to end.")
    ] = 10.0,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print no line for each request.")] = False,
) -> None:
    """Serve the model of a run, or any model, with many adapters at once, by OpenAI's API and a page to chat by.
    Requests for different adapters share batches. Ctrl-C or SIGTERM ends it, once running requests are done."""
    adapters = _named(adapter or [])
    _check_key(api_key)
    origins = _origins(allow_origin or [], api_key)
    if adapters_from is not None and api_key is None:
        raise ConfigError("--adapters-from: whoever adds adapters has to show a key; set TRIMTAB_API_KEY or --api-key")
    with importing():
        try:
            from trimtab.serving.server import Serving, address_of, listen
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in ("starlette", "uvicorn", "prometheus_client", "anyio", "h11"):
                raise
            raise ConfigError(
                f"serving needs {package}, which is not installed: pip install 'trimtab[serve]'"
            ) from None
        from trimtab.serving.adapter_folder import AdapterFolder
        from trimtab.serving.bodies import MOST_ROWS
        from trimtab.serving.engine import Engine
        from trimtab.serving.guards import Access
        from trimtab.serving.requests import Limits
        from trimtab.serving.routes import HttpLimits, Service

    shelf = None if adapters_from is None else AdapterFolder(adapters_from)
    with listen(host, port) as opened:
        limits = Limits(
            rows=batch_size,
            queue=queue,
            tokens=max_tokens,
            batch_tokens=batch_tokens,
            seconds=timeout,
            adapters=max_adapters,
            adapter_bytes=None if adapter_memory is None else int(adapter_memory * _GIB),
            grace=grace,
        )
        access = Access(api_key, origins, (host.lower(),), timeout + 60)
        http_limits = HttpLimits(int(max_body * _MIB), min(MOST_ROWS, batch_size + queue), timeout)
        say(f"Loading {target}", error=True)
        with Engine.open(target, adapters, limits=limits, name=name) as engine:
            service = Service(engine, access, http_limits, adapters_from=shelf, told=_silent if quiet else say)
            serving = Serving(service, engine, grace=grace, told=lambda text: say(text, error=True))
            if api_key is None and host not in _HERE:
                say(
                    f"Warning: everybody who reaches {host}:{opened.getsockname()[1]} can use this server, since no "
                    "key is set (TRIMTAB_API_KEY or --api-key).",
                    error=True,
                )
            for note in engine.stats().notes:
                say(f"Note: {note}", error=True)
            _tell(engine, address_of(opened), key=api_key is not None)
            serving.run(sockets=[opened])
            if (stats := engine.stats()).state == "broken":
                raise RunError(f"{'; '.join(stats.notes)}; the server has ended")


def _named(said: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for one in said:
        name, equals, folder = one.partition("=")
        if not equals:
            name, folder = Path(one).resolve().name, one
        if not name.isprintable():  # it stands in the line of each request
            raise ConfigError(f"--adapter {one!r}: a name is text on one line")
        if not name or not folder:
            raise ConfigError(f"--adapter {one}: expected NAME=FOLDER, such as legal=runs/legal")
        if name in found:
            raise ConfigError(
                f"--adapter {one}: there is an adapter {name} already, {found[name]}; give it another name"
            )
        found[name] = Path(folder)
    return found


def _check_key(key: str | None) -> None:
    if key is not None and (not key or not key.isascii() or not key.isprintable() or " " in key):
        raise ConfigError(
            "--api-key: expected letters, digits and signs of ASCII without a space; others cannot be sent"
        )


def _origins(said: list[str], key: str | None) -> tuple[str, ...]:
    for origin in said:
        scheme, separator, rest = origin.partition("://")
        if origin == "*" and key is None:
            raise ConfigError("--allow-origin '*': every page could ask this server; set a key as well")
        if origin != "*" and (scheme not in ("http", "https") or not separator or not rest or "/" in rest):
            raise ConfigError(f"--allow-origin {origin}: expected a scheme and a host, such as https://example.org")
    return tuple(said)


def _tell(engine: Engine, address: str, *, key: bool) -> None:
    """Where it is, what it serves, and a line to try."""
    models = engine.models()
    model = models[1] if len(models) > 1 else models[0]
    if engine.reads(model.name).tokenizer.chat_template:
        prompt: dict[str, object] = {"messages": [{"role": "user", "content": "Hello"}]}
        path = "chat/completions"
    else:
        path, prompt = "completions", {"prompt": "Hello"}
    asked = json.dumps({"model": model.name, **prompt, "max_tokens": 64}, ensure_ascii=False)
    shown = ' -H "Authorization: Bearer $TRIMTAB_API_KEY"' if key else ""
    say(f"Serving at {address} (Ctrl-C ends it)")
    say(f"  models  {', '.join(one.name for one in models)}")
    say(f"  chat    {address}/")
    say(f"  API     {address}/v1")
    say(f"  try     curl {address}/v1/{path}{shown} -H 'Content-Type: application/json' -d {quoted(asked)}")


def _silent(_: str) -> None:
    pass
