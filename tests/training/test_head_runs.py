"""Runs of a task with a head of its own: resumed, begun from an adapter, quantised, and with what else a run may do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from stopped_runs import adapter_of, interrupt, metrics_of, signals_are_heard
from tiny_encoders import write_encoder
from tiny_runs import Kept, labelled, write_config, write_rows
from trimtab.config.read import load_config
from trimtab.config.run import RunConfig
from trimtab.errors import PlanError, TrimtabError
from trimtab.files import read_json
from trimtab.runs.load import load_run
from trimtab.runs.named import Named
from trimtab.training.run import finetune

__all__ = ["signals_are_heard"]
STILL = {"max_steps": 1, "learning_rate": 1e-12}
pytestmark = pytest.mark.usefixtures("bare_runs")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "masked", kind="BertForMaskedLM")


@pytest.fixture
def make(tmp_path: Path, encoder: Path) -> Callable[..., RunConfig]:
    def config(name: str = "run", *, said: list[dict[str, Any]] | None = None, **sections: Any) -> RunConfig:
        train = write_rows(tmp_path / f"{name}.jsonl", said or labelled(24))
        return load_config(write_config(tmp_path / f"{name}.yaml", encoder, train, **sections))

    return config


def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not_stopped(make: Callable[..., RunConfig]) -> None:
    often = {"epochs": 2, "save_every": 3, "average": 0.9}
    validation = {"validation": 0.25}
    plain = make("plain", train=often, data=validation)
    stopped = make("stopped", train=often, data=validation)
    finetune(plain)
    interrupt(stopped, step=5)
    finetune(stopped, resume=True)
    ours, theirs = adapter_of(plain), adapter_of(stopped)
    assert ours.keys() == theirs.keys()
    assert any("classifier" in name for name in ours)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert metrics_of(plain) == metrics_of(stopped)


def test_a_run_begins_from_the_adapter_of_another_with_its_head(make: Callable[..., RunConfig]) -> None:
    first = finetune(make("first", train={"epochs": 2}))
    more = finetune(make("more", adapter=str(first.adapter), plan=None, train=STILL))
    for folder in (first, more):
        assert Named.find(str(folder.path)).head.labels == ("calm", "storm", "watch")
    ids = torch.tensor([[2, 80, 81, 82, 3]])
    torch.testing.assert_close(load_run(more.path).model(ids).logits, load_run(first.path).model(ids).logits)


def test_a_head_keeps_the_order_of_its_labels_and_takes_no_others(make: Callable[..., RunConfig]) -> None:
    first = finetune(make("first", data={"choices": ["watch", "calm", "storm"]}))
    assert Named.find(str(first.path)).head.labels == ("watch", "calm", "storm")
    more = finetune(make("more", adapter=str(first.adapter), plan=None, train=STILL))
    assert Named.find(str(more.path)).head.labels == ("watch", "calm", "storm")
    other = [{**row, "label": row["label"].replace("calm", "mild")} for row in labelled(24)]
    with pytest.raises(TrimtabError, match=r"its head has the labels watch, calm, storm"):
        finetune(make("other", said=other, adapter=str(first.adapter), plan=None))


def test_a_head_that_does_not_name_its_labels_is_told_which_it_is_taken_to_have(
    make: Callable[..., RunConfig], encoder: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=3)
    whole = {"modules_to_save": ["pooler", "classifier"], "target_modules": ["query"]}
    peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", r=2, **whole)).save_pretrained(tmp_path / "peft")
    begun = {"adapter": str(tmp_path / "peft"), "plan": None, "train": STILL}
    told, silent = Kept(), Kept()
    finetune(make("told", **begun), listener=told)
    finetune(make("silent", data={"choices": ["watch", "calm", "storm"]}, **begun), listener=silent)
    said = [[line for line in kept.remarks if "does not say what its rows mean" in line] for kept in (told, silent)]
    assert [len(lines) for lines in said] == [1, 0]
    assert "calm, storm, watch, in this order" in said[0][0]


@pytest.mark.parametrize("quantisation", ["int8", "nf4"])
def test_a_quantised_encoder_keeps_its_head_dense(make: Callable[..., RunConfig], quantisation: str) -> None:
    pytest.importorskip("bitsandbytes")
    folder = finetune(make(quantisation, quantisation=quantisation))
    model = load_run(folder.path).model
    assert type(model.classifier.base) is torch.nn.Linear
    assert type(model.bert.encoder.layer[0].attention.self.query.base) is not torch.nn.Linear
    assert all(torch.isfinite(tensor).all() for tensor in adapter_of(load_config(folder.config)).values())


@pytest.mark.parametrize(
    "train",
    [
        pytest.param({"learning_rate": "auto", "epochs": 6}, marks=pytest.mark.full),
        {"gradient_checkpointing": True},
        {"class_weights": "balanced", "gradient_accumulation": 2},
    ],
    ids=["auto", "checkpointing", "weights"],
)
def test_what_else_a_run_may_do(make: Callable[..., RunConfig], train: dict[str, Any]) -> None:
    listener = Kept()
    folder = finetune(make(data={"validation": 0.25}, train=train), listener=listener)
    losses = listener.column("loss")
    assert losses
    assert all(loss > 0 for loss in losses)
    assert read_json(folder.summary)["status"] == "finished"


def test_checkpointing_changes_no_number(make: Callable[..., RunConfig]) -> None:
    plain, less = make("plain"), make("less", train={"gradient_checkpointing": True})
    finetune(plain)
    finetune(less)
    ours, theirs = adapter_of(plain), adapter_of(less)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_a_rule_may_train_the_whole_encoder(make: Callable[..., RunConfig]) -> None:
    folder = finetune(make(plan=[{"match": "*", "method": "full"}]))
    with pytest.raises(PlanError):
        finetune(make("none", plan=[{"match": "*.nothing", "method": "lora"}]))
    assert Named.find(str(folder.path)).load()
