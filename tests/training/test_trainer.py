"""The trainer's shortcuts against the plain computation, and what the loop keeps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import trimtab
from adapter_tools import trained
from tiny_runs import Kept, tiny_model, tiny_tokenizer, write_rows
from trimtab import tasks
from trimtab.config.run import TrainConfig
from trimtab.data.batches import Collator
from trimtab.data.forms import read_examples
from trimtab.data.tokens import EncodedRows, encode_all
from trimtab.processes import Processes, being
from trimtab.training import trainer_arguments
from trimtab.training.callbacks import Averaging
from trimtab.training.optimizer import make_optimizer, parameter_groups
from trimtab.training.run import finetune
from trimtab.training.trainer import AdapterTrainer
from trimtab.training.work import Work

pytestmark = pytest.mark.usefixtures("bare_runs")
RULES = (
    trimtab.Rule(match="*_proj", method="dora", rank=4, alpha=8),
    trimtab.Rule(match="*.v_proj", method="mora", rank=4),
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def encoded(tmp_path: Path, tokenizer: Any) -> EncodedRows:
    """16 rows whose answers have 2 to 30 labels: a mean of means would be another number than the mean."""
    found = [
        {
            "prompt": f"{'the pilot asks for a tug ' * (1 + number % 3)}: ",
            "completion": "fog over berth " * (number + 1),
        }
        for number in range(16)
    ]
    return encode_all(
        read_examples(str(write_rows(tmp_path / "r.jsonl", found)), tokenizer, root=tmp_path), tokenizer, 64
    )


@pytest.fixture
def adapted(tokenizer: Any) -> Any:
    return trained(tiny_model(len(tokenizer)), *RULES).float()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.grad.clone() for name, value in trimtab.trainable_parameters(model).items()}


class Catching(TrainerCallback):
    """Keeps the gradients of the first step."""

    def __init__(self, model: Any) -> None:
        self.model, self.found = model, {}

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.found = self.found or gradients(self.model)


def make_trainer(
    config: Any, model: Any, encoded: EncodedRows, folder: Path, callbacks: Sequence[TrainerCallback] = ()
) -> AdapterTrainer:
    task = tasks.find("causal_lm")
    return AdapterTrainer(
        model,
        config.train,
        encoded,
        task=task,
        head=task.head(model),
        reader=tiny_tokenizer(),
        folder=folder,
        record=lambda row: None,
        callbacks=callbacks,
    )


def test_loss_and_gradients_are_those_of_the_model_itself(
    adapted: Any, encoded: EncodedRows, make_config: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = make_trainer(make_config(), adapted, encoded, tmp_path / "t")
    plain = copy.deepcopy(adapted)
    batch = Collator(1, mask=True)([encoded[index] for index in (0, 5, 11, 15)])
    labels = int((batch["labels"] != -100).sum())

    expected = plain(**batch).loss  # attention mask, all logits, transformers' own loss
    expected.backward()
    inputs = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    assert trainer._head.sparse
    loss = trainer.compute_loss(adapted, inputs, num_items_in_batch=torch.tensor(labels))
    loss.backward()

    # float32: sums over 64 tokens and 400 logits in another order.
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    wanted = gradients(plain)
    for name, found in gradients(adapted).items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-4, atol=1e-6 * float(wanted[name].abs().max() + 1))


def test_a_run_trains_on_its_prompts_as_far_as_they_count(make_config: Callable[..., Any]) -> None:
    """The first loss is that of the answers and the weighted one of the prompts; validation is of answers alone."""
    losses, validated = {}, {}
    for weight in (0.0, 0.5, 1.0):
        listener = Kept()
        said = {"prompt_loss_weight": weight, "max_steps": 1, "log_every": 1, "learning_rate": 1e-12}
        finetune(make_config(f"w{weight}", data={"validation": 0.2}, train=said), listener=listener)
        losses[weight], validated[weight] = listener.column("loss")[0], listener.column("loss", "validation")[0]
        assert any("a token of the prompt counts" in note for note in listener.notes) == (weight > 0)
    assert losses[1.0] > losses[0.0] * 1.5  # the prompts are longer than the answers
    assert losses[0.5] - losses[0.0] == pytest.approx((losses[1.0] - losses[0.0]) / 2, rel=1e-3)
    assert validated[0.5] == pytest.approx(validated[0.0], rel=1e-5)


def test_each_process_drops_out_other_numbers(
    adapted: Any, encoded: EncodedRows, make_config: Callable[..., Any], tmp_path: Path
) -> None:
    drawn = []
    for rank in (0, 1, 0):
        with being(Processes(rank, 2)):
            make_trainer(make_config(), adapted, encoded, tmp_path / "t")
        drawn.append(torch.rand(4).tolist())
    assert drawn[0] == drawn[2] != drawn[1]


def test_accumulated_gradients_are_those_of_one_large_batch(
    adapted: Any, encoded: EncodedRows, make_config: Callable[..., Any], tmp_path: Path
) -> None:
    found = []
    for size, times in ((16, 1), (4, 4)):
        model = copy.deepcopy(adapted)
        catching = Catching(model)
        config = make_config(
            train={"batch_size": size, "gradient_accumulation": times, "max_steps": 1, "max_grad_norm": 1e9}
        )
        make_trainer(config, model, encoded, tmp_path / f"{size}", [catching]).train()
        found.append(catching.found)
    for name, whole in found[0].items():
        torch.testing.assert_close(found[1][name], whole, rtol=1e-4, atol=1e-6 * float(whole.abs().max() + 1))


def test_grouping_by_length_changes_only_the_order(
    adapted: Any, encoded: EncodedRows, make_config: Callable[..., Any], tmp_path: Path
) -> None:
    seen = []
    for grouped in (True, False):
        config = make_config(train={"group_by_length": grouped})
        trainer = make_trainer(config, copy.deepcopy(adapted), encoded, tmp_path / f"{grouped}")
        loader = trainer.get_train_dataloader()
        epochs = []
        for epoch in (0, 1):
            loader.set_epoch(epoch)
            if hasattr(loader.batch_sampler, "set_epoch"):
                loader.batch_sampler.set_epoch(epoch)
            epochs.append([tuple(row[row != 1].tolist()) for batch in loader for row in batch["input_ids"]])
        assert sorted(epochs[0]) == sorted(epochs[1])
        assert epochs[0] != epochs[1]  # shuffled anew
        seen.append(sorted(epochs[0]))
    assert seen[0] == seen[1] == sorted(tuple(row["input_ids"]) for row in encoded)


def test_parameter_groups(adapted: Any) -> None:
    groups = parameter_groups(adapted, 1e-3, 5e-3, 16.0, 0.1)
    names = {id(value): name for name, value in trimtab.trainable_parameters(adapted).items()}
    by_rate = {
        group["lr"]: ({names[id(value)].rsplit(".", 1)[-1] for value in group["params"]}, group["weight_decay"])
        for group in groups
    }
    assert by_rate == {1e-3: ({"A", "M"}, 0.1), 16e-3: ({"B"}, 0.1), 5e-3: ({"magnitude"}, 0.0)}
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert groups[0]["lr"] == 1e-3  # the one that is logged
    plain = parameter_groups(adapted, 1e-3, None, 1.0, 0.1)
    assert {group["lr"] for group in plain} == {1e-3}


def test_biases_of_adapter_blocks_do_not_decay() -> None:
    model = tiny_model()
    trimtab.attach(model, trimtab.Rule(match="*.mlp", method="serial", bottleneck=3))
    matrices, biases = parameter_groups(model, 1e-3, None, 16.0, 0.1)
    assert {parameter.dim() for parameter in matrices["params"]} == {2}
    assert {parameter.dim() for parameter in biases["params"]} == {1}
    assert (matrices["lr"], matrices["weight_decay"]) == (1e-3, 0.1)
    assert (biases["lr"], biases["weight_decay"]) == (1e-3, 0.0)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedules_and_warmup(make_config: Callable[..., Any], schedule: str) -> None:
    steps, warmup, peak = 10, 3, 1e-2
    listener = Kept()
    train = {"max_steps": steps, "epochs": 9, "warmup": warmup, "schedule": schedule, "learning_rate": peak}
    finetune(make_config(train=train), listener=listener)

    def rate(done: int) -> float:
        if done < warmup:
            return peak * done / warmup
        share = (done - warmup) / (steps - warmup)
        return {
            "linear": peak * (1 - share),
            "cosine": peak * (1 + math.cos(math.pi * share)) / 2,
            "constant": peak,
        }[schedule]

    assert listener.column("learning_rate") == pytest.approx([rate(done) for done in range(steps)])


def test_a_warmup_that_is_a_fraction_is_one_of_all_steps(make_config: Callable[..., Any]) -> None:
    listener = Kept()
    finetune(make_config(train={"epochs": 2, "warmup": 0.5, "learning_rate": 0.6}), listener=listener)  # 12 steps
    assert listener.column("learning_rate")[:7] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def test_steps_are_counted_without_what_rounding_adds() -> None:
    train = TrainConfig(epochs=1.1, batch_size=1, warmup=0.07)  # in floating point: 11.000000000000002
    assert train.total_steps(10) == 11
    assert TrainConfig(epochs=1.11, batch_size=1).total_steps(10) == 12
    assert [train.warmup_steps(steps) for steps in (99, 100, 101)] == [7, 7, 8]


def test_a_run_of_one_step_trains(make_config: Callable[..., Any]) -> None:
    listener = Kept()
    finetune(make_config(train={"max_steps": 1, "warmup": 0.03, "learning_rate": 0.5}), listener=listener)
    assert listener.column("learning_rate") == [0.5]


def test_the_average_is_the_mean_over_the_last_steps(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[dict[str, torch.Tensor]] = []
    original = Averaging.on_step_end

    def spy(self: Averaging, *said: Any, **named: Any) -> None:
        steps.append({name: value.detach().clone() for name, value in self._parameters.items()})
        original(self, *said, **named)

    monkeypatch.setattr(Averaging, "on_step_end", spy)
    config = make_config(train={"max_steps": 10, "epochs": 9, "average": 0.3})
    folder = finetune(config)
    assert len(steps) == 10
    kept = load_file(folder.adapter / "adapter_model.safetensors")
    last = [torch.stack([step[name] for step in steps[-3:]]).mean(0) for name in steps[0]]
    for wanted in last:  # names differ on disk: every mean must be there
        assert any(
            value.numel() == wanted.numel() and torch.allclose(value.flatten(), wanted.flatten(), rtol=1e-5, atol=1e-7)
            for value in kept.values()
        )


def _validations(monkeypatch: pytest.MonkeyPatch, *found: tuple[float, float]) -> None:
    """Let validations give these pairs of loss and accuracy, one after the other."""
    results = iter(found)
    monkeypatch.setattr(Work, "validation", lambda *_: dict(zip(("loss", "accuracy"), next(results), strict=True)))


@pytest.mark.parametrize(
    ("found", "best"),
    [
        ([(1.0, 0.5), (0.9, 0.8), (0.1, 0.7)], 12),  # the last one is worse
        ([(1.0, 0.5), (0.9, 0.8), (0.8, 0.8)], 18),  # a tie goes to the lower loss,
        ([(1.0, 0.5), (0.9, 0.8), (0.95, 0.8)], 12),  # wherever that is
    ],
)
def test_the_best_adapter_is_kept(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, found: list[tuple[float, float]], best: int
) -> None:
    _validations(monkeypatch, *found)
    listener = Kept()
    folder = finetune(
        make_config(count=30, data={"validation": 0.2}, train={"epochs": 3, "keep_checkpoints": 9}), listener=listener
    )
    assert folder.read_summary().best_step == best
    assert listener.column("step", "validation") == [6, 12, 18]
    assert any(f"step {best}" in note for note in listener.notes)
    kept = load_file(folder.adapter / "adapter_model.safetensors")
    at_best = load_file(folder.checkpoints / f"checkpoint-{best}" / "adapter_model.safetensors")
    other = load_file(folder.checkpoints / "checkpoint-6" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], at_best[name]) for name in kept)
    assert not all(torch.equal(kept[name], other[name]) for name in kept)


def test_the_last_adapter_is_kept_where_the_best_is_not_wanted(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _validations(monkeypatch, (1.0, 0.9), (2.0, 0.1))
    folder = finetune(make_config(count=30, data={"validation": 0.2}, train={"epochs": 2, "keep_best": False}))
    kept = load_file(folder.adapter / "adapter_model.safetensors")
    last = load_file(folder.checkpoints / "checkpoint-12" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], last[name]) for name in kept)
    assert folder.read_summary().best_step is None


def test_a_validation_without_the_metric_is_never_the_best(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a correlation is not there where all answers are alike."""
    settings = {"count": 30, "data": {"validation": 0.2}}
    found = iter([{"loss": 0.1}, {"loss": 0.9, "accuracy": 0.5}, {"loss": 0.2}, {"loss": 0.1}])
    monkeypatch.setattr(Work, "validation", lambda *_: next(found))
    summary = finetune(make_config("some", **settings, train={"epochs": 9, "early_stopping": 2})).read_summary()
    assert (summary.steps, summary.best_step) == (24, 12)
    monkeypatch.setattr(Work, "validation", lambda *_: {"loss": 0.1})
    folder = finetune(make_config("none", **settings, train={"epochs": 2}))
    summary = folder.read_summary()
    assert (summary.steps, summary.best_step) == (12, None)
    assert any("no validation has a figure of it" in note for note in summary.notes)
    last = load_file(folder.checkpoints / "checkpoint-12" / "adapter_model.safetensors")
    kept = load_file(folder.adapter / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], last[name]) for name in kept)


def test_early_stopping(make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _validations(monkeypatch, (1.0, 0.5), (0.9, 0.9), (1.1, 0.8), (1.2, 0.7), (0.1, 1.0))
    config = make_config(count=30, data={"validation": 0.2}, train={"epochs": 5, "early_stopping": 2})
    listener = Kept()
    folder = finetune(config, listener=listener)
    summary = folder.read_summary()
    assert (summary.status, summary.steps, summary.best_step) == ("finished", 24, 12)
    assert listener.column("step") == list(range(1, 25))


def test_a_run_that_ends_before_there_is_an_average_says_so(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _validations(monkeypatch, (1.0, 0.5), (1.1, 0.4))
    train = {"epochs": 5, "early_stopping": 1, "average": 0.3}
    folder = finetune(make_config(count=30, data={"validation": 0.2}, train=train))
    assert (
        "train.average: none of the 12 steps that were made is among the last 0.3 of 30, so nothing is averaged"
        in folder.read_summary().notes
    )
    # A mean of its last steps was taken.
    assert not finetune(make_config("mean", train={"epochs": 1, "average": 0.3})).read_summary().notes


def test_every_run_has_a_first_and_a_last_loss(
    make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rare = {"log_every": 100}
    listener = Kept()
    finetune(make_config(train={"max_steps": 4, **rare}), listener=listener)
    assert listener.column("step") == [1, 4]
    # Where training may stop at any validation, each of them has a loss.
    _validations(monkeypatch, (1.0, 0.5), (1.1, 0.4))
    listener = Kept()
    train = {"epochs": 5, "early_stopping": 1, **rare}
    finetune(make_config("early", count=30, data={"validation": 0.2}, train=train), listener=listener)
    assert listener.column("step") == [1, 6, 12]


def test_validation_by_steps_includes_the_last_step(make_config: Callable[..., Any]) -> None:
    listener = Kept()
    config = make_config(count=30, data={"validation": 0.2}, train={"epochs": 2, "validate_every": 5})
    finetune(config, listener=listener)
    assert listener.column("step", "validation") == [5, 10, 12]


def test_checkpointing_of_activations_changes_no_loss(make_config: Callable[..., Any]) -> None:
    losses = []
    for number, checkpointing in enumerate((False, True)):
        listener = Kept()
        finetune(make_config(f"run{number}", train={"gradient_checkpointing": checkpointing}), listener=listener)
        losses.append(listener.column("loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("pins", [True, False])
def test_batches_are_pinned_and_copied_alongside_on_a_gpu(
    make_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pins: bool
) -> None:
    monkeypatch.setattr(trainer_arguments, "pins", lambda: pins)
    said = trainer_arguments.training_arguments(make_config().train, 16, tmp_path, None)
    assert said.dataloader_pin_memory is said.accelerator_config.non_blocking is pins


def test_where_no_kernel_takes_the_whole_step_it_is_taken_by_lists(
    adapted: Any, make_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def adamw(groups: Any, **said: Any) -> None:
        asked.append(said)
        if said.get("fused"):
            raise RuntimeError("`fused=True` requires all the params to be on another device")

    monkeypatch.setattr(torch.optim, "AdamW", adamw)
    make_optimizer(adapted, make_config().train)
    assert asked == [{"fused": True}, {"foreach": True}]
