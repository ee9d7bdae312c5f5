"""The memory study: it learns, it is fair, it goes on where it stopped, and says what is wrong."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import memory_cell
from identifiers import draw_pairs, encode_pairs
from memory_bench import MemoryListener, keep_blocks, memorize
from memory_cell import train_cell
from memory_results import area, steps_to
from memory_study import CONTENDERS, Arm, MemoryStudy
from run_fixtures import model_folder, own_cache
from sampling import sample
from tiny_runs import tiny_model, tiny_tokenizer
from trimtab.config.read import validated
from trimtab.errors import ConfigError, Interrupted, ModelError, RunError
from trimtab.files import read_json
from trimtab.surgery.plan import Plan, Rule

__all__ = ["model_folder", "own_cache"]

SMALL: dict[str, Any] = {
    "precision": "float32", "blocks": 1, "pairs": 6, "digits": 3, "batch_size": 4, "steps": 4, "warmup": 1,
    "evaluate_every": 2, "budgets": (2, 4), "seeds": 2, "methods": ("full", "lora", "mora-sharing"),
    "learning_rates": (1e-3, 1e-2),
}  # fmt: skip


@pytest.fixture
def small(model_folder: Path) -> Callable[..., MemoryStudy]:
    """A study of five arms, two rates and two seeds each; keywords change it."""
    return lambda **changes: MemoryStudy(model=str(model_folder), **{**SMALL, **changes})


class Counted(MemoryListener):
    """Keeps the names of the cells that were trained and of those that were found."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.trained: list[str] = []
        self.found: list[str] = []
        self.stop_at = stop_at

    def began(self, cell: Any) -> None:
        if len(self.trained) == self.stop_at:
            raise KeyboardInterrupt

    def ended(self, cell: Any, result: Any, fresh: bool) -> None:
        (self.trained if fresh else self.found).append(str(cell))


# --- one cell


@pytest.mark.full
@pytest.mark.parametrize("name", sample(list(CONTENDERS), 3, ["mora-magnitude"]))
def test_every_method_learns_by_heart(name: str) -> None:
    contender = CONTENDERS[name]
    tokenizer = tiny_tokenizer()
    model = tiny_model(len(tokenizer))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rank = {"rank": 8} if contender.has_budget else {}
    plan = Plan([Rule(match="all-linear", method=contender.method, **contender.options, **rank)])
    study = MemoryStudy(precision="float32", pairs=4, digits=3, batch_size=4, steps=60, warmup=5, evaluate_every=30)
    points: list[Any] = []
    found = train_cell(model, tokenizer, plan, study, learning_rate=2e-2, seed=1, evaluated=points.append)
    assert found["curve"] == points
    assert [point["step"] for point in points] == [0, 30, 60]
    assert points[0]["loss"] is None
    assert points[0]["accuracy"] < 0.5
    assert points[-1]["accuracy"] == 1.0, points
    assert points[-1]["loss"] < points[1]["loss"]
    assert found["diverged"] is None
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items()), "the next cell starts where it did"


def test_same_seed_same_curve_and_same_batches_for_all() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(len(tokenizer))
    study = MemoryStudy(**{**SMALL, "learning_rates": None})
    plan = Plan([Rule(match="all-linear", method="lora", rank=2)])
    curves = [
        train_cell(model, tokenizer, plan, study, learning_rate=1e-2, seed=seed, evaluated=lambda _: None)["curve"]
        for seed in (1, 1, 2)
    ]
    assert curves[0] == curves[1] != curves[2]


def test_the_loss_is_on_the_value_alone() -> None:
    """Against the model's own loss on the same rows, computed here over the value's characters."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(len(tokenizer))
    study = MemoryStudy(pairs=6, digits=3, batch_size=6, steps=1, warmup=1, evaluate_every=1)
    plan = Plan([Rule(match="all-linear", method="lora", rank=2)])
    found = train_cell(model, tokenizer, plan, study, learning_rate=1e-2, seed=3, evaluated=lambda _: None)
    ids = encode_pairs(draw_pairs(6, 3, 3), tokenizer).input_ids
    with torch.no_grad():
        logits = model(ids).logits[:, 3:6].double()  # what comes after the colon and the value's first two
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 4:].flatten())
    assert found["curve"][1]["loss"] == pytest.approx(float(wanted), rel=1e-5)  # float32


def test_a_cell_that_diverges(monkeypatch: pytest.MonkeyPatch) -> None:
    original = memory_cell.Head.loss_at_labels
    calls: list[int] = []

    def spoiled(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return original(*args, **kwargs) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(memory_cell.Head, "loss_at_labels", spoiled)
    tokenizer = tiny_tokenizer()
    plan = Plan([Rule(match="all-linear", method="lora", rank=2)])
    study = MemoryStudy(**{**SMALL, "steps": 6, "learning_rates": None})
    found = train_cell(
        tiny_model(len(tokenizer)), tokenizer, plan, study, learning_rate=1e-2, seed=1, evaluated=lambda _: None
    )
    assert found["diverged"] == 3
    assert len(calls) == 3
    assert [(point["loss"] is None, point["step"]) for point in found["curve"]] == [
        (True, 0), (False, 2), (True, 4), (True, 6),
    ]  # fmt: skip
    assert found["curve"][-1]["accuracy"] == 0.0


def test_batches_are_one_shuffle_after_the_other() -> None:
    batches = memory_cell._batches(6, 4, seed=0)
    drawn = torch.cat([next(batches) for _ in range(6)])
    for epoch in drawn.split(6):
        assert sorted(epoch.tolist()) == list(range(6))
    again = memory_cell._batches(6, 4, seed=0)
    assert torch.equal(torch.cat([next(again) for _ in range(6)]), drawn)


# --- the study


def test_the_whole_study(small: Callable[..., MemoryStudy], tmp_path: Path) -> None:
    study, watcher = small(), Counted()
    assert [str(arm) for arm in study.arms] == [
        "full", "lora-rank2", "mora-sharing-rank2", "lora-rank4", "mora-sharing-rank4",
    ]  # fmt: skip
    found = memorize(study, tmp_path / "out", watcher)
    assert len(watcher.trained) == study.size == 5 * (2 + 2)
    assert found == read_json(tmp_path / "out" / "memorize.json")
    assert found["study"]["learning_rates"] == [1e-3, 1e-2]
    for arm, (key, said) in zip(study.arms, [(one["contender"], one) for one in found["arms"]], strict=True):
        assert (key, said["budget"]) == (arm.contender, arm.budget)
        best = max(said["candidates"], key=lambda one: one["area"])
        assert [one["learning_rate"] for one in said["candidates"]] == [1e-3, 1e-2]
        chosen = next(one for one in said["candidates"] if one["learning_rate"] == said["learning_rate"])
        assert chosen["area"] == best["area"]
        assert said["at_edge"] == ("smallest" if said["learning_rate"] == 1e-3 else "largest")
        assert said["seeds"] == [1, 2]
        assert [point["step"] for point in said["curve"]] == [0, 2, 4]
        runs = [read_json(tmp_path / f"out/cells/{cell}.json") for cell in study.curves(arm, said["learning_rate"])]
        last = [run["curve"][-1]["accuracy"] for run in runs]
        assert said["curve"][-1] == {
            "step": 4, "mean": sum(last) / 2, "lowest": min(last), "highest": max(last),
        }  # fmt: skip
        assert said["area"]["mean"] == pytest.approx(sum(area(run["curve"]) for run in runs) / 2)
        assert (said["against_reference"] is None) == (arm.contender in ("full", "lora"))
    sizes = [one["parameters"] for one in found["arms"]]
    assert sizes[2] <= sizes[1]  # tiny squares are coarse; those of real shapes are held to 1 % in test_budgets
    assert sizes[0] == 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32
    with (tmp_path / "out" / "memorize.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == study.size * 3
    assert {row["part"] for row in rows} == {"search", "curve"}
    assert {row["seed"] for row in rows if row["part"] == "search"} == {"0"}


def test_nothing_is_run_twice(small: Callable[..., MemoryStudy], tmp_path: Path) -> None:
    few = {"methods": ("full", "lora"), "budgets": (2,), "steps": 2}
    with pytest.raises(Interrupted, match=r"5 finished cells of 8 are kept in .*; the same command goes on"):
        memorize(small(**few), tmp_path / "out", Counted(stop_at=5))
    assert not (tmp_path / "out" / "memorize.json").exists()
    rest = Counted()
    whole = memorize(small(**few), tmp_path / "out", rest)
    assert (len(rest.trained), len(rest.found)) == (3, 5)
    more = Counted()
    wider = memorize(small(**few | {"seeds": 3, "methods": ("full", "lora", "dora")}), tmp_path / "out", more)
    assert len(more.trained) == 2 + (2 + 3)  # a third seed of the two old arms, and a new arm
    assert wider["arms"][0]["candidates"] == whole["arms"][0]["candidates"]
    again = Counted()
    assert memorize(small(**few), tmp_path / "out", again) == whole
    assert again.trained == []


def test_two_at_one_study_are_refused(small: Callable[..., MemoryStudy], tmp_path: Path) -> None:
    study, out = small(methods=("lora",), budgets=(2,), seeds=1, learning_rates=(1e-2,), steps=2), tmp_path / "out"
    refused = []

    class Second(MemoryListener):
        def began(self, cell: Any) -> None:
            for other in (study, small(pairs=7)):  # no cell is done: another task's could be written down otherwise
                with pytest.raises(RunError, match=r"another process .* is at work here") as caught:
                    memorize(other, out)
                refused.append(caught.value)

    memorize(study, out, Second())
    assert len(refused) == 2 * study.size
    assert read_json(out / "study.json")["pairs"] == study.pairs


def test_an_interrupted_cell_leaves_the_others(
    small: Callable[..., MemoryStudy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = memory_cell.recall, []

    def interrupted(*args: Any) -> float:
        calls.append(1)
        if len(calls) == 5:  # in the middle of the second cell
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(memory_cell, "recall", interrupted)
    with pytest.raises(Interrupted, match="1 finished cells of 20"):
        memorize(small(), tmp_path / "out")
    assert [file.name for file in (tmp_path / "out" / "cells").glob("*.json")] == ["full-lr0.001-seed0.json"]


def test_cells_of_another_task(small: Callable[..., MemoryStudy], tmp_path: Path) -> None:
    only = {"methods": ("lora",), "budgets": (2,), "seeds": 1}
    with pytest.raises(ConfigError, match="blocks: expected at most what the model has, got 3; it has 1 blocks"):
        memorize(small(blocks=3, **only), tmp_path / "out")
    memorize(small(**only), tmp_path / "out")  # nothing was made yet, so nothing is in the way
    with pytest.raises(RunError, match=r"of another task: pairs 6 there, 7 asked for\. Ask for the same"):
        memorize(small(pairs=7, **only), tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="holds something other than a memory study"):
        memorize(small(**only), tmp_path / "other")
    damaged = next((tmp_path / "out" / "cells").glob("*.json"))
    damaged.write_text("{")
    with pytest.raises(RunError, match=r"damaged file .*; remove it, and its cell is run again"):
        memorize(small(**only), tmp_path / "out")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"methods": ("lora", "mora-sharin")}, r"unknown 'mora-sharin'.*Did you mean 'mora-sharing'"),
        ({"budgets": (4, 4)}, "budgets: expected each one once, got 4, 4"),
        ({"budgets": (0,)}, "budgets: expected ranks of at least 1"),
        ({"methods": ()}, "methods: expected at least one"),
        ({"batch_size": 129}, r"batch_size: 129 is more than there are pairs \(128\)"),
        ({"learning_rates": (-1.0,)}, "learning_rates: expected numbers above 0"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"precision": "float16"}, "precision: expected 'bfloat16' or 'float32', got"),
        ({"pears": 3}, r"pears: unknown key. Did you mean 'pairs'\?"),
    ],
)
def test_settings_that_cannot_be(said: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validated(MemoryStudy, said, "study.yaml", ())


def test_errors_come_before_any_training(small: Callable[..., MemoryStudy], tmp_path: Path) -> None:
    watcher = Counted()
    with pytest.raises(Exception, match="rank 500 is larger than the matrix"):
        memorize(small(budgets=(2, 500)), tmp_path / "out", watcher)
    with pytest.raises(ModelError, match="nowhere"):
        memorize(small().model_copy(update={"model": "./nowhere"}), tmp_path / "out", watcher)
    assert watcher.trained == []


def test_every_method_tries_as_many_rates() -> None:
    study = MemoryStudy()
    assert len({len(study.candidates(arm)) for arm in study.arms}) == 1
    assert study.size == 11 * (4 + 3)
    search = {cell.seed for arm in study.arms for cell in study.candidates(arm)}
    curves = {cell.seed for arm in study.arms for cell in study.curves(arm, 1e-3)}
    assert not search & curves, "no curve is of the pairs that chose its rate"
    assert study.arms.count(Arm("full", None)) == 1


def test_first_blocks() -> None:
    model = tiny_model()
    ids = torch.tensor([[5, 40, 60]])
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        keep_blocks(model, 1)
        cut = model(ids, output_hidden_states=True).hidden_states
    assert len(cut) == 2
    torch.testing.assert_close(cut[1], model.model.norm(states[1]))  # the last one is given after the norm


def test_area_and_steps() -> None:
    curve = [{"step": step, "accuracy": value} for step, value in ((0, 0.0), (10, 0.5), (20, 0.995), (30, 0.9))]
    assert area(curve) == pytest.approx((0.5 + 0.995 + 0.9) / 3)
    assert (steps_to(curve, 0.99), steps_to(curve, 0.5), steps_to(curve, 1.0)) == (20, 10, None)
