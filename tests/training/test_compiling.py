"""Compiled blocks: the same numbers, only where it pays, and never the end of a run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from transformers import TrainerControl, TrainerState, TrainingArguments

import trimtab
from tiny_runs import Kept, tiny_model
from trimtab.config.read import load_config
from trimtab.ops.cost import counted
from trimtab.training import compiling
from trimtab.training.compiling import Compiling, blocks_of, pays
from trimtab.training.metrics_log import Lap, Throughput
from trimtab.training.run import finetune

# Few layers, so that there is less to trace.
FEW = ["*.q_proj", "*.down_proj"]
pytestmark = pytest.mark.usefixtures("bare_runs")


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
    listener, throughput, now = Kept(), Throughput(), (TrainingArguments(), TrainerState(), TrainerControl())
    callback = Compiling(model, True, listener, throughput)
    callback.on_train_begin(*now)
    for _ in range(compiling.WARM_UP + compiling.TIMED):
        throughput.add(50)
        now[1].global_step += 1
        callback.on_step_end(*now)
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


@pytest.mark.full
@pytest.mark.parametrize("worth", [True, pytest.param(False, marks=pytest.mark.full)])
def test_auto_waits_a_few_steps_and_then_compiles_where_it_pays(
    make_yaml: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, worth: bool
) -> None:
    asked = []

    def decide(seconds_per_step: float, steps_left: int) -> bool:
        asked.append((seconds_per_step, steps_left))
        return worth

    monkeypatch.setattr(compiling, "pays", decide)
    listener = run(make_yaml, "auto", steps=7, compile="auto")
    assert [left for _, left in asked] == [1]
    assert 0 < asked[0][0] < 60
    assert any("compiling the blocks" in note for note in listener.notes) is worth


@pytest.mark.full
@pytest.mark.parametrize("faster", [True, False])
def test_auto_goes_back_to_plain_blocks_where_compiled_ones_are_no_faster(
    make_yaml: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, faster: bool
) -> None:
    monkeypatch.setattr(compiling, "pays", lambda *_: True)
    monkeypatch.setattr(compiling, "SETTLING", 2)
    monkeypatch.setattr(compiling, "COMPARED", 2)
    plain = []

    class Paced(Lap):
        """What was counted, at 100 tokens a second at first and at another throughput after that."""

        def read(self) -> tuple[int, float]:
            tokens, _ = super().read()
            plain.append(tokens)
            return tokens, tokens / (100 if len(plain) <= 2 else 110 if faster else 90)

    monkeypatch.setattr(compiling, "Lap", Paced)
    listener = run(make_yaml, "auto", steps=12, compile="auto")
    assert all(tokens > 0 for tokens in plain)
    assert len(plain) == 4
    said = [note for note in listener.notes if "no faster" in note]
    assert said == (
        [] if faster else ["compiled blocks are no faster here (90 tokens/s, plain ones 100): going on with plain ones"]
    )
    assert len(listener.column("loss")) == 12


def test_a_run_pays_if_it_is_long_enough() -> None:
    steps = compiling.COMPILE_SECONDS / compiling.GAIN
    assert pays(1.0, int(1.1 * steps))
    assert not pays(1.0, int(0.9 * steps))
    assert not pays(0.5, int(1.1 * steps))


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
