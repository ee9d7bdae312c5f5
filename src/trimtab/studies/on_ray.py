"""Runs as tasks of Ray, on this machine or on a cluster: `trimtab.studies.ray_task` is what a task does.

A run that fails has failed; one whose worker is lost is sent again, up to `TRIES` times in all.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.config.run import RunConfig
from trimtab.errors import ConfigError, RunError, Terminated, TrimtabError
from trimtab.machine import GIB, available_memory, describe_machine
from trimtab.runs.folder import RunFolder
from trimtab.studies import carry
from trimtab.studies.cell import finished_cell
from trimtab.studies.places import HERE, Errand, Outcome, Place
from trimtab.studies.ray_folder import ray_folder
from trimtab.studies.ray_task import OFTEN, VERSION, Board, do_run, word

TRIES = 3
"""How often a run is begun whose workers are lost."""

PATIENCE = 300
"""Seconds that a run waits for a machine which can take it; a cluster may grow."""

STORE = 256 * 2**20
"""Bytes that a Ray of our own keeps for what is carried; it has the same files, so that is little."""

# Ray reads these when it is imported.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",  # what it has to say of a lost worker, we say
}


@dataclass(frozen=True)
class Needs:
    """What a run asks of its machine."""

    processors: int
    memory: int
    """Bytes of the processor's memory, the peak that ``trimtab plan`` shows; 0 asks for none."""
    gpus: int = 0

    @property
    def words(self) -> str:
        if self.gpus:
            return f"{self.processors} processors and a GPU"
        return f"{self.processors} processors and {self.memory / GIB:.2f} GiB"

    def fit(self, machine: dict[str, float]) -> int:
        """How many such runs a machine of these resources takes at once."""
        asked = {"CPU": self.processors, "memory": self.memory, "GPU": self.gpus}
        return min(int(machine.get(name, 0) // need) for name, need in asked.items() if need)

    @classmethod
    def of(cls, memory: int, machines: Sequence[dict[str, float]], runs: int, threads: str | None) -> Needs:
        """What each of ``runs`` runs asks for, of a peak of ``memory`` bytes.

        Where there are GPUs, each has one and its share of the processors there. Else as many run at once as there is
        memory for, and have the processors between them; ``threads``, what OMP_NUM_THREADS says, goes before.
        """
        said = int(threads) if threads is not None and threads.isdecimal() and int(threads) else 0
        with_gpus = [machine for machine in machines if machine.get("GPU", 0) >= 1]
        if with_gpus:
            share = min(int(machine.get("CPU", 0) // machine["GPU"]) for machine in with_gpus)
            return cls(said or max(1, share), 0, 1)
        largest = max((int(machine.get("CPU", 0)) for machine in machines), default=1)
        at_once = min(runs, sum(cls(1, memory).fit(machine) for machine in machines)) or 1
        share = int(sum(machine.get("CPU", 0) for machine in machines) // at_once)
        return cls(said or max(1, min(share, largest)), memory)


@dataclass(frozen=True)
class _Sent:
    """A run on its way: which errand, what it asked for, for the how-manieth time, and since when."""

    number: int
    needs: Needs
    tries: int = 1
    since: float = field(default_factory=time.monotonic)


class Cluster:
    """A Ray cluster that was joined, or one of our own; see `trimtab.studies.places.Place`.

    Args:
        ray: the module, connected.
        scratch: where runs lie on the way; None: in the folder for temporary files there.
        carries: whether files are sent; not where the one machine is this.
        links: whether a file of the same name and content over there is used in place of what is sent.
    """

    several = True

    def __init__(self, ray: Any, scratch: Path | None = None, *, carries: bool = True, links: bool = True) -> None:
        self._ray, self._scratch, self._carries, self._links = ray, scratch, carries, links
        self._board = ray.remote(num_cpus=0, max_restarts=-1)(Board).remote()
        self._taking: Any = None
        self._task = ray.remote(do_run)
        self._sent: dict[Any, _Sent] = {}
        self._began: set[int] = set()
        self._pieces: dict[carry.Carried, list[Any]] = {}
        self._peaks: dict[str, int] = {}

    def bring(self, errands: Sequence[Errand]) -> Iterator[Outcome]:
        waiting = deque(range(len(errands)))
        self._began.clear()
        try:
            while waiting or self._sent:
                if waiting:
                    number = waiting.popleft()
                    if _is_done(errands[number].config):
                        errands[number].began("")
                        yield number, None
                        continue
                    needs = self._needs(errands[number].config, len(errands))
                    try:
                        self._send(errands[number], _Sent(number, needs))
                    except RunError as error:
                        yield number, error
                yield from self._heard(errands)
                done = self._over(0 if waiting else OFTEN)
                if done:  # what they told comes before their end
                    yield from self._heard(errands, 1)
                    yield from self._heard(errands, 1)
                for task in done:
                    if task in self._sent:
                        yield from self._ended(task, errands)
                yield from self._stranded()
        except self._ray.exceptions.RayError as error:
            raise RunError(f"the Ray cluster is gone ({_first_line(error)}); what is done is kept") from None
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End whatever is under way."""
        for task in list(self._sent):
            self._cancel(task)

    def _cancel(self, task: Any) -> None:
        self._sent.pop(task, None)
        with suppress(Exception):  # it is over, or its machine is gone
            self._ray.cancel(task, force=True)

    def _over(self, seconds: float) -> list[Any]:
        if not self._sent:
            return []
        tasks = list(self._sent)
        done: list[Any] = self._ray.wait(tasks, num_returns=len(tasks), timeout=0)[0]
        return done or self._ray.wait(tasks, timeout=seconds)[0]

    def _machines(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _needs(self, config: RunConfig, runs: int) -> Needs:
        alike = config.model_dump(mode="json", exclude={"output": True, "train": {"seed", "learning_rate"}})
        key = json.dumps(alike, sort_keys=True)
        if key not in self._peaks:
            self._peaks[key] = peak_memory(config)
        machines = self._machines()
        if "cpu" in (config.device, os.environ.get("TRIMTAB_DEVICE")):
            machines = [{**machine, "GPU": 0} for machine in machines]
        return Needs.of(self._peaks[key], machines, runs, os.environ.get("OMP_NUM_THREADS"))

    def _send(self, errand: Errand, sent: _Sent) -> None:
        if errand.config.device.startswith("cuda:"):
            raise RunError(
                f"device: {errand.config.device} names one GPU, and Ray gives each run one of its own; set device: cuda"
            )
        files = carry.files_of(errand.config)
        taken = carry.carried(files) if self._carries else set()
        order = {
            "version": VERSION,
            "number": sent.number,
            "config": errand.config.model_dump(mode="json"),
            "keep": errand.keep,
            "model": carry.model_words(errand.config),
            "processors": sent.needs.processors,
            "files": [vars(file) for file in files],
            "links": self._links,
            "scratch": str(self._scratch) if self._scratch else None,
        }
        pieces = {file.path: self._put(file) for file in files if file.path in taken}
        asked = {"num_cpus": sent.needs.processors, "num_gpus": sent.needs.gpus, "memory": sent.needs.memory or None}
        task = self._task.options(**asked, max_retries=0).remote(json.dumps(order), pieces, self._board)
        self._sent[task] = sent

    def _put(self, file: carry.Carried) -> list[Any]:
        if file not in self._pieces:
            self._pieces[file] = [self._ray.put(piece) for piece in carry.pieces(Path(file.path))]
        return self._pieces[file]

    def _heard(self, errands: Sequence[Errand], seconds: float = 0) -> Iterator[Outcome]:
        """Pass on what stands on the board. A listener that has enough of its run ends it by what it raises."""
        self._taking = self._taking if self._taking is not None else self._board.take.remote()
        if not self._ray.wait([self._taking], timeout=seconds)[0]:
            return
        taking, self._taking = self._taking, None
        try:
            lines = self._ray.get(taking)
        except self._ray.exceptions.RayActorError:  # its machine is gone; it is made anew, empty
            return
        under_way = {sent.number: task for task, sent in self._sent.items()}
        for number, method, arguments in filter(None, map(word, lines)):
            if number not in under_way:
                continue
            try:
                if method == "began":
                    self._began.add(number)
                getattr(errands[number], method)(*arguments)
            except TrimtabError as enough:
                self._cancel(under_way.pop(number))
                yield number, enough

    def _ended(self, task: Any, errands: Sequence[Errand]) -> Iterator[Outcome]:
        """Take home what a task gave, or send it again."""
        raised = self._ray.exceptions
        sent = self._sent.pop(task)
        errand = errands[sent.number]
        try:
            parcel = self._ray.get(task)
            if sent.number not in self._began:
                errand.began("")
            said = carry.header_of(parcel)
            if "failed" in said:
                yield sent.number, RunError(str(said["failed"])[:4000])
                return
            run = errand.config.output / "run"
            carry.unpacked(parcel, run)
            RunFolder(run).link_adapter()
        except (raised.RayTaskError, raised.RuntimeEnvSetupError) as error:
            words = f"a worker cannot run trimtab ({_first_line(error)}); install trimtab[ray] on all machines"
            yield sent.number, RunError(words)
        except raised.TaskCancelledError:
            yield sent.number, RunError("its task was cancelled, not by us")
        except raised.RayError as lost:
            self._began.discard(sent.number)
            if sent.tries == TRIES:
                yield sent.number, RunError(f"its worker was lost {TRIES} times ({_why_lost(lost)})")
                return
            errand.told(f"its worker was lost ({_why_lost(lost)}); it is begun again")
            self._send(errand, _Sent(sent.number, sent.needs, sent.tries + 1))
        except TrimtabError as error:
            yield sent.number, error
        else:
            yield sent.number, None

    def _stranded(self) -> Iterator[Outcome]:
        """Give up runs that no machine of the cluster can take; one that is joined may still grow for a while."""
        now = time.monotonic()
        idle = {task: sent for task, sent in self._sent.items() if sent.number not in self._began}
        late = [task for task, sent in idle.items() if now - sent.since > (PATIENCE if self._carries else 0)]
        machines = self._machines() if late else []
        for task in late:
            needs = idle[task].needs
            if not any(needs.fit(machine) for machine in machines):
                self._cancel(task)
                best = max((machine.get("memory", 0) for machine in machines), default=0)
                yield (
                    idle[task].number,
                    RunError(
                        f"needs {needs.words}, and no machine of the Ray cluster has that; the largest of "
                        f"{len(machines)} has {best / GIB:.2f} GiB for runs. A smaller batch would help (see trimtab "
                        "plan), or other machines"
                    ),
                )


def _is_done(config: RunConfig) -> bool:
    """Whether there is nothing left to do of a cell but to read its run."""
    with suppress(RunError):  # of a damaged file, which the run replaces
        return finished_cell(config) is not None or RunFolder(config.output / "run").status == "finished"
    return False


def peak_memory(config: RunConfig) -> int:
    """Bytes that a run's process will have at its peak, as ``trimtab plan`` says; 0 where that cannot be told, as of a
    run that is going to fail."""
    from trimtab.memory.described import planned_memory
    from trimtab.tasks import job_of

    try:
        return planned_memory(job_of(config)).peak.total
    except TrimtabError:
        return 0


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]


def _why_lost(error: BaseException) -> str:
    names = {"OutOfMemoryError": "its machine ran out of memory", "NodeDiedError": "its machine is gone"}
    return names.get(type(error).__name__, "its process ended")


@contextmanager
def place(on: str | None) -> Iterator[Place]:
    """The place that ``on`` means: None for here; ``ray`` for the Ray cluster that RAY_ADDRESS names, or else for a Ray
    of our own on this machine; ``ray://host:port`` for the cluster there.

    Raises ConfigError for anything else, RunError where Ray is not installed or cannot be reached.
    """
    if on is None:
        yield HERE
        return
    if on != "ray" and not on.startswith("ray://"):
        raise ConfigError(f"--on: expected ray, or ray://HOST:PORT for a cluster, got '{on}'")
    if importlib.util.find_spec("ray") is None:
        raise RunError("--on ray needs Ray, which is not installed: pip install 'trimtab[ray]'")
    try:
        with cluster((os.environ.get("RAY_ADDRESS") or None) if on == "ray" else on) as found:
            yield found
    except SystemExit:  # Ray makes one of its own of what SIGTERM raises while it waits
        raise Terminated from None


def _secret() -> dict[str, str]:
    """The variables by which a Ray that is started here takes work from this process alone. Ray reads them when it is
    imported, so a program that had imported it before goes without."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def _token() -> dict[str, str]:
    """What lets Ray show the token that its user has, if there is one; ray://HOST:PORT needs to be told."""
    has = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    has = has or (Path.home() / ".ray" / "auth_token").is_file()
    return {"RAY_AUTH_MODE": "token"} if has and "RAY_AUTH_MODE" not in os.environ else {}


@contextmanager
def cluster(address: str | None) -> Iterator[Cluster]:
    """The cluster at ``address``, or one of our own on this machine for as long as the context is open.

    Our own has the processors and the memory that are free here, no dashboard, and a secret without which nobody can
    give it work. A cluster that was joined is left as it was, but for our own tasks. Ray's statistics are off.

    Raises RunError if the cluster cannot be joined, or Ray does not start.
    """
    if "ray" not in sys.modules:
        os.environ |= _QUIET | (_secret() if address is None else _token())
    import ray

    if ray.is_initialized():  # by the program that this one is part of
        yield Cluster(ray)
        return
    if address is not None:
        otherwise = f"the Ray cluster at {address} cannot be joined; is it up, and RAY_AUTH_TOKEN the one it asks for?"
        with _connected(ray, {"address": address}, otherwise):
            yield Cluster(ray)
        return
    with ray_folder() as folder:
        settings = {
            "address": "local",
            "num_cpus": describe_machine()["cores"],
            "_memory": max(available_memory() - STORE, GIB // 4),
            "object_store_memory": STORE,
            "include_dashboard": False,
            "_temp_dir": str(folder),
        }
        with _connected(ray, settings, "Ray does not start on this machine"):
            yield Cluster(ray, folder / "runs", carries=False)


@contextmanager
def _connected(ray: Any, settings: dict[str, Any], otherwise: str) -> Iterator[None]:
    """Ray with ``settings``, without its words at the terminal; what it does to signals is undone."""
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if in_main else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(log_to_driver=False, logging_level="ERROR", **settings)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        yield
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        if ray.is_initialized() or isinstance(error, TrimtabError):
            raise
        raise RunError(f"{otherwise} ({_first_line(error)})") from None
    finally:
        ray.shutdown()
