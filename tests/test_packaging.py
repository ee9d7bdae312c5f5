"""The package: one version, and archives that hold what a user needs and run outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import trimtab

ROOT = Path(__file__).resolve().parents[1]
BEFORE = ROOT / "tests" / "data" / "before"


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_every_place_names_the_same_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert project()["version"] == trimtab.__version__ == cited["version"]


def test_the_changelog_has_this_version() -> None:
    titles = [line for line in (ROOT / "CHANGELOG.md").read_text("utf-8").splitlines() if line.startswith("## ")]
    assert titles[0] == "## Unreleased" or titles[0].startswith(f"## {trimtab.__version__}")
    assert any(title.startswith(f"## {trimtab.__version__}") for title in titles)


def pins(file: str) -> dict[str, Version]:
    lines = (ROOT / file).read_text("utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line)
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def bounds(*left_out: str) -> dict[str, Version]:
    """The lowest version of each package that pyproject.toml asks for, without some of the extras."""
    extras = project()["optional-dependencies"]
    lines = [*project()["dependencies"], *(line for name in extras if name not in left_out for line in extras[name])]
    wanted = [Requirement(line) for line in lines if not line.startswith(("trimtab[", "types-"))]
    return {canonicalize_name(one.name): min(Version(part.version) for part in one.specifier) for one in wanted}


def test_what_the_tests_need_is_pinned() -> None:
    pinned = pins("constraints.txt")
    assert bounds().keys() <= pinned.keys()
    assert all(lowest <= pinned[name] for name, lowest in bounds().items())


def test_triton_is_pinned_to_what_torch_for_cuda_asks_for() -> None:
    """pip finds no torch beside another one, so that `make setup` would fail wherever it takes torch for CUDA."""
    pinned = pins("constraints.txt")
    asked = [Requirement(line) for line in requires("torch") or [] if line.startswith("triton")]
    if not asked or Version(Version(version("torch")).public) != pinned["torch"]:
        pytest.skip(f"torch {version('torch')} is not the pinned one for CUDA, and so does not say")
    assert all(one.specifier.contains(pinned["triton"]) for one in asked), asked


def test_the_bounds_are_the_oldest_versions_that_are_tested() -> None:
    assert pins("constraints-oldest.txt") == bounds("docs", "dev")


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    return sorted(folder.iterdir(), key=lambda path: path.suffix)


@pytest.mark.full
def test_the_archives_are_whole(archives: list[Path]) -> None:
    source, wheel = archives  # .gz, .whl
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, archives)], check=True)
    with zipfile.ZipFile(wheel) as zipped:
        in_wheel = zipped.namelist()
    ours = [path.relative_to(ROOT / "src") for path in (ROOT / "src" / "trimtab").rglob("*")]
    wanted = {str(path) for path in ours if path.suffix in (".py", ".html", ".css", ".js", ".typed")}
    assert wanted <= set(in_wheel)
    assert not [name for name in in_wheel if not name.startswith(("trimtab/", "trimtab-"))]
    with tarfile.open(source) as archive:
        in_source = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CHANGELOG.md", "constraints.txt", "tests/conftest.py", "examples/quickstart.yaml"} <= in_source


@pytest.mark.full
def test_an_installed_wheel_runs_outside_the_checkout(archives: list[Path], tmp_path: Path) -> None:
    place = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place), str(archives[1])]
    subprocess.run(install, check=True)
    environment = {**os.environ, "PYTHONPATH": str(place)}

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
        )
        return done.stdout

    assert run("-c", "import trimtab; print(trimtab.__file__)").startswith(str(place))
    (tmp_path / "run.yaml").write_text(
        f"model: {BEFORE / 'model'}\ndata: {{train: {BEFORE / 'train.jsonl'}}}\noutput: out\n"
        "plan: [{match: all-linear, method: dora, rank: 2}]\ntrain: {epochs: 1, max_steps: 2}\n"
    )
    run("-m", "trimtab", "finetune", "run.yaml")
    assert (tmp_path / "out" / "report.html").is_file()
