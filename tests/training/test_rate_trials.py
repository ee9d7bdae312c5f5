"""``train.learning_rate: auto``: what its trials cost, what they choose, and that the run is the same after them."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tiny_encoders import write_encoder
from tiny_runs import Kept, labelled, rows, write_model, write_rows
from trimtab.config.read import build_config, load_config
from trimtab.config.run import TrainConfig
from trimtab.errors import ConfigError, Interrupted, RunError
from trimtab.files import read_json, write_json
from trimtab.models.load import empty_model
from trimtab.runs.events import Listener
from trimtab.runs.rate_record import RateTrial, read_rate
from trimtab.surgery.plan import Rule
from trimtab.tasks import inputs_of, job_of
from trimtab.tasks.regression import Regression
from trimtab.training import rate_plan, rate_trials
from trimtab.training.rate_plan import SHORTEST, plan_trials
from trimtab.training.rate_prior import BASE, labels_of_step, likely_rate
from trimtab.training.rate_trials import APART, FLAT, _narrow, choose
from trimtab.training.run import finetune
from trimtab.training.tune import tune
from trimtab.training.work import Work


def trial(rate: float, loss: float | None, turn: int = 1, steps: int = 32) -> RateTrial:
    return RateTrial(round=turn, rate=rate, steps=steps, loss=loss, seconds=0.0)


def bowl(best: float) -> Callable[[float], float | None]:
    """A loss that is lowest at ``best``, a nat higher a decade beside it, and no number two decades above it."""

    def loss(rate: float) -> float | None:
        away = math.log10(rate / best)
        return None if away > 2 else 1.0 + away**2

    return loss


def searched(loss: Callable[[float], float | None], likely: float = 1e-3) -> tuple[float, str, list[list[RateTrial]]]:
    """What two rounds end with where ``loss`` is known."""
    rounds: list[list[RateTrial]] = []

    def tried(rates: list[float], turn: int, steps: int) -> list[RateTrial]:
        rounds.append([trial(rate, loss(rate), turn) for rate in rates])
        return rounds[-1]

    plan = plan_trials(TrainConfig(epochs=1000, max_steps=2000), 320, 64)
    rate, why = _narrow(plan, [likely, likely], tried)
    assert rate is not None
    return rate, why, rounds


@pytest.mark.parametrize("budget", [0.05, 0.15, 0.5])
@pytest.mark.parametrize("rows", [0, 7, 1000])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_trials_cost_no_more_than_their_budget(budget: float, rows: int, batch: int) -> None:
    for steps, trained_on in itertools.product((1, 10, 100, 347, 1000, 2000, 20_000), {batch, max(1, batch // 8)}):
        said = {"batch_size": batch, "epochs": steps, "tune": {"budget": budget, "rows": 100}}
        plan = plan_trials(TrainConfig.model_validate(said), trained_on, rows)
        trained = sum(count * length for count, length in plan.rounds)
        measured = sum(count for count, _ in plan.rounds) * plan.rows / trained_on / 3
        assert trained + measured == pytest.approx(plan.cost)
        assert plan.cost <= budget * steps
        assert plan.rows <= min(rows, 100)
        assert all(length >= SHORTEST for _, length in plan.rounds)


def test_a_long_run_has_two_rounds_a_shorter_one_has_one_and_a_short_one_none() -> None:
    trains = [TrainConfig(epochs=1000, max_steps=steps) for steps in (2000, 500, 200)]
    rounds = [[count for count, _ in plan_trials(train, 320, 64).rounds] for train in trains]
    assert rounds == [[5, 3], [3], []]


@pytest.mark.parametrize("away", [-0.6, -0.3, 0.0, 0.15, 0.6])
def test_the_trials_find_the_best_rate_around_the_likely_one(away: float) -> None:
    best = 1e-3 * 10**away
    rate, _, rounds = searched(bowl(best))
    assert abs(math.log10(rate / best)) < APART / 2
    assert [len(trials) for trials in rounds] == [5, 3]


def test_a_best_rate_beyond_the_first_trials_is_come_near_to() -> None:
    rate, why, rounds = searched(bowl(1e-1))
    assert rate == rounds[1][-1].rate == pytest.approx(1e-3 * 10 ** (3 * APART), rel=0.01)
    assert "highest" in why


def test_where_every_first_trial_diverges_the_next_are_below_them() -> None:
    rate, _, rounds = searched(bowl(1e-6), likely=1e-3)
    assert all(one.loss is None for one in rounds[0])
    assert max(one.rate for one in rounds[1]) < min(one.rate for one in rounds[0])
    assert rate == rounds[1][0].rate


def test_where_everything_diverges_the_rate_is_far_below_all_that_was_tried() -> None:
    rate, why, rounds = searched(lambda _: None)
    assert rate < min(one.rate for one in rounds[1]) / 5
    assert "diverged" in why


def test_in_whatever_unit_the_numbers_of_a_regression_are_their_trials_choose_the_same_rate() -> None:
    """The loss is the squared error: of numbers around 1000 every difference is large, of those around 1e-4 none."""

    def chosen(unit: float) -> float:
        trials = [trial(rate, loss * unit**2) for rate, loss in ((5e-4, 1.1), (1e-3, 1.0), (2e-3, 0.9), (4e-3, 1.2))]
        return choose(trials, 1e-3, Regression().nats)

    assert chosen(1e-4) == chosen(1) == chosen(1e3)
    assert rate_trials._noted(3.456e-9) == 3.456e-9
    assert trial(1e-3, 3.456e-9).told == "3.456e-09"
    assert math.isfinite(Regression().nats(0.0))


def test_trials_as_good_as_equal_leave_the_likely_rate() -> None:
    flat = [trial(rate, 1.0 + wobble) for rate, wobble in ((5e-4, 0.001), (1e-3, 0.002), (2e-3, 0.0))]
    assert choose(flat, 1e-3) == pytest.approx(1e-3, rel=0.2)
    assert "too little to go further from the likely rate" in rate_trials._why(1e-3, flat)
    assert "highest rate of the last trials, 0.002, was the best" in rate_trials._why(2e-3, flat)
    steep = [trial(rate, loss) for rate, loss in ((5e-4, 1.5), (1e-3, 1.2), (2e-3, 1.0))]
    assert choose(steep, 1e-3) > 1.8e-3


def test_the_fewer_the_steps_of_trials_the_nearer_to_the_likely_rate() -> None:
    """A difference of as much as long trials tell from none."""

    def chosen(steps: int) -> float:
        return choose([trial(rate, 1.0 + at * FLAT, steps=steps) for at, rate in enumerate((5e-4, 1e-3, 2e-3))], 1e-3)

    assert chosen(4) > chosen(16) > chosen(32) == chosen(320)
    assert chosen(4) == pytest.approx(1e-3, rel=0.15)


def test_the_likely_rate_of_full_fine_tuning_is_the_lowest_and_falls_with_alpha_and_width() -> None:
    def of(width: int | None = 576, **rule: Any) -> float:
        return likely_rate([Rule(match="all-linear", **rule)], width, steps=100, labels=50)

    assert of(method="full") < of(method="lora", rank=64) < of(method="lora", rank=1)
    assert of(method="lora", rank=8, alpha=32) == pytest.approx(of(method="lora", rank=64, alpha=32))
    assert of(method="mora", rank=64) < of(method="mora", rank=8)
    assert of(method="mora", rank=8, width=4096) < of(method="mora", rank=8)
    stable = of(method="lora", rank=16, alpha=8, rank_stabilised=True)
    assert stable == pytest.approx(of(method="lora", rank=16, alpha=32))
    mixed = [Rule(match="*.q_proj", method="lora", rank=8), Rule(match="*.v_proj", method="full")]
    assert likely_rate(mixed, 576, steps=100, labels=50) == of(method="full")


def test_the_likely_rate_falls_with_the_steps_and_rises_with_the_labels_of_a_step_until_they_are_many() -> None:
    rules = [Rule(match="all-linear", method="lora", rank=8)]

    def of(steps: int, labels: float) -> float:
        return likely_rate(rules, 576, steps=steps, labels=labels)

    assert of(8, 50) > of(80, 50) > of(800, 50)
    assert of(80, 64) == pytest.approx(2 * of(80, 16))
    assert of(80, 1e4) == of(80, 1e5) > of(80, 64)


def test_where_b_learns_faster_its_rate_and_that_of_a_lie_evenly_around_one_rate_for_both() -> None:
    def of(ratio: float, *methods: str) -> float:
        rules = [Rule(match="*", method=method) for method in methods]
        return likely_rate(rules, 576, steps=100, labels=50, b_ratio=ratio)

    assert of(16, "dora") * of(16, "dora") * 16 == pytest.approx(of(1, "dora") ** 2)
    assert of(16, "mora") == of(1, "mora")
    assert of(1e-6, "lora", "full") == of(1, "full"), "the lowest of all rules"


LORA = {"match": "*.q_proj", "method": "lora", "rank": 2}


def test_the_rate_is_not_that_of_what_begins_anew(tmp_path: Path) -> None:
    """A new head and added rows are trained whole, but full fine-tuning, which wants a far lower rate, is of pretrained
    weights."""
    write_encoder(tmp_path / "encoder")
    write_rows(tmp_path / "labelled.jsonl", labelled(6))
    write_model(tmp_path / "causal")
    write_rows(tmp_path / "rows.jsonl", rows(6))

    def methods_of(model: dict[str, Any], data: str, *plan: dict[str, Any]) -> list[str]:
        said = {"model": model, "data": {"train": data, "validation": None}, "plan": list(plan)}
        job = job_of(build_config({**said, "output": "none"}, tmp_path, "the test"))
        job, _ = inputs_of(job, Listener())
        return [rule.method for rule in rate_trials._rules_of_rate(job, empty_model(job.files))]

    query = {**LORA, "match": "*.query"}
    encoder, causal = {"name": str(tmp_path / "encoder")}, {"name": str(tmp_path / "causal")}
    assert methods_of(encoder, "labelled.jsonl", query) == ["lora"]
    head = {"match": ["*classifier*", "*score*"], "method": "full"}
    assert methods_of(encoder, "labelled.jsonl", query, head) == ["lora"]
    below = {"match": "*.output.dense", "method": "full"}
    assert methods_of(encoder, "labelled.jsonl", query, below) == ["lora", "full"]
    assert methods_of({**causal, "add_tokens": ["<buoy>"]}, "rows.jsonl", LORA) == ["lora"]
    assert methods_of(causal, "rows.jsonl", {"match": "*.q_proj", "method": "full"}) == ["full"]
    assert methods_of(causal, "rows.jsonl", LORA, {"match": "*norm*", "method": "full"}) == ["lora"]


@pytest.mark.parametrize(
    ("row", "labels"),
    [
        ({"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, 2 + 0.25 * 2),
        ({"input_ids": torch.ones(9), "labels": torch.tensor(1)}, 1),  # a class
        ({"input_ids": torch.ones(9), "labels": torch.tensor([1.0, 0.0, 0.0])}, 1),  # several labels, or numbers
        ({"input_ids": torch.ones(3), "labels": torch.tensor([-100, 4, -100])}, 1 + 0.25 * 2),
    ],
)
def test_labels_of_a_step_are_what_carries_loss_in_it(row: dict[str, Any], labels: float) -> None:
    train = TrainConfig.model_validate({"batch_size": 4, "gradient_accumulation": 2, "prompt_loss_weight": 0.25})
    assert labels_of_step([row], train) == pytest.approx(8 * labels)
    mixed = [row, {"labels": torch.tensor(0)}] * 500
    assert labels_of_step(mixed, train) == pytest.approx(8 * (labels + 1) / 2, rel=0.05)


AUTO = {"learning_rate": "auto", "max_steps": 30, "epochs": 10, "tune": {"budget": 1.0}}


class _Watched(Kept):
    """Keeps how each trial goes along."""

    def __init__(self) -> None:
        super().__init__()
        self.tried: list[tuple[float, int, int]] = []

    def trying(self, rate: float, step: int, steps: int) -> None:
        self.tried.append((rate, step, steps))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, bare_runs: None) -> None:
    """Trials of two steps are enough to see that they are made."""
    monkeypatch.setattr(rate_plan, "SHORTEST", 2)


def test_a_run_finds_its_rate_and_is_then_the_run_that_is_told_it(make_yaml: Callable[..., Path], quick: None) -> None:
    data = {"validation": 0.25}
    kept = _Watched()
    found = finetune(load_config(make_yaml("auto", data=data, train=AUTO)), listener=kept)
    chosen = read_rate(found.rate)
    assert chosen is not None
    assert [sum(one.round == turn for one in chosen.trials) for turn in (1, 2)] == [5, 3]
    assert any(f"{chosen.rate:g}" in note for note in kept.notes)
    assert kept.tried == [(one.rate, step, one.steps) for one in chosen.trials for step in range(one.steps + 1)]
    summary = found.read_summary()
    assert summary is not None
    assert summary.learning_rate == chosen.rate
    told = {**AUTO, "learning_rate": chosen.rate}
    same = finetune(load_config(make_yaml("told", data=data, train=told)))
    tensors, others = (load_file(folder.adapter / "adapter_model.safetensors") for folder in (found, same))
    assert all(torch.equal(tensors[name], others[name]) for name in tensors.keys() | others.keys())
    assert not same.rate.exists()


@pytest.mark.parametrize("kind", ["label", "labels"])
def test_a_trial_that_diverges_is_one_in_any_task_and_a_run_whose_every_trial_did_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None, kind: str
) -> None:
    monkeypatch.setattr("trimtab.training.rate_prior.BASE", dict.fromkeys(BASE, 1e30))
    write_encoder(tmp_path / "encoder")
    write_rows(tmp_path / "rows.jsonl", labelled(20, several=kind == "labels"))
    data = {"train": "rows.jsonl", "validation": 0.25}
    train = {**AUTO, "batch_size": 4, "precision": "float32"}
    plan = [{**LORA, "match": "all-linear"}]
    said = {"model": str(tmp_path / "encoder"), "data": data, "plan": plan, "train": train}
    kept = Kept()
    found = tune(build_config({**said, "output": str(tmp_path / "run")}, tmp_path, "the test"), kept)
    assert [one.loss for one in found.trials] == [None] * 8
    assert any("every trial of 4 steps diverged" in remark for remark in kept.remarks)


def test_validation_rows_without_room_for_their_answer_are_not_measured(make_yaml: Callable[..., Path]) -> None:
    long = [{"prompt": "tide? ", "completion": "low " * 40}]
    yaml = make_yaml(data={"validation": None, "max_length": 24, "choices": None}, train=AUTO)
    write_rows(yaml.parent / "long.jsonl", [*long * 3, *rows(1)])
    config = load_config(yaml, [f"data.validation={yaml.parent / 'long.jsonl'}"])
    job, inputs = inputs_of(job_of(config), Listener())
    model = Work(job, inputs, Listener()).model
    searches = [rate_trials._Search(job, inputs, model, listener=Listener(), rows=count) for count in (2, 4)]
    assert [search.rows for search in searches] == [0, 4]


def test_trials_are_not_thrown_away_by_a_run_that_begins_again(
    make_yaml: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    config = load_config(make_yaml("stopped", train=AUTO))
    whole = rate_trials._Search.trial

    def stopped(self: Any, rate: float, turn: int, steps: int) -> RateTrial:
        if turn == 2:
            raise KeyboardInterrupt
        return whole(self, rate, turn, steps)

    monkeypatch.setattr(rate_trials._Search, "trial", stopped)
    with pytest.raises(Interrupted):
        finetune(config)
    with pytest.raises(RunError, match="--resume"):
        finetune(config)
    assert len(read_json(config.output / "rate.json")["trials"]) == 5


def test_a_run_that_lost_its_trials_goes_on_at_the_rate_that_its_summary_names(
    make_yaml: Callable[..., Path], quick: None
) -> None:
    config = load_config(make_yaml("kept", train={**AUTO, "save_every": 20}))
    folder = finetune(config)
    folder.rate.unlink()
    summary = read_json(folder.summary)
    write_json(folder.summary, {**summary, "status": "interrupted", "trained": False, "learning_rate": 7e-4})
    kept = Kept()
    finetune(config, resume=True, listener=kept)
    assert not any("trial" in note for note in kept.notes)
    assert read_json(folder.summary)["learning_rate"] == 7e-4


@pytest.mark.full
def test_trials_are_repeatable_go_on_where_they_stopped_and_are_not_done_twice(
    make_yaml: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    config = load_config(make_yaml("stopped", train=AUTO))
    made: list[float] = []
    whole = rate_trials._Search.trial

    def counted(self: Any, rate: float, turn: int, steps: int) -> RateTrial:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(rate)
        return whole(self, rate, turn, steps)

    monkeypatch.setattr(rate_trials._Search, "trial", counted)
    with pytest.raises(Interrupted, match="Go on with"):
        finetune(config)
    monkeypatch.setattr(rate_trials._Search, "trial", whole)
    folder = config.output / "rate.json"
    before = read_rate(folder)
    assert before is not None
    assert before.rate is None
    assert len(before.trials) == 3
    finetune(config, resume=True)
    after = read_rate(folder)
    assert after is not None
    assert after.trials[:3] == before.trials
    fresh = load_config(make_yaml("fresh", train=AUTO))
    finetune(fresh)
    again = read_rate(fresh.output / "rate.json")
    assert again is not None
    assert [(one.rate, one.loss) for one in again.trials] == [(one.rate, one.loss) for one in after.trials]
    assert again.rate == after.rate


@pytest.mark.full
def test_a_rate_that_was_found_is_kept_when_the_run_goes_on(make_yaml: Callable[..., Path], quick: None) -> None:
    config = load_config(make_yaml("kept", train={**AUTO, "save_every": 20}))
    folder = finetune(config)
    record = read_json(folder.rate)
    write_json(folder.rate, {**record, "rate": 7e-4})  # as if it had been found: nothing is searched again
    summary = read_json(folder.summary)
    write_json(folder.summary, {**summary, "status": "interrupted", "trained": False})
    kept = Kept()
    finetune(config, resume=True, listener=kept)
    assert any("0.0007, as it was found" in note for note in kept.notes)
    assert read_json(folder.summary)["learning_rate"] == 7e-4


@pytest.mark.usefixtures("bare_runs")
def test_a_run_too_short_for_trials_takes_the_likely_rate_and_says_so(make_yaml: Callable[..., Path]) -> None:
    kept = Kept()
    folder = finetune(load_config(make_yaml(train={"learning_rate": "auto"})), listener=kept)
    chosen = read_rate(folder.rate)
    assert chosen is not None
    assert not chosen.trials
    assert chosen.rate == pytest.approx(chosen.likely, rel=0.01)
    assert any("too short" in note for note in kept.notes)


@pytest.mark.parametrize("rate", ["quick", 0, -1e-3])
def test_a_damaged_file_of_trials_is_an_error_of_ours(tmp_path: Path, rate: Any) -> None:
    file = tmp_path / "rate.json"
    whole = {"rate": rate, "likely": 1e-3, "run_steps": 9, "rows": 0, "cost": 0.0, "trials": []}
    file.write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(RunError, match="remove it"):
        read_rate(file)


@pytest.mark.parametrize("said", ["fast", 0, -1e-4, True, [1e-4]])
def test_a_rate_is_a_number_above_0_or_auto(make_yaml: Callable[..., Path], said: Any) -> None:
    with pytest.raises(ConfigError, match=r"learning_rate.*auto"):
        load_config(make_yaml(train={"learning_rate": said}))
