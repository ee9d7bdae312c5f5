"""What the benchmarks share: turns between arms, medians, peak memory in a process of its own, tables and JSON."""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parent / "results"
WARM_UP = 2


def alternate(
    steps: Mapping[str, Callable[[], object]],
    repeats: int,
    between: Callable[[str], object] = lambda arm: None,
) -> dict[str, list[float]]:
    """Seconds of every call, the arms taking turns (A B C A B C ...), after ``WARM_UP`` rounds that do not count.

    ``between`` is called before each step with the arm's name, outside the clock.
    """
    seconds: dict[str, list[float]] = {arm: [] for arm in steps}
    for number in range(WARM_UP + repeats):
        for arm, step in steps.items():
            between(arm)
            began = time.perf_counter()
            step()
            if number >= WARM_UP:
                seconds[arm].append(time.perf_counter() - began)
    return seconds


def ratio(seconds: Mapping[str, list[float]], arm: str, floor: str) -> float:
    """Median of ``arm`` over median of ``floor``, both from one run."""
    return statistics.median(seconds[arm]) / statistics.median(seconds[floor])


def child(script: str, *arguments: str) -> Any:
    """What ``script`` prints as JSON in its last line, run in a process of its own."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join([script, *arguments])} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024**2


def peak_rise_gib(work: Callable[[], object]) -> float:
    """By how many GiB ``work`` raises this process's resident memory at its highest (Linux, glibc)."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be used again, and not be counted
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets the peak back to what is held now
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def peak_allocation(work: Callable[[], object]) -> int:
    """Bytes that PyTorch's allocator had handed out at the highest while ``work`` ran, beyond those before it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "10")  # or it tells of every beginning and end
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        work()
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def show(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table: the first column names, the others are numbers."""
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(title)
    console.print(table)


def show_over(
    title: str,
    seconds: Mapping[str, Mapping[str, list[float]]],
    floor: str,
    *,
    per: Mapping[str, int] | None = None,
    digits: int = 2,
) -> dict[str, dict[str, float]]:
    """Print milliseconds of each work and arm (of one of ``per`` parts) and their ratio to the arm ``floor``; give the
    ratios."""
    ratios = {work: {arm: ratio(times, arm, floor) for arm in times} for work, times in seconds.items()}
    rows = []
    for arm in next(iter(seconds.values())):
        cells = [arm]
        for work, times in seconds.items():
            one = statistics.median(times[arm]) / (per or {}).get(work, 1)
            cells += [f"{one * 1e3:.{digits}f}", f"{ratios[work][arm]:.3f}"]
        rows.append(cells)
    show(title, ["arm", *(text for work in seconds for text in (f"{work} ms", f"/ {floor}"))], rows)
    return ratios


def write_results(name: str, what: Mapping[str, Any], found: Any) -> None:
    """Write ``found`` with the machine and the versions to ``results/NAME.json``."""
    from trimtab.files import write_json
    from trimtab.machine import describe_machine, versions

    result = {"what": dict(what), "found": found, "machine": describe_machine(), "versions": versions()}
    write_json(RESULTS / f"{name}.json", result)
