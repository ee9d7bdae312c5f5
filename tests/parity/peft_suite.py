"""PEFT's own tests of LoRA and DoRA, run twice: as they are, and with every model sped up after it is made.

    pip install parameterized diffusers        # which its tests import
    pip download --no-deps --no-binary :all: peft==0.21.2 && tar xzf peft-0.21.2.tar.gz
    python tests/parity/peft_suite.py peft-0.21.2/tests
    python tests/parity/peft_suite.py peft-0.21.2/tests --files test_lora_variants.py

The tests are part of PEFT's source distribution and not of this repository, so their path is given; its version has to
be that of the PEFT that is installed. Nothing is downloaded: a test that asks the hub for a model fails either way, and
does not count. What counts are the tests that pass as they are; each has to pass with `trimtab.speed_up` as well, which
is called whenever PEFT has put adapters into a model. In how many of them a layer computed with our kernels is printed,
too.

This file is also the pytest plugin that chooses the tests and speeds the models up.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
SPED_UP = "TRIMTAB_PEFT_SUITE_SPED_UP"
OUTCOMES = "TRIMTAB_PEFT_SUITE_OUTCOMES"
NOWHERE = "http://127.0.0.1:9"
"""The hub, for tests that want to download: nobody answers there, and they fail at once."""
# Tests of methods of their own, of other machines, and of models that are all downloaded.
LEFT_OUT = (
    "gpu",
    "stablediffusion",
    "gptqmodel",
    "adamss",
    "hub_features",
    "xlora",
    "megatron",
    "decoder_models",
    "extraction",
)


# The plugin ----------------------------------------------------------------------------------------------------------


class Plugin:
    """Chooses the tests, writes down how each ended, and speeds the models up if it is told to."""

    def __init__(self, sped_up: bool, outcomes: Path) -> None:
        self.sped_up, self.outcomes = sped_up, outcomes
        self.calls = 0  # of our kernels
        self.before = 0
        ask_no_more_than_once()
        if sped_up:
            self._speed_up_all()

    def _speed_up_all(self) -> None:
        from peft.tuners.tuners_utils import BaseTuner

        import trimtab
        from trimtab.integrations.peft_layer_adapter import PeftAdapter

        inject, compute = BaseTuner.inject_adapter, PeftAdapter.compute

        def sped_up(tuner: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            done = inject(tuner, model, *args, **kwargs)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    trimtab.speed_up(model)
            except trimtab.SurgeryError:  # no layer takes it
                pass
            return done

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return compute(*args, **kwargs)

        BaseTuner.inject_adapter = sped_up
        PeftAdapter.compute = counted  # type: ignore[method-assign]

    def pytest_collection_modifyitems(self, items: list[Any], config: Any) -> None:
        chosen = [item for item in items if is_lora(item)]
        config.hook.pytest_deselected(items=[item for item in items if not is_lora(item)])
        items[:] = chosen

    def pytest_runtest_setup(self) -> None:
        self.before = self.calls

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            line = [report.nodeid, report.outcome, self.calls - self.before, (report.longreprtext or "")[-2000:]]
            with self.outcomes.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def ask_no_more_than_once() -> None:
    """Let the hub's client give up at the first failure, where it would try for a minute."""
    from huggingface_hub.utils import _http

    ask = _http._http_backoff_base

    def once(*args: Any, **kwargs: Any) -> Any:
        return ask(*args, **{**kwargs, "max_retries": 0})

    _http._http_backoff_base = once


def is_lora(item: Any) -> bool:
    """Whether a test is one of LoRA or DoRA, as its parameters say, or else its name."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    kinds = {getattr(value, "__name__", "") for value in params.values() if isinstance(value, type)}
    configs = {name for name in kinds if name.endswith("Config")}
    if configs:
        return configs == {"LoraConfig"}
    return "lora" in item.nodeid.lower() or "dora" in item.nodeid.lower()


def pytest_configure(config: Any) -> None:
    if OUTCOMES in os.environ and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Plugin(SPED_UP in os.environ, Path(os.environ[OUTCOMES])))


# The program ---------------------------------------------------------------------------------------------------------


def run(tests: Path, files: list[str], sped_up: bool) -> dict[str, tuple[str, int, str]]:
    """How each test ended: its name -> outcome, calls of our kernels, and what it said if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes, package = Path(folder) / "outcomes.jsonl", Path(folder) / "tests"
        # They import each other as one package, which the distribution leaves without its __init__.py.
        package.mkdir()
        (package / "__init__.py").touch()
        for file in tests.glob("*.py"):
            (package / file.name).symlink_to(file)
        path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "HF_ENDPOINT": NOWHERE, OUTCOMES: str(outcomes)}
        environment |= {SPED_UP: "1"} if sped_up else {}
        options = ["-q", "--no-header", "-p", HERE.stem, "-p", "no:cacheprovider", "-o", "addopts=", "--tb=short"]
        options += ["--continue-on-collection-errors", "-o", "timeout=300"]
        command = [sys.executable, "-m", "pytest", *options, *files]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if not outcomes.exists():
            sys.exit(f"pytest ran no test:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        print(done.stdout.strip().splitlines()[-1], flush=True)
        lines = [json.loads(line) for line in outcomes.read_text("utf-8").splitlines()]
    return {name: (outcome, calls, text) for name, outcome, calls, text in lines}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", type=Path, help="the folder tests of PEFT's source distribution")
    parser.add_argument("--files", nargs="+", help="only these files of it")
    parser.add_argument("--json", type=Path, help="write how each test ended, both ways")
    given = parser.parse_args()
    tests = given.tests.resolve()
    found = sorted(tests.glob("test_*.py"))
    names = given.files or [one.name for one in found if not any(word in one.stem for word in LEFT_OUT)]
    files = [f"tests/{name}" for name in names]
    plain, quick = run(tests, files, False), run(tests, files, True)
    if given.json:
        given.json.write_text(json.dumps({"plain": plain, "sped up": quick}, indent=1), "utf-8")
    passed = [name for name, (outcome, _, _) in plain.items() if outcome == "passed"]
    broken = [name for name in passed if name not in quick or quick[name][0] != "passed"]
    for name in broken:
        print(f"broken {name}\n{quick.get(name, ('', 0, 'did not run'))[2]}")
    ours = sum(quick[name][1] > 0 for name in passed if name in quick)
    print(f"as they are: {dict(Counter(outcome for outcome, _, _ in plain.values()))}")
    print(f"sped up:     {dict(Counter(outcome for outcome, _, _ in quick.values()))}")
    print(f"{len(passed) - len(broken)} of {len(passed)} tests that pass as they are pass sped up, ", end="")
    print(f"in {ours} of them with our kernels")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
