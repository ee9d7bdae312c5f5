"""The command line as launchers start it: `torchrun` and `accelerate launch`, each with two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trimtab.config.read import load_config
from trimtab.files import read_json
from trimtab.training.run import finetune
from two_runs import yaml_of

pytestmark = [pytest.mark.full, pytest.mark.timeout(1200), pytest.mark.usefixtures("bare_runs")]

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": [
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    ],
}


def launched(launcher: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "trimtab", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1000, check=False)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launch_trains_one_run(launcher: str, root: Path) -> None:
    done = launched(launcher, "finetune", yaml_of(root, "heads", launcher))
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert done.stdout.count("2 processes, each with the whole model: 2 of 4 rows of a batch each") == 1, said
    assert "Traceback" not in said
    summary = read_json(root / launcher / "summary.json")
    assert (summary["status"], summary["processes"]) == ("finished", 2)
    finetune(load_config(yaml_of(root, "heads", f"{launcher}-alone")))
    one, two = (
        load_file(next((root / name / "adapter").glob("*.safetensors"))) for name in (launcher, f"{launcher}-alone")
    )
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("verb", "more"), [("merge", ["out"]), ("evaluate", []), ("serve", [])])
def test_a_launch_of_what_is_for_one_process_is_refused_once(verb: str, more: list[str], root: Path) -> None:
    done = launched("torchrun", verb, root / "nowhere", *more)
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert said.count(f"trimtab {verb} is for one process, and 2 were started") == 1, said
