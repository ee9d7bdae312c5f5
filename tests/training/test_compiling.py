"""Compiled blocks: the same numbers, only where it pays, and never the end of a run."""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import trimtab
from stopped_runs import interrupt, signals_are_heard
from tiny_runs import Kept, tiny_model
from trimtab.config.read import load_config
from trimtab.config.run import TrainConfig
from trimtab.ops.cost import counted
from trimtab.runs.events import Listener
from trimtab.surgery.attach_report import AttachReport, ModuleReport
from trimtab.training import compiling, work
from trimtab.training.compiling import Compiling, blocks_of, choose
from trimtab.training.run import finetune

# Few layers, so that there is less to trace.
FEW = ["*.q_proj", "*.down_proj"]
pytestmark = pytest.mark.usefixtures("bare_runs")
__all__ = ["signals_are_heard"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces and differentiates as the compiler does, and leaves out the C++ compiler's minute."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    torch._dynamo.reset()


def run(make_yaml: Callable[..., Path], name: str, steps: int = 8, **train: Any) -> Kept:
    listener = Kept()
    plan = [{"match": FEW, "method": "dora", "rank": 4, "alpha": 8}]
    file = make_yaml(name, train={"max_steps": steps, "epochs": 10, **train}, data={"validation": 0.25}, plan=plan)
    finetune(load_config(file), listener=listener)
    return listener


@pytest.mark.full
def test_compiled_blocks_train_to_the_same_numbers(make_yaml: Callable[..., Path]) -> None:
    plain = run(make_yaml, "plain", compile=False)
    compiled = run(make_yaml, "compiled", compile=True)
    assert not any("compiling" in note for note in plain.notes)
    assert any("compiling the blocks" in note for note in compiled.notes)
    # float32; the ratio is applied in another order where the compiler looks on.
    assert compiled.column("loss") == pytest.approx(plain.column("loss"), rel=1e-4)
    assert compiled.column("loss", "validation") == pytest.approx(plain.column("loss", "validation"), rel=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("method", ["dora", "lora", "mora"])
def test_blocks_are_compiled_once_for_batches_of_all_sizes(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(compiling, "BACKEND", counting)
    model = tiny_model()
    trimtab.attach(model, trimtab.Rule(match=FEW, method=method, rank=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    plain = copy.deepcopy(model)
    listener, now = Kept(), (TrainingArguments(), TrainerState(), TrainerControl())
    callback = Compiling(model, 50, listener)
    callback.on_train_begin(*now)
    for rows, tokens in [(4, 10), (4, 13), (3, 40), (2, 7), (5, 64)]:
        ids = torch.randint(0, 50, (rows, tokens))
        for one in (model, plain):
            one.zero_grad()
            one(input_ids=ids).logits.square().mean().backward()
        for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            if theirs.grad is not None:
                assert torch.allclose(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6), name
    assert callback.compiled, listener.notes
    assert len(graphs) == 2  # the first block, whose input wants no gradient, and the others
    callback.on_train_end(*now)
    assert counted(7) == 7


@pytest.mark.full
def test_what_cannot_be_compiled_runs_as_it_is(make_yaml: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler on this machine")

    plain = run(make_yaml, "plain", compile=False)
    monkeypatch.setattr(compiling, "BACKEND", broken)
    before = {name: getattr(torch._dynamo.config, name) for name in compiling.SETTINGS}
    compiled = run(make_yaml, "broken", compile=True)
    assert compiled.column("loss") == plain.column("loss")
    said = [note for note in compiled.notes if "cannot be compiled" in note]
    assert len(said) == 1
    assert "no compiler on this machine" in said[0]
    assert {name: getattr(torch._dynamo.config, name) for name in compiling.SETTINGS} == before


def decided(*, tokens: int = 60, rows: int = 1000, attention: str = "auto", methods: str = "dora", **said: Any) -> Any:
    """What is decided for rows of ``tokens`` each, on 28 blocks' worth of 100 million weights and two cores."""
    task, place = said.pop("task", "causal_lm"), said.pop("device", "cpu")
    train = {"epochs": 1.0, "batch_size": 8, **said}
    config = SimpleNamespace(train=TrainConfig(**train), model=SimpleNamespace(attention=attention))
    modules = [ModuleReport(name, name, 1, 10_000, 10_000 // 2, 0, 0) for name in (methods.split() * 2)[:2]]
    attached = AttachReport(tuple(modules), (), 0, 0, {"output head": 10**12, "ScaledEmbedding": 10**12})
    job = SimpleNamespace(config=config, task=task, device=torch.device(place))
    inputs = SimpleNamespace(rows=SimpleNamespace(lengths=[tokens] * rows))
    return choose(job, inputs, attached)  # type: ignore[arg-type]


LONG = {"rows": 20_000}


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sys, "platform", "linux")


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize(
    ("compiles", "run"),
    [
        # 4 x 100 million x 60 tokens a row, on two cores: 1.2e10 a row. 3 x 0.65e14 are 16,250 rows; eager, 4,250.
        (False, {"rows": 16_200}),
        (True, {"rows": 16_300}),
        (False, {"rows": 4_200, "attention": "eager"}),
        (True, {"rows": 4_300, "attention": "eager"}),
        (True, {"rows": 8_200, "epochs": 2.0}),
        (True, {"rows": 4_100, "tokens": 240, "epochs": 1.0}),
        (False, {**LONG, "max_steps": 2_000}),
        (True, {**LONG, "max_steps": 2_100}),
        (True, {**LONG, "max_steps": 1_050, "gradient_accumulation": 2}),
        (True, {**LONG, "methods": "lora dora"}),
        (False, {**LONG, "methods": "lora mora"}),
        (False, {**LONG, "methods": "dora serial"}),
        (False, {**LONG, "task": "seq2seq"}),
        (False, {**LONG, "gradient_checkpointing": True}),
        (False, {**LONG, "padding_free": True}),
        (False, {**LONG, "compile": False}),
        (True, {"rows": 1, "compile": True}),
        (False, {**LONG, "epochs": 0.0}),
    ],
)
def test_what_auto_decides(compiles: bool, run: dict[str, Any]) -> None:
    assert decided(**run).compiles is compiles, decided(**run).why


@pytest.mark.usefixtures("two_cores")
def test_the_decision_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    long = decided(**LONG)
    assert long.tokens == 480
    assert "2,500 steps of 480 tokens" in long.why
    assert "3.7 times" in long.why
    assert "0.2 times, of 3" in decided().why
    assert not decided().pays
    assert "trains serial" in decided(**LONG, methods="dora serial").why
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        without = decided(**LONG)
        assert (without.compiles, without.pays) == (False, True)
        assert "no C++ compiler (g++)" in without.why
    assert "this is cuda" in decided(**LONG, device="cuda").why


def test_a_resumed_run_decides_what_it_decided_at_first(
    make_yaml: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    class Noted(TrainerCallback):
        def __init__(self, model: nn.Module, tokens: int, listener: Listener) -> None:
            made.append(tokens)

    monkeypatch.setattr(work, "Compiling", Noted)
    config = load_config(make_yaml("long", train={"max_steps": 4, "save_every": 2}))
    steps = {"eager": 1.0, "other": 1.0}  # any run is long enough
    monkeypatch.setattr(compiling, "WORK", steps)
    interrupt(config, step=3)
    finetune(config, resume=True)
    assert len(made) == 2
    assert made[0] == made[1] > 0


def test_blocks_are_the_repeated_ones_that_hold_adapters() -> None:
    model = tiny_model()
    assert blocks_of(model) == []
    trimtab.attach(model, trimtab.Rule(match="*.q_proj", layers="0", method="lora", rank=2))
    assert blocks_of(model) == list(model.model.layers)
    trimtab.detach(model)
    trimtab.attach(model, trimtab.Rule(match="model.layers.*", layers="0", method="serial", bottleneck=2))
    assert blocks_of(model) == list(model.model.layers), "an adapter around one of them does not hide the others"
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    trimtab.attach(plain, trimtab.Rule(match="0", method="lora", rank=2))
    assert blocks_of(plain) == []
