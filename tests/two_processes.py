"""Two processes on this machine, started once by torchrun's own agent and given one piece of work after the other, and
what each of them says.
"""

from __future__ import annotations

import json
import os
import signal
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing

from run_fixtures import make_bare
from tiny_runs import Kept

Work = Callable[[int], Any]
"""Given the number of the process; gives what its test looks at, as plain values."""


def both(works: Mapping[str, Work], root: Path, seconds: float = 900.0) -> dict[str, list[Any]]:
    """What each of two processes gives for each of ``works``, which are functions of modules that can be imported (or
    ``partial`` ones). An error is given as its type, its words and its code."""
    started = torch.multiprocessing.start_processes(
        _launch, (str(root), dict(works)), nprocs=1, join=False, start_method="fork"
    )
    until = time.monotonic() + seconds
    try:
        while not started.join(1.0):
            assert time.monotonic() < until, "the two processes have not come to their end"
    finally:
        for process in started.processes:
            if process.is_alive():
                process.kill()
    said = [json.loads((root / f"said-{rank}.json").read_text("utf-8")) for rank in range(2)]
    return {name: [one[name] for one in said] for name in works}


def _launch(_: int, root: str, works: Mapping[str, Work]) -> None:
    """Do what ``torchrun --standalone --nproc-per-node 2`` does; but all processes are forks of the tests' own, so that
    what takes long to import is imported once."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    torch.set_num_threads(1)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
    )
    elastic_launch(config, _process)(root, works)


def _process(root: str, works: Mapping[str, Work]) -> None:
    rank = int(os.environ["RANK"])
    os.environ["TRIMTAB_CACHE"] = f"{root}/cache"
    said = {}
    for name, work in works.items():
        try:
            said[name] = work(rank)
        except BaseException as error:
            said[name] = {"error": type(error).__name__, "said": str(error), "code": getattr(error, "code", None)}
    (Path(root) / f"said-{rank}.json").write_text(json.dumps(said), "utf-8")


def train(
    rank: int,
    *,
    yaml: str,
    resume: bool = False,
    told_to_end: int | None = None,
    fails: int | None = None,
    launcher: Mapping[str, str] = {},
) -> Any:
    """Train the run of ``yaml``; gives what the user is told.

    Args:
        told_to_end: the step after which the second process gets a SIGTERM.
        fails: the process that finds no memory for the model.
        launcher: what the launcher puts into the environment besides.
    """
    from trimtab.config.read import load_config
    from trimtab.errors import ModelError
    from trimtab.training import run, work

    make_bare(pytest.MonkeyPatch())  # for good: this process does nothing else
    listener = Kept()
    before = work.load_model, work.Listener
    if rank == 1 and told_to_end is not None:
        work.Listener = _told_to_end_at(told_to_end)  # type: ignore[misc]
    if rank == fails:

        def refuse(*_: Any) -> Any:
            raise ModelError("no room for the model")

        work.load_model = refuse
    os.environ.update(launcher)
    try:
        run.finetune(load_config(Path(yaml)), resume=resume, listener=listener)
    finally:
        work.load_model, work.Listener = before  # type: ignore[misc]
        for name in launcher:
            del os.environ[name]
    return [*listener.notes, *listener.remarks]


def _told_to_end_at(at: int) -> Any:
    class Told(Kept):
        def step(self, step: int, steps: int) -> None:
            if step == at:
                signal.raise_signal(signal.SIGTERM)

    return Told


def library(rank: int, *, root: str, how: str) -> Any:
    """Train an adapted model in two processes by a loop of one's own, save it, read it, load it again and merge it;
    gives the largest difference of each to a model in one process.

    ``how``: by ``ddp``; by ``fsdp``, which comes after the adapters, or ``late``, before them; or ``tp``, which is
    refused.
    """
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    import trimtab

    dist.init_process_group("gloo", init_method=f"file://{root}/{how}", rank=rank, world_size=2)
    try:
        if how == "tp":
            plain = nn.ModuleDict({"lower": nn.Linear(12, 16)})
            parallelize_module(plain, init_device_mesh("cpu", (2,)), {"lower": ColwiseParallel()})
            trimtab.attach(plain, trimtab.Plan([trimtab.Rule(match="*", method="lora", rank=2)]))
        alone, shared = _adapt(_bare()), _bare()
        net: nn.Module = shared
        if how != "late":
            _adapt(shared)
        if how == "ddp":
            net = nn.parallel.DistributedDataParallel(shared)
        else:
            mesh = init_device_mesh("cpu", (2,))
            for block in shared:
                fully_shard(block, mesh=mesh)
            fully_shard(shared, mesh=mesh)
        rows = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(1))
        most = _MostAtOnce()
        if how == "late":
            net(rows[0]).sum().backward()  # what is trained is settled for FSDP2, and has to be settled anew
            net.zero_grad()
            with most:
                _adapt(shared, seed=rank)  # the second process draws other values, and takes those of the first
        losses = _steps(alone, rows), _steps(net, rows[:, 2 * rank : 2 * rank + 2])
        summed = torch.tensor(losses[1])
        dist.all_reduce(summed)
        found = {"loss": float((summed / 2 - torch.tensor(losses[0])).abs().max())}
        weights = {name: trimtab.effective_weight(alone, name) for name in ("0.0", "1.0")}
        found["weight"] = _apart({name: trimtab.effective_weight(net, name) for name in weights}, weights)
        folder = f"{root}/{how}-{rank if how == 'ddp' else 'all'}"
        trimtab.save_adapter(net, folder)
        for one in (shared, again := _adapt(_bare())):  # onto what is sharded, and onto a model in one process
            trimtab.load_adapter(one, folder)
        found["saved"] = _apart(trimtab.trainable_parameters(again), trimtab.trainable_parameters(alone))
        with torch.no_grad():
            expected = alone(rows[0])
            found["loaded"] = float((net(rows[0]) - expected).abs().max())
            if how == "late":
                trimtab.load_adapter(net, folder, name="once more")
                found["beside"] = float((net(rows[0]) - expected).abs().max())
            with most:
                trimtab.merge(shared)
            found["merged"] = float((net(rows[0]) - expected).abs().max())
        if how == "late":
            found["frozen"] = float(sum(one.requires_grad for one in net.parameters()) != 4)
            found["at once"] = float(most.found > 1)
        return found
    finally:
        dist.destroy_process_group()


class _MostAtOnce:
    """Counts how many spread tensors are whole at once, at most, while it is open; blocks in one piece are far too
    many."""

    def __init__(self) -> None:
        self.found = 0

    def __enter__(self) -> None:
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.tensor import DTensor

        alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self._before = DTensor.full_tensor, FSDPModule.unshard

        def full_tensor(tensor: Any) -> Any:
            gathered = self._before[0](tensor)
            alive.add(gathered.untyped_storage())
            self.found = max(self.found, sum(gathered.numel() > 12 for _ in alive))
            return gathered

        def unshard(*_: Any, **__: Any) -> Any:
            self.found = 100

        DTensor.full_tensor, FSDPModule.unshard = full_tensor, unshard

    def __exit__(self, *_: Any) -> None:
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.tensor import DTensor

        DTensor.full_tensor, FSDPModule.unshard = self._before


def _bare() -> Any:
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(2)))


def _adapt(model: Any, seed: int = 0) -> Any:
    """Two adapters for two blocks, one of which is active: DoRA with a MoRA beside it."""
    import trimtab

    torch.manual_seed(seed)
    for name, method in (("other", "lora"), ("default", "dora")):
        plan = [trimtab.Rule(match="*", method=method, rank=2), trimtab.Rule(match="1.0", method="mora", rank=2)]
        trimtab.attach(model, trimtab.Plan(plan), name=name)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trimtab.trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _steps(net: Any, rows: torch.Tensor) -> list[float]:
    """The losses of a step for each of ``rows``."""
    optimizer = torch.optim.SGD([one for one in net.parameters() if one.requires_grad], lr=0.1)
    losses = []
    for batch in rows:
        loss = net(batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def _apart(some: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> float:
    return max(float((tensor - others[name]).detach().abs().max()) for name, tensor in some.items())
