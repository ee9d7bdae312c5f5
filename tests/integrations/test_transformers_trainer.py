"""transformers' own Trainer with an adapted model: what its checkpoints are, and how it comes back to them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments

import trimtab
from adapted_models import logits
from trimtab.integrations import transformers_trainer

Load = Callable[..., Any]
RULES = {
    "dora": [trimtab.Rule(match="*.c_attn", method="dora", rank=2)],
    "mora and full": [
        trimtab.Rule(match="*.c_attn", method="mora", rank=2),
        trimtab.Rule(match="*.0.mlp.c_proj", method="full"),
    ],
}


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, count: int = 8) -> None:
        generator = torch.Generator().manual_seed(3)
        self.rows = torch.randint(2, 40, (count, 6), generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[place], "labels": self.rows[place]}


def trainer(model: nn.Module, folder: Path, *, steps: int = 2, **options: Any) -> Any:
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": steps,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.05,
            "lr_scheduler_type": "constant",
            "save_steps": 2,
            "logging_steps": 100,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            **options,
        },
    )
    return Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows(2))


def same(folder: Path, base: Any) -> Tensor:
    trimtab.load_adapter(base, folder)
    return logits(base)


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_a_checkpoint_is_an_adapter_folder_and_training_resumes_from_it(
    rules: list[trimtab.Rule], stored_gpt2: Path, load: Load, tmp_path: Path
) -> None:
    model = load(stored_gpt2)
    trimtab.attach(model, rules)
    whole = trainer(model, tmp_path / "run", steps=4)
    whole.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    names = {path.name for path in checkpoint.iterdir()}
    assert not names & {"config.json", "model.safetensors"}
    assert torch.equal(same(tmp_path / "run" / "checkpoint-4", load(stored_gpt2)), logits(model))
    again = load(stored_gpt2)
    trimtab.attach(again, rules)
    trainer(again, tmp_path / "again", steps=4).train(resume_from_checkpoint=str(checkpoint))
    assert torch.allclose(logits(again), logits(model), atol=1e-6)
    whole.save_model(str(tmp_path / "end"))
    assert torch.equal(same(tmp_path / "end", load(stored_gpt2)), logits(model))


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_the_best_model_is_loaded_at_the_end(
    rules: list[trimtab.Rule], stored_gpt2: Path, load: Load, tmp_path: Path
) -> None:
    model = load(stored_gpt2)
    trimtab.attach(model, rules)
    trained = trainer(
        model,
        tmp_path,
        steps=6,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the worst, so that the best is not the last one
    )
    trained.train()
    best = Path(trained.state.best_model_checkpoint)
    assert best.name != "checkpoint-6"
    assert torch.equal(same(best, load(stored_gpt2)), logits(model))


def test_what_was_unfrozen_by_hand_is_in_the_checkpoints_too(stored_gpt2: Path, load: Load, tmp_path: Path) -> None:
    def unfrozen() -> Any:
        model = load(stored_gpt2)
        trimtab.attach(model, RULES["dora"])
        model.transformer.ln_f.requires_grad_(True)
        model.transformer.h[1].attn.c_attn.bias.requires_grad_(True)
        return model

    model, again = unfrozen(), unfrozen()
    trainer(model, tmp_path / "run", steps=4).train()
    checkpoints = tmp_path / "run"
    assert torch.allclose(same(checkpoints / "checkpoint-4", load(stored_gpt2)), logits(model), atol=1e-6)
    trainer(again, tmp_path / "again", steps=4).train(resume_from_checkpoint=str(checkpoints / "checkpoint-2"))
    assert torch.allclose(logits(again), logits(model), atol=1e-6)


def test_what_no_checkpoint_could_hold_is_refused_before_the_first_step(
    stored_gpt2: Path, load: Load, tmp_path: Path
) -> None:
    model = load(stored_gpt2)
    trimtab.attach(model, RULES["dora"])
    model.requires_grad_(True)
    with pytest.raises(trimtab.AdapterError, match=r"c_attn\.weight is trained or counted itself"):
        trainer(model, tmp_path / "run").train()


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_the_hub_gets_what_a_checkpoint_holds(
    rules: list[trimtab.Rule], stored_gpt2: Path, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import trainer as module

    pushed: list[set[str]] = []

    class Api:
        def upload_folder(self, folder_path: str, **_: Any) -> Any:
            pushed.append({path.name for path in Path(folder_path).iterdir() if path.is_file()})

    monkeypatch.setattr(module, "hf_api", Api)
    model = load(stored_gpt2)
    trimtab.attach(model, rules)
    made = trainer(model, tmp_path / "run")
    made.train()
    made.hub_model_id, made.push_in_progress = "someone/adapter", None
    made._push_from_checkpoint(str(tmp_path / "run" / "checkpoint-2"))
    wanted = {
        path.name
        for path in (tmp_path / "run" / "checkpoint-2").iterdir()
        if path.name.startswith(("adapter", "trimtab"))
    }
    assert wanted
    assert wanted <= pushed[0]


def test_a_4_bit_base_is_trained(stored_gpt2: Path, tiny_llama: Callable[..., Any], load: Load, tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(folder)
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = load(folder, quantization_config=quantised, device_map="cpu")
    trimtab.attach(model, trimtab.Rule(match="*_proj", method="dora", rank=2))
    before = logits(model)
    trainer(model, tmp_path / "run").train()
    assert not torch.equal(logits(model), before)
    again = load(folder, quantization_config=quantised, device_map="cpu")
    assert torch.equal(same(tmp_path / "run" / "checkpoint-2", again), logits(model))
    trimtab.detach(model)
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(model, tmp_path / "bare")


class Tagger(nn.Module):
    """A model that is not transformers'."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 8)
        self.out = nn.Linear(8, 40)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        scores = self.out(self.table(input_ids))
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), input_ids.flatten())
        return {"loss": loss, "logits": scores}


def test_a_model_of_ones_own_is_saved_as_an_adapter_and_resumed(tmp_path: Path) -> None:
    torch.manual_seed(1)
    base = Tagger()
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}

    def fresh() -> Tagger:
        model = Tagger()
        model.load_state_dict(state)
        return model

    model = fresh()
    trimtab.attach(model, trimtab.Rule(match="out", method="dora", rank=2))
    trainer(model, tmp_path / "run", steps=4).train()
    again = fresh()
    trimtab.attach(again, trimtab.Rule(match="out", method="dora", rank=2))
    trainer(again, tmp_path / "again", steps=4).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    ids = Rows().rows
    assert torch.allclose(again(ids)["logits"], model(ids)["logits"], atol=1e-6)
    loaded = fresh()
    trimtab.load_adapter(loaded, tmp_path / "run" / "checkpoint-4")
    assert torch.equal(loaded(ids)["logits"], model(ids)["logits"])
    assert not (tmp_path / "run" / "checkpoint-4" / "model.safetensors").exists()


def test_a_model_without_adapters_is_saved_as_before(stored_gpt2: Path, load: Load, tmp_path: Path) -> None:
    transformers_trainer.teach(Trainer)
    model = load(stored_gpt2)
    trainer(model, tmp_path / "run", steps=4).train()
    names = {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert {"config.json", "model.safetensors"} <= names
    adapted = load(stored_gpt2)
    trimtab.attach(adapted, RULES["dora"])
    with pytest.raises(trimtab.AdapterError, match="a model without adapters"):
        trainer(adapted, tmp_path / "other").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    again = load(stored_gpt2)
    resumed = trainer(again, tmp_path / "again", steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.allclose(logits(again), logits(model), atol=1e-6)


def test_the_trainer_is_taught_once() -> None:
    transformers_trainer.teach(Trainer)
    methods = Trainer._save, Trainer._load_from_checkpoint, Trainer._load_best_model
    transformers_trainer.teach(Trainer)
    assert methods == (Trainer._save, Trainer._load_from_checkpoint, Trainer._load_best_model)


@pytest.mark.full
def test_a_trainer_that_is_imported_after_the_adapters_is_taught_too(
    stored_gpt2: Path, load: Load, tmp_path: Path
) -> None:
    """Also where the model comes from a pickle, and nothing was attached in this process."""
    model = load(stored_gpt2)
    trimtab.attach(model, RULES["dora"])
    torch.save(model, tmp_path / "model.pt")
    attached = """
import sys, torch, trimtab
model = torch.nn.Sequential(torch.nn.Linear(3, 3))
trimtab.attach(model, trimtab.Rule(match="0", method="lora", rank=1))
assert "transformers.trainer" not in sys.modules
"""
    unpickled = f"import torch; model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)"
    for program in (attached, unpickled):
        code = f"{program}\nfrom transformers import Trainer\nassert hasattr(Trainer._load_best_model, 'trimtab_wraps')"
        subprocess.run([sys.executable, "-c", code], check=True)
