"""The trainers of sentence-transformers, which load and save in ways of their own. The package is not needed: a trainer
stands for theirs that does the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trimtab
from trimtab.integrations.sentence_transformers import teach

pytestmark = pytest.mark.filterwarnings("ignore")  # of what the trainer asks of transformers
IDS = torch.arange(3, 11)
RULE = trimtab.Rule(match="all-linear", method="dora", rank=2)


class Texts(nn.Module):
    """A model with one of transformers inside, which saves what that saves, and a layer behind it."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside
        self.behind = nn.ModuleDict({"dense": nn.Linear(1, 1)})

    def forward(self, input_ids: Any, labels: Any) -> Any:
        output = self.inside(input_ids=input_ids, labels=labels)
        output.loss = self.behind["dense"](output.loss.view(1, 1)).square().sum()
        return output

    def save_pretrained(self, folder: str) -> None:
        self.inside.save_pretrained(folder)


def trainer_of(model: nn.Module, folder: Path, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    class Theirs(Trainer):
        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            self.model.save_pretrained(output_dir or self.args.output_dir)

        def _load_from_checkpoint(self, checkpoint_path: str) -> None:
            raise RuntimeError("Missing key(s) in state_dict")

        def _load_best_model(self) -> None:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    teach(Theirs)
    common = {"max_steps": 4, "save_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(str(folder), **{**common, "learning_rate": 0.05, "logging_steps": 100, **options})
    rows = [{"input_ids": IDS + place, "labels": IDS + place} for place in range(8)]
    return Theirs(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:2])


def weights(model: Any) -> list[torch.Tensor]:
    return [one.detach().clone() for one in trimtab.trainable_parameters(model).values()]


def test_training_resumes_and_takes_the_best(tiny_gpt2: Callable[..., nn.Module], tmp_path: Path) -> None:
    base = tiny_gpt2().state_dict()

    def make() -> Texts:
        model = Texts(tiny_gpt2())
        model.inside.load_state_dict(base)
        nn.init.ones_(model.behind["dense"].weight)
        trimtab.attach(model.inside, RULE)
        model.behind.requires_grad_(False)
        return model

    model, resumed = make(), make()
    trainer_of(model, tmp_path / "a").train()
    trainer_of(resumed, tmp_path / "b").train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for one, other in zip(weights(model), weights(resumed), strict=True):
        torch.testing.assert_close(one, other)

    model, best = make(), make()
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 5.0}
    trainer = trainer_of(model, tmp_path / "c", **options)
    trainer.train()
    trimtab.load_adapter(best.inside, trainer.state.best_model_checkpoint)
    for one, other in zip(weights(model), weights(best), strict=True):
        assert torch.equal(one, other)


def test_what_a_checkpoint_would_lack_is_refused_before_training(
    tiny_gpt2: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model = Texts(tiny_gpt2())
    trimtab.attach(model, RULE)
    with pytest.raises(trimtab.AdapterError, match=r"behind.dense.adapter.* is trained outside of the transformers"):
        trainer_of(model, tmp_path).train()
    trainer_of(model, tmp_path, save_strategy="no", max_steps=1).train()


def test_their_trainer_is_taught() -> None:
    trainer = pytest.importorskip("sentence_transformers.base.trainer").BaseTrainer
    assert hasattr(trainer._load_from_checkpoint, "trimtab_wraps_sentences")
