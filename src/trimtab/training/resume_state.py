"""What training goes on from: a checkpoint's optimiser, schedule, generators and counts, looked at before any library
takes them.

torch trusts the shapes in an optimiser's file (others end the process), and transformers trains on without a word
where a file is missing. Nothing in these files is ever unpickled into more than tensors and plain values.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import safe_globals

from trimtab.adapters.placing import read_adapter
from trimtab.config.run import TrainConfig
from trimtab.errors import AdapterError
from trimtab.runs.checkpoints import STATE, UNLOGGED, best_folder, damage, numbered, prune, set_aside, step_of
from trimtab.surgery.attach import trainable_parameters
from trimtab.training.callbacks import AVERAGE_FILE
from trimtab.training.optimizer import make_optimizer

_OPTIMIZER, _SCHEDULER, _GENERATORS = "optimizer.pt", "scheduler.pt", "rng_state.pth"
_LARGEST_STATE = 16 * 1024**2  # bytes of trainer_state.json, which has a few hundred


class DamageError(Exception):
    """A file of a checkpoint is not what it should be; the message names it."""


def newest_whole(
    folder: Path,
    model: nn.Module,
    train: TrainConfig,
    *,
    rows: int,
    validates: bool,
    tell: Callable[[str], None],
) -> Path | None:
    """The newest checkpoint in ``folder`` that ``model`` can be trained on from; None if there is none. Those after it
    are told and put aside, and those that ``train`` does not keep beside it are removed.

    Args:
        rows: how many training rows there are; ``validates``: whether there are validation rows.
        tell: is given a sentence for each checkpoint that is damaged.
    """
    keep, steps = train.keep_checkpoints, train.total_steps(rows)
    optimizer, trained = make_optimizer(model, train), trainable_parameters(model)
    for step, place in reversed(numbered(folder)):
        averages = train.average is not None and step > round((1 - train.average) * steps)
        reason = why_not(
            place,
            optimizer=optimizer,
            averaged=trained if averages else {},
            patience=train.early_stopping,
            keeps_best=validates and train.keep_best,
            leaves_out=train.precision == "float16",
        )
        if reason is None:
            prune(folder, keep)
            return place
        kept = set_aside(place).name
        tell(f"{place.name} is damaged ({reason}): it is kept as {kept}, and the one before it is taken")
    prune(folder, keep)
    return None


def why_not(
    checkpoint: Path,
    *,
    optimizer: torch.optim.Optimizer,
    averaged: Mapping[str, nn.Parameter],
    patience: int | None,
    keeps_best: bool,
    leaves_out: bool = False,
) -> str | None:
    """Why training cannot go on from ``checkpoint``; None if it can.

    Args:
        optimizer: as training makes it, without a state.
        averaged: the trained tensors, if there has to be a mean of them by this step; empty if there has not.
        patience: of early stopping.
        keeps_best: whether the adapter of the best validation is needed at the end.
        leaves_out: whether steps may have been left out, which neither the optimiser nor the schedule counts then.
    """
    step = step_of(checkpoint)
    if (reason := damage(checkpoint, (STATE, _OPTIMIZER, _SCHEDULER, _GENERATORS))) is not None:
        return reason
    try:
        best = _check_counts(checkpoint / STATE, step, patience)
        _check_optimizer(_load(checkpoint / _OPTIMIZER), optimizer, step, leaves_out=leaves_out)
        _check_schedule(_load(checkpoint / _SCHEDULER), optimizer, step, leaves_out=leaves_out)
        _check_generators(_load(checkpoint / _GENERATORS))
        if averaged:
            _check_average(checkpoint / AVERAGE_FILE, averaged)
        if (checkpoint / UNLOGGED).is_file():  # an earlier version has none
            _check_unlogged(checkpoint / UNLOGGED, step)
        read_adapter(checkpoint)
        if keeps_best and best is not None:
            read_adapter(best_folder(checkpoint.parent, best))
    except (DamageError, AdapterError) as error:
        return str(error)
    return None


def _load(file: Path) -> Any:
    """What ``torch.save`` wrote: tensors and plain values. Any other kind of archive is refused unopened."""
    try:
        with zipfile.ZipFile(file) as archive:
            packed = [entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
            if packed or sum(entry.file_size for entry in archive.infolist()) > file.stat().st_size:
                raise DamageError(f"{file.name} is not an archive as torch writes it")
        with safe_globals():
            return torch.load(file, map_location="cpu", weights_only=True)
    except DamageError:
        raise
    except Exception as error:  # torch has no one kind of error for a file that it cannot read
        raise DamageError(f"{file.name} cannot be read ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def _expect(holds: bool, file: str, what: str) -> None:
    if not holds:
        raise DamageError(f"{file} is damaged: {what}")


def _is_plain(value: Any, like: Any) -> bool:
    """Whether ``value`` is of the kind of ``like``: a number for a number, a list of as many for a list."""
    if isinstance(like, bool) or like is None or isinstance(like, str):
        return type(value) is type(like)
    if isinstance(like, int):
        return type(value) is int
    if isinstance(like, float):
        return type(value) in (int, float) and math.isfinite(value)
    if isinstance(like, list | tuple):
        return (
            isinstance(value, list | tuple)
            and len(value) == len(like)
            and all(_is_plain(one, other) for one, other in zip(value, like, strict=True))
        )
    return isinstance(like, dict) and isinstance(value, dict) and value.keys() == like.keys()


def _check_optimizer(found: Any, optimizer: torch.optim.Optimizer, step: int, *, leaves_out: bool) -> None:
    expected = optimizer.state_dict()
    _expect(isinstance(found, dict) and found.keys() == expected.keys(), _OPTIMIZER, "it holds no optimiser's state")
    groups, state = found["param_groups"], found["state"]
    same = isinstance(groups, list) and len(groups) == len(expected["param_groups"])
    _expect(same, _OPTIMIZER, "it is of another number of groups")
    for mine, group in zip(groups, expected["param_groups"], strict=True):
        # A scheduler has put its own beginning into a group; the rate itself is what changes.
        extra = {"initial_lr": group["lr"]}
        known = isinstance(mine, dict) and mine.keys() | extra.keys() == group.keys() | extra.keys()
        _expect(known, _OPTIMIZER, "a group has other settings")
        for key, value in {**group, **extra}.items():
            said = mine.get(key, value)
            same = _is_plain(said, 0.0) and said >= 0 if key == "lr" else _same(said, value)
            _expect(same, _OPTIMIZER, f"'{key}' of a group is another")
    trained = dict(enumerate(tensor for group in optimizer.param_groups for tensor in group["params"]))
    _expect(isinstance(state, dict) and state.keys() <= trained.keys(), _OPTIMIZER, "it is of other tensors")
    _expect(bool(state) or leaves_out or not trained, _OPTIMIZER, "its moments are missing")
    for number, moments in state.items():
        _expect(
            isinstance(moments, dict) and moments.keys() == {"step", "exp_avg", "exp_avg_sq"},
            _OPTIMIZER,
            f"the moments of tensor {number} are not there",
        )
        for key, tensor in moments.items():
            like = torch.empty((), device="meta") if key == "step" else trained[number]
            _expect(_is_like(tensor, like), _OPTIMIZER, f"'{key}' of tensor {number} is of another shape or kind")
            _expect(bool(tensor.isfinite().all()), _OPTIMIZER, f"'{key}' of tensor {number} is not a number")
        first = 0 if leaves_out else 1
        _expect(first <= float(moments["step"]) <= step, _OPTIMIZER, f"tensor {number} is of another step")
        _expect(bool((moments["exp_avg_sq"] >= 0).all()), _OPTIMIZER, f"a square of tensor {number} is negative")


def _same(found: Any, expected: Any) -> bool:
    """Whether two plain values are equal, whether in a list or a tuple."""
    if isinstance(expected, list | tuple):
        return isinstance(found, list | tuple) and list(found) == list(expected)
    return not isinstance(found, Tensor) and bool(found == expected)


def _is_like(tensor: Any, other: Tensor) -> bool:
    """Whether ``tensor`` is an ordinary one, of the shape of ``other`` and laid out in memory as what torch makes like
    that."""
    return (
        type(tensor) is Tensor
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and tensor.is_floating_point()
        and tensor.shape == other.shape
        and tensor.stride() == torch.empty_like(other, device="meta").stride()
    )


def _check_schedule(found: Any, optimizer: torch.optim.Optimizer, step: int, *, leaves_out: bool) -> None:
    like = torch.optim.lr_scheduler.LambdaLR(_copy(optimizer), lambda _: 1.0).state_dict()
    _expect(isinstance(found, dict) and found.keys() == like.keys(), _SCHEDULER, "it holds no schedule's state")
    for key in like.keys() - {"lr_lambdas"}:
        _expect(_is_plain(found[key], like[key]), _SCHEDULER, f"'{key}' is {type(found[key]).__name__}")
    _expect(_same(found["base_lrs"], like["base_lrs"]), _SCHEDULER, "it is of other learning rates")
    first = 0 if leaves_out else step
    _expect(first <= found["last_epoch"] <= step, _SCHEDULER, f"it is of step {found['last_epoch']}")
    lambdas = found["lr_lambdas"]
    _expect(isinstance(lambdas, list) and not any(lambdas), _SCHEDULER, "'lr_lambdas' is not empty")


def _copy(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Another optimiser of the same groups, which a schedule may change."""
    return torch.optim.SGD([{"params": group["params"], "lr": group["lr"]} for group in optimizer.param_groups])


def _check_generators(found: Any) -> None:
    """Each state is tried on a generator of its own."""
    _expect(isinstance(found, dict), _GENERATORS, "it holds no generators' states")
    takers: dict[str, Callable[[Any], object]] = {
        "python": random.Random().setstate,
        "numpy": np.random.RandomState().set_state,
        "cpu": torch.Generator().set_state,
    }
    if torch.cuda.is_available() and "cuda" in found:
        takers["cuda"] = torch.Generator("cuda").set_state
    for name, take in takers.items():
        _expect(name in found, _GENERATORS, f"the state of '{name}' is missing")
        try:
            take(found[name])
        except Exception as error:
            raise DamageError(f"{_GENERATORS} is damaged: '{name}' ({_first_line(error)})") from None


def _check_average(file: Path, averaged: Mapping[str, nn.Parameter]) -> None:
    try:
        with safe_open(file, framework="pt") as stored:
            _expect(set(stored.keys()) == set(averaged), file.name, "it is of other tensors")
            count = (stored.metadata() or {}).get("count", "")
            _expect(count.isdecimal() and 0 < len(count) < 10, file.name, "it has no count")
            for name, parameter in averaged.items():
                tensor = stored.get_tensor(name)
                _expect(_is_like(tensor, parameter), file.name, f"{name} is of another shape")
                _expect(bool(tensor.isfinite().all()), file.name, f"{name} is not a number")
    except (OSError, SafetensorError) as error:
        raise DamageError(f"{file.name} cannot be read ({_first_line(error)})") from None


def _check_unlogged(file: Path, step: int) -> None:
    found = _small_json(file)
    _expect(_is_plain(found, {"loss": 0.0, "steps": 0}), file.name, "it holds no losses")
    _expect(_is_plain(found["loss"], 0.0) and type(found["steps"]) is int, file.name, "they are no numbers")
    _expect(0 <= found["steps"] <= step, file.name, f"it is of {found['steps']} steps")


def _small_json(file: Path) -> Any:
    try:
        if file.stat().st_size > _LARGEST_STATE:
            raise DamageError(f"{file.name} is damaged: it has {file.stat().st_size:,} bytes")
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamageError(f"{file.name} cannot be read ({_first_line(error)})") from None


def _check_counts(file: Path, step: int, patience: int | None) -> int | None:
    """Look at ``trainer_state.json``; gives the step of the best validation."""
    found = _small_json(file)
    callbacks: list[ExportableState] = [TrainerControl()]
    if patience is not None:
        callbacks.append(EarlyStoppingCallback(patience))
    like = dataclasses.asdict(TrainerState(stateful_callbacks=callbacks))  # type: ignore[arg-type]
    _expect(isinstance(found, dict), file.name, "it holds no state")
    unknown, missing = sorted(found.keys() - like.keys()), sorted(like.keys() - found.keys())
    _expect(not unknown, file.name, f"unknown keys, such as {unknown[:1]}")
    _expect(not missing, file.name, f"missing keys, such as {missing[:1]}")
    numbers = {"best_metric": 0.0, "best_global_step": 0, "train_batch_size": 0, "epoch": 0.0, "total_flos": 0.0}
    texts = {"best_model_checkpoint": "", "trial_name": ""}
    for key, value in found.items():
        expected = {**numbers, **texts}.get(key, like[key])
        known = value is None if key == "trial_params" else _is_plain(value, expected)
        optional = value is None and like[key] is None
        whole = isinstance(value, list) if key == "log_history" else known or optional
        _expect(whole, file.name, f"'{key}' is {type(value).__name__}")
    _expect(found["global_step"] == step, file.name, f"it is of step {found['global_step']}")
    for name, expected in like["stateful_callbacks"].items():
        _check_callback(file.name, found["stateful_callbacks"][name], expected)
    best: int | None = found["best_global_step"]
    _expect(best is None or 0 < best <= step, file.name, f"its best step is {best}")
    return best


def _check_callback(file: str, found: Any, expected: Mapping[str, Mapping[str, Any]]) -> None:
    # transformers makes a callback of what stands here and sets attributes of any name.
    _expect(_is_plain(found, expected), file, "a callback's state is another")
    for part, values in expected.items():
        _expect(_is_plain(found[part], values), file, "a callback's state is another")
        for key, value in values.items():
            _expect(_is_plain(found[part][key], value), file, f"'{key}' of a callback is another")
