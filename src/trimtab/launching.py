"""How ``torchrun`` and ``accelerate launch`` start several processes, and what is done so that they are one run.

Launchers speak through the environment. Copies that would train side by side, each as if it were alone, are refused.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from trimtab.errors import EndedElsewhere, RunError
from trimtab.processes import Processes, being, here

LONGEST_WAIT = timedelta(hours=2)
"""The longest that one process waits for another, which may be reading or writing something large meanwhile."""
GRACE = 25.0
"""Seconds after another process has ended until this one is ended too, wherever it hangs."""
HELP = "start the run with `torchrun --nproc-per-node N -m trimtab finetune RUN.yaml` (see how-to, several processes)"
_COPIES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
"""What a launcher puts into the environment, from which transformers and accelerate would set up processes of their
own."""
_RUNS = itertools.count()
"""Counts the runs of this process, so that each has a place of its own in the launcher's store."""


def launched() -> int:
    """How many processes the environment speaks of; 1 for none.

    Raises RunError where copies would train side by side, each as if it were alone.
    """
    said = os.environ.get("WORLD_SIZE", "1")
    if not said.isdecimal() or int(said) < 1:
        raise RunError(f"WORLD_SIZE: expected the number of processes, got '{said}'; {HELP}")
    if int(said) == 1:
        for name in _COPIES:
            if (copies := os.environ.get(name, "1")).isdecimal() and int(copies) > 1:
                raise RunError(
                    f"{copies} copies of this command were started ({name}={copies}) that know nothing of each other, "
                    f"and would train side by side; {HELP}, or one copy"
                )
        return 1
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise RunError(
            f"WORLD_SIZE={said} speaks of {said} processes, but {' and '.join(missing)} are not set, so they cannot "
            f"find each other and would train side by side; {HELP}, or unset WORLD_SIZE"
        )
    if not (rank := os.environ["RANK"]).isdecimal() or int(rank) >= int(said):
        raise RunError(f"RANK: expected a number below WORLD_SIZE={said}, got '{rank}'; {HELP}")
    return int(said)


def speaks() -> bool:
    """Whether this process talks to the user: it is the first, or alone."""
    if here().size > 1:
        return here().leads
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def require_one(what: str) -> None:
    """Raise RunError where ``what`` was started in several processes, each of which would do all of it; one tells."""
    if (count := launched()) > 1:
        said = f"{what} is for one process, and {count} were started, each of which would do all of it"
        if not speaks():
            time.sleep(GRACE)  # a launcher ends all when one has ended, and the first has still to tell
            raise EndedElsewhere(said)
        raise RunError(f"{said}; start it without torchrun or accelerate launch")


@contextmanager
def joined() -> Iterator[Processes]:
    """Hold the processes together that the environment speaks of; a single one, where it speaks of none.

    While open, transformers and accelerate see one process with one device: what several have to do is done here.
    What is raised inside is raised in one of them, which tells it; the others raise `EndedElsewhere`.

    Raises RunError for a launch that would train copies side by side, or of a kind that is not served.
    """
    size = launched()
    if size == 1 or here().size > 1:
        yield here()
        return
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
    own = not dist.is_initialized()
    if own:
        number = next(_RUNS)
        store, rank, size = next(rendezvous("env://", rank, size, timeout=LONGEST_WAIT))
        group = Processes(rank, size, local, store=PrefixStore(f"run {number}", store))
    else:
        group = Processes(dist.get_rank(), dist.get_world_size(), local)
    over = threading.Event()
    threading.Thread(target=_watch, args=(group, over), daemon=True).start()
    kept: dict[str, str] = {}
    try:
        group.sharded = _asks_for_shards()
        device = _own_device(local_rank, local)
        if own:
            dist.init_process_group(
                f"cpu:gloo,{device}" if device else "gloo",
                store=PrefixStore(f"group {number}", store),
                rank=rank,
                world_size=size,
                timeout=LONGEST_WAIT,
            )
        kept |= {name: os.environ.pop(name) for name in [*os.environ] if name in _TOLD or _is_accelerates(name)}
        with being(group):
            yield group
            group.call(None)
    except BaseException as error:
        raised = group.ended(error)
        if raised is error:
            raise
        raise raised from None
    finally:
        over.set()
        os.environ.update(kept)
        if own and dist.is_initialized():
            with suppress(RuntimeError):
                dist.destroy_process_group()


def _watch(group: Processes, over: threading.Event) -> None:
    """End this process some time after another one has ended, if it hangs in something that waits for that."""
    while group.store is not None and not over.wait(1.0):
        ending = group.ending()
        if ending is not None and ending["rank"] != group.rank:
            if not over.wait(GRACE):
                os._exit(ending["code"] or 1)
            return


def _is_accelerates(name: str) -> bool:
    return name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_"))


def _asks_for_shards() -> bool:
    """Whether accelerate's configuration asks for FSDP2. Raises RunError for what it may ask for besides."""
    said = {name: value.lower() for name, value in os.environ.items() if _is_accelerates(name)}
    instead = "use train.sharding: full, which is FSDP2, or plain data parallelism"
    if said.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise RunError(f"accelerate's configuration asks for DeepSpeed, which trimtab finetune does not use; {instead}")
    if any(
        value not in ("", "1") for name, value in said.items() if name.endswith(("_TP_SIZE", "_CP_SIZE", "_SP_SIZE"))
    ):
        raise RunError(f"accelerate's configuration asks for tensor or context parallelism; {instead}")
    if said.get("ACCELERATE_USE_FSDP") != "true":
        return False
    if said.get("FSDP_VERSION", "1") != "2":
        raise RunError("accelerate's configuration asks for the older FSDP; set fsdp_version: 2, or " + instead)
    return True


def _own_device(local_rank: int, local: int) -> str | None:
    """Leave this process one accelerator to see; gives what its processes talk through, None on processors."""
    import torch

    if not torch.cuda.is_available():
        return None
    count = torch.cuda.device_count()
    if count < local:
        raise RunError(
            f"{local} processes on a machine with {count} GPU{'s' * (count != 1)}: start as many as there are, or set "
            "CUDA_VISIBLE_DEVICES= (nothing) to train on the processor"
        )
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not torch.cuda.is_initialized():
        names = [name for name in seen.split(",") if name] or [str(number) for number in range(count)]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[local_rank]
    return "cuda:nccl"
