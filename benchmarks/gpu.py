"""All that is to be known of trimtab on one NVIDIA GPU, by one command that ends by itself within eight minutes.

    make gpu                                              after make setup, which takes the torch that is there
    python benchmarks/gpu.py --json gpu.json              the same without make
    python benchmarks/gpu.py --parts checks --budget 120  some of it
    python benchmarks/gpu.py --device cpu --tiny          the same code with tiny shapes on a processor, in a minute

In this order: **checks** (what the device computes against float64: every method on every base, gradients, merging,
rows through adapters of their own; `gpu_checks.py`), **steps** of blocks of Llama-8B's and -1B's shapes
(`gpu_steps.py`) and a short **run** of SmolLM2 by the command line (`gpu_run.py`). The JSON file is whole after every
row. Each part has a process and a budget of its own, so that one that hangs or dies does not take the others along;
what was left out is said in words. At the end stand the tables, and the bars that the figures are held against.

What it needs: Python 3.11 or newer, torch 2.13 or newer built for CUDA (with triton, which comes with it), and what
`pip install trimtab` brings; PEFT and bitsandbytes for the arms that are about them. `make setup PYTHON=python3` takes
such a torch that the interpreter has already, and leaves it as it is. Without an installation torch 2.11 does, too:
what is not right with it, compiled blocks and outputs that are changed in place, is not part of this.

On a machine that no package registry can be reached from, carry the wheels there. Where there is a registry, once, for
the Python (312) and the CUDA (130) of that machine:

    python benchmarks/gpu_wheels.py --python 312 --cuda 130 wheels

and there, one command, from the root of the repository:

    python3 -m pip install -q --no-index --no-deps --target site wheels/*.whl && \\
        PYTHONPATH=$PWD/src:$PWD/site PYTHONUNBUFFERED=1 python3 benchmarks/gpu.py --json gpu.json --budget 470
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BUDGET = 470
"""Seconds, of which the last are for writing it all down."""
SHARES = {"checks": 0.2, "steps": 0.62, "run": 0.18}
"""What part of the budget each part has; what one leaves over, the next ones have."""
RESTARTS = 3


def main(arguments: Sequence[str] | None = None) -> None:
    said = _arguments(arguments)
    _require()
    import torch

    where = said.device or ("cuda" if torch.cuda.is_available() else "")
    if not where:
        sys.exit(_without_gpu(torch.__version__, torch.version.cuda))
    if said.part:
        _do(said.part, said, torch.device(where))
        return
    from gpu_record import Record, print_tables

    began = time.time()
    if not said.resume:
        said.json.unlink(missing_ok=True)
    record = Record(said.json)
    record.about = _about(torch.device(where))
    record.write()
    end, left = began + said.budget - 5, sum(SHARES[part] for part in said.parts)
    for part in said.parts:
        until = time.time() + (end - time.time()) * SHARES[part] / left
        left -= SHARES[part]
        _guarded(part, said, where, until)
    record = Record(said.json)
    record.about["seconds"] = round(time.time() - began, 1)
    record.write()
    print_tables(record)
    print(f"all of it: {said.json}")


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU, and without one nothing is done")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: for trying the program out")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds for all of it (default: {BUDGET})")
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES), metavar="PART")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "gpu.json", metavar="FILE")
    parser.add_argument("--resume", action="store_true", help="keep the rows of FILE, and go on with those that lack")
    parser.add_argument("--part", choices=SHARES, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    said = parser.parse_args(arguments)
    said.json = said.json.resolve()
    return said


def _require() -> None:
    """End in words where torch or the library is missing."""
    if not importlib.util.find_spec("torch"):
        sys.exit("torch is not installed: make setup, or install torch built for CUDA (pytorch.org, Get started)")
    from importlib import metadata

    try:
        metadata.version("trimtab")
        from trimtab.diagnosis import diagnose
    except ImportError as error:
        sys.exit(f"trimtab is not installed whole ({error}): make setup, or pip install --no-deps --editable .")
    if broken := diagnose().broken:
        sys.exit("\n".join(["some of what trimtab needs is missing:", *broken]))


def _without_gpu(version: str, cuda: str | None) -> str:
    reason = "torch sees no GPU" if cuda else f"torch {version} is built without CUDA"
    return (
        f"there is no GPU here ({reason}), so nothing is measured. Beside a driver (nvidia-smi) it takes a torch "
        "that is built for CUDA (pytorch.org, Get started). To try it out: python benchmarks/gpu.py --device cpu --tiny"
    )


def _about(device: Any) -> dict[str, Any]:
    """The machine, the device and the versions, in words."""
    import torch

    from trimtab.machine import describe_machine, versions
    from trimtab.ops.kernels import kernels_for

    about = {"device": "the processor"} | describe_machine()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about["device"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} SMs"
        )
        about["cuda"] = torch.version.cuda
    kernels: Any = kernels_for(torch.empty(1, 1, dtype=torch.bfloat16, device=device))
    about["kernels"] = kernels.__name__.rpartition(".")[2]
    about["versions"] = ", ".join(f"{name} {version}" for name, version in _versions(versions()).items())
    about["date"] = time.strftime("%Y-%m-%d %H:%M")
    return about


def _versions(ours: dict[str, str]) -> dict[str, str]:
    from importlib import metadata

    found = dict(ours)
    for package in ("triton", "peft", "bitsandbytes", "liger-kernel", "kernels", "flash-attn"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def _guarded(part: str, said: argparse.Namespace, device: str, until: float) -> None:
    """Do ``part`` in a process of its own, which is ended at ``until``; steps that killed theirs are passed over."""
    from gpu_record import Record

    plain = False
    for _ in range(RESTARTS if part == "steps" else 1):
        if until - time.time() < 1:
            Record(said.json).note(f"{part}: left out, since the time was used up")
            return
        command = ["--part", part, "--until", str(until), "--json", str(said.json), "--device", device]
        command += ["--tiny"] * said.tiny + ["--plain"] * plain
        code = _process(command, until - time.time() + 3)
        if code == 0:
            return
        ended = "ended, since its time was used up" if code is None else f"its process ended with code {code}"
        Record(said.json).note(f"{part}: {ended}; what it had found is kept")
        plain = True


def _process(arguments: list[str], seconds: float) -> int | None:
    """The exit code of this program with ``arguments``; None where it was ended after ``seconds``."""
    try:
        return subprocess.run([sys.executable, __file__, *arguments], timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return None


def _do(part: str, said: argparse.Namespace, device: Any) -> None:
    """One part, in this process."""
    from gpu_record import Record

    record = Record(said.json)
    until: float = said.until or time.time() + said.budget

    def late(needed: float = 0.0) -> bool:
        return time.time() + needed > until

    if part == "checks":
        import gpu_checks

        gpu_checks.run(record, device, tiny=said.tiny, late=late)
    elif part == "steps":
        import gpu_steps

        gpu_steps.run(record, device, tiny=said.tiny, late=late, plain=said.plain)
    else:
        import gpu_run

        gpu_run.run(record, tiny=said.tiny, seconds=max(1.0, until - time.time()))


if __name__ == "__main__":
    main()
