"""A run in a process of its own: its listener here is told what happens there.

The child is this file, run as a module. It reads the configuration as one line of JSON from its standard input, and
writes one JSON list a line, the name of a listener's method and its arguments. Its input stays open: at its end the
parent is gone, and the child goes, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from trimtab.config.run import RunConfig
from trimtab.errors import STOPS, Interrupted, RunError, TrimtabError, machine_refusal
from trimtab.machine import keep_few_products
from trimtab.runs.events import TOLD, Listener


def run_apart(config: RunConfig, listener: Listener) -> None:
    """Do the run of ``config`` in a new process; go on with the one in its folder if it was cut off.

    Raises:
        RunError: what the run failed with, or how its process died.
        Interrupted: by the user, who is heard here; the child finishes its step and saves a checkpoint.
    """
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints:
        # A session of its own: Ctrl-C at the terminal reaches the parent alone, which passes it on once.
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # a child that died at once; its exit code tells
                child.stdin.write(json.dumps(config.model_dump(mode="json")) + "\n")
                child.stdin.flush()
            failure = _listen(child, listener)
        finally:
            child.kill()  # does nothing to one that has ended
            child.wait()
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
            child.stdout.close()
        if failure is not None:
            kind, message = failure
            raise (Interrupted if kind == "Interrupted" else RunError)(message)
        if child.returncode:
            complaints.seek(0)
            raise RunError(f"{config.output}: {_death(child.returncode)}{_last_line(complaints.read())}")


def _listen(child: subprocess.Popen[str], listener: Listener) -> tuple[str, str] | None:
    """Pass on what the child says until it ends; gives the kind and the words of its failure, if it told one."""
    assert child.stdout is not None
    failure: tuple[str, str] | None = None
    stop: BaseException | None = None
    while True:
        try:
            for line in child.stdout:
                method, *arguments = json.loads(line)
                if method == "failed":
                    failure = arguments[0], arguments[1]
                else:
                    getattr(listener, method)(*arguments)
            child.wait()
            if stop is not None:  # a run that ended before it heard is not the end of what the user wanted to stop
                raise Interrupted.by(stop, "interrupted" if failure is None else failure[1])
            return failure
        except STOPS as heard:
            stop = heard
            if child.poll() is None:
                child.send_signal(signal.SIGINT)


def _death(code: int) -> str:
    if code == -signal.SIGKILL:
        return "the run's process was killed, as the system does when memory runs out; try a smaller batch."
    return f"the run's process died ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})."


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return f" It said last: {lines[-1].strip()}" if lines else ""


def run_here(config: RunConfig, listener: Listener) -> None:
    """Do the run of ``config`` in this process, or go on with it. Raises as `finetune` does."""
    from trimtab.runs.folder import RunFolder
    from trimtab.training.run import finetune

    resume = RunFolder(config.output).is_run
    finetune(config, resume=resume, asks_peft=False, listener=listener)


class _Teller(Listener):
    """Writes every call as a line; what is to be looked at (``show``) stays in the child."""

    def __init__(self, stream: Any) -> None:
        def teller(method: str) -> Any:
            return lambda *arguments: print(json.dumps([method, *arguments]), file=stream, flush=True)

        for method in TOLD:
            setattr(self, method, teller(method))


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _main() -> None:
    keep_few_products()
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not mix with what we tell
    # A shell that starts a command in the background lets it ignore SIGINT, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config = RunConfig.model_validate(json.loads(sys.stdin.readline()))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        run_here(config, _Teller(stream))
    except STOPS:
        print(json.dumps(["failed", "Interrupted", "interrupted before training began"]), file=stream, flush=True)
        sys.exit(130)
    except Exception as error:
        if (said := str(error) if isinstance(error, TrimtabError) else machine_refusal(error)) is None:
            raise
        print(json.dumps(["failed", type(error).__name__, said]), file=stream, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    _main()
