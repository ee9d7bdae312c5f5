"""save_pretrained and what else transformers asks of a model with adapters; copies; and the model afterwards."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import trimtab
from adapted_models import IDS, change, logits

Load = Callable[..., Any]
PEFT_FILES = ["adapter_config.json", "adapter_model.safetensors"]
RULES = {
    "dora": trimtab.Rule(match=["*.c_attn", "*.c_proj"], method="dora", rank=3, alpha=5),
    "lora, rank stabilised": trimtab.Rule(match="*.c_fc", method="lora", rank=2, rank_stabilised=True),
    "mora": trimtab.Rule(match="*.c_attn", method="mora", rank=4),
}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_save_pretrained_writes_the_adapter_and_no_base(
    rule: trimtab.Rule, stored_gpt2: Path, load: Load, tmp_path: Path
) -> None:
    model = load(stored_gpt2)
    trimtab.attach(model, rule)
    change(model)
    model.save_pretrained(tmp_path / "adapter", max_shard_size="1KB")
    ours = ["trimtab.json", "trimtab_adapter.safetensors"]
    assert files(tmp_path / "adapter") == (ours if rule.method == "mora" else PEFT_FILES)
    again = load(stored_gpt2)
    trimtab.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_from_pretrained_of_the_adapter_folder_is_right(stored_gpt2: Path, load: Load, tmp_path: Path) -> None:
    """Of LoRA. What transformers 5.23 makes of a folder with magnitudes, PEFT's own or ours, lacks them, and it says so
    in its loading report; PeftModel.from_pretrained reads them."""
    model = load(stored_gpt2)
    trimtab.attach(model, RULES["lora, rank stabilised"])
    change(model)
    model.save_pretrained(tmp_path / "adapter")
    again = load(tmp_path / "adapter")  # transformers finds the base by its name, and lets PEFT do the rest
    assert type(again) is type(model)
    assert torch.allclose(logits(again), logits(model), atol=1e-6)


def test_peft_reads_the_saved_magnitudes(stored_gpt2: Path, load: Load, tmp_path: Path) -> None:
    from peft import PeftModel

    model = load(stored_gpt2)
    trimtab.attach(model, RULES["dora"])
    change(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.allclose(
        logits(PeftModel.from_pretrained(load(stored_gpt2), tmp_path / "adapter")), logits(model), atol=1e-6
    )


def test_from_pretrained_of_our_own_layout_is_an_error(stored_gpt2: Path, load: Load, tmp_path: Path) -> None:
    model = load(stored_gpt2)
    trimtab.attach(model, RULES["mora"])
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises((OSError, ValueError)):
        load(tmp_path / "adapter")


@pytest.mark.parametrize("end", [trimtab.merge, trimtab.detach])
def test_afterwards_the_model_saves_as_it_did(
    end: Callable[[nn.Module], Any], stored_gpt2: Path, load: Load, tmp_path: Path
) -> None:
    model = load(stored_gpt2)
    attributes = [set(vars(module)) for module in model.modules()]
    trimtab.attach(model, RULES["dora"])
    change(model)
    right = logits(model) if end is trimtab.merge else logits(load(stored_gpt2))
    end(model)
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert model._hf_peft_config_loaded is False
    model.save_pretrained(tmp_path / "whole")
    assert {"config.json", "model.safetensors"} <= set(files(tmp_path / "whole"))
    assert torch.allclose(logits(load(tmp_path / "whole")), right, atol=1e-6)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_saves_its_own_adapter(how: Callable[[Any], Any], stored_gpt2: Path, load: Load, tmp_path: Path) -> None:
    model = load(stored_gpt2)
    trimtab.attach(model, RULES["dora"])
    change(model)
    twin = how(model)
    right = logits(model)
    change(twin)
    twin.save_pretrained(tmp_path / "twin")
    model.save_pretrained(tmp_path / "model")
    for folder, wanted in (("twin", logits(twin)), ("model", right)):
        again = load(stored_gpt2)
        trimtab.load_adapter(again, tmp_path / folder)
        assert torch.equal(logits(again), wanted)
    trimtab.detach(twin)
    assert "save_pretrained" not in vars(twin)
    assert model._hf_peft_config_loaded, "the other one still has its adapters"


def test_a_model_inside_another_saves_its_part(stored_gpt2: Path, load: Load, tmp_path: Path) -> None:
    class Scorer(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model, self.score = model, nn.Linear(16, 1)

    scorer = Scorer(load(stored_gpt2).transformer)
    trimtab.attach(scorer, RULES["dora"])
    scorer.model.save_pretrained(tmp_path)
    assert files(tmp_path) == ["adapter_config.json", "adapter_model.safetensors", "base"]
    assert "base_model.model.h.0.attn.c_attn.lora_A.weight" in load_file(tmp_path / PEFT_FILES[1])


def test_whole_tensors_of_a_state_dict_are_taken(stored_gpt2: Path, load: Load, tmp_path: Path) -> None:
    model = load(stored_gpt2)
    trimtab.attach(model, RULES["dora"])
    state = {name: tensor + 1 if ".adapter." in name else tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "adapter", state_dict=state)
    stored = load_file(tmp_path / "adapter" / PEFT_FILES[1])
    assert torch.equal(
        stored["base_model.model.transformer.h.0.mlp.c_proj.lora_B.weight"],
        state["transformer.h.0.mlp.c_proj.adapter.B"],
    )
    assert torch.equal(model.transformer.h[0].mlp.c_proj.adapter.B, torch.zeros(16, 3)), "the model is as it was"


def test_only_the_main_process_writes(stored_gpt2: Path, load: Load, tmp_path: Path) -> None:
    model = load(stored_gpt2)
    trimtab.attach(model, RULES["dora"])
    model.save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert not (tmp_path / "adapter").exists()


def test_the_hub_gets_the_adapter(
    stored_gpt2: Path, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import hub

    sent: list[tuple[str, str | None, list[str]]] = []

    class Api:
        def create_repo(self, name: str, **_: Any) -> Any:
            return type("Repository", (), {"repo_id": name})

    class Card:
        def save(self, path: str) -> None:
            Path(path).write_text("", "utf-8")

    def upload(self: Any, folder: str, repository: str, commit_message: str | None = None, **_: Any) -> None:
        sent.append((repository, commit_message, files(Path(folder))))

    monkeypatch.setattr(hub, "hf_api", Api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: Card())
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    model = load(stored_gpt2)
    trimtab.attach(model, RULES["dora"])
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "notes.txt").write_text("mine", "utf-8")
    model.save_pretrained(tmp_path / "adapter", push_to_hub=True, repo_id="someone/one", commit_message="first")
    model.save_pretrained(tmp_path / "adapter", push_to_hub=True)
    model.push_to_hub("someone/two")
    wanted = ["README.md", *PEFT_FILES]
    assert sent == [("someone/one", "first", wanted), ("adapter", None, wanted), ("someone/two", None, wanted)]


def test_what_transformers_knows_of_adapters_is_right(stored_gpt2: Path, load: Load, tmp_path: Path) -> None:
    from peft import LoraConfig

    model = load(stored_gpt2)
    bare = logits(model)
    trimtab.attach(model, RULES["dora"])
    change(model)
    right = logits(model)
    assert model.active_adapters() == ["default"]
    model.save_pretrained(tmp_path / "adapter")
    state, stored = model.get_adapter_state_dict(), load_file(tmp_path / "adapter" / PEFT_FILES[1])
    assert {f"base_model.model.{name}" for name in state} == set(stored)
    assert all(torch.equal(tensor, stored[f"base_model.model.{name}"]) for name, tensor in state.items())
    model.disable_adapters()
    assert torch.equal(logits(model), bare)
    assert model.active_adapters() == []
    model.set_adapter("default")
    assert torch.equal(logits(model), right)
    for call in (
        lambda: model.add_adapter(LoraConfig()),
        lambda: model.load_adapter(tmp_path / "adapter"),
        lambda: model.delete_adapter("other"),
        lambda: model.set_adapter("other"),
        lambda: model.set_adapter(["default", "default"]),
    ):
        with pytest.raises(trimtab.SurgeryError, match=r"trimtab|no adapter 'other', but 'default'"):
            call()
    assert torch.equal(logits(model), right)
    trimtab.attach(model, RULES["mora"], name="other")
    assert model.active_adapters() == ["other"]
    assert set(model.get_adapter_state_dict("default")) == set(state)
    model.set_adapter("default")
    assert torch.equal(logits(model), right)
    model.delete_adapter(["other", "default"])
    assert torch.equal(logits(model), bare)
    assert "active_adapters" not in vars(model), "transformers' own methods are back"


def test_a_frozen_embedding_lets_gradients_through_checkpointed_blocks(stored_gpt2: Path, load: Load) -> None:
    model = load(stored_gpt2).train()
    trimtab.attach(model, RULES["dora"])
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in trimtab.trainable_parameters(model).values())
    model.activation_checkpointing_disable()
    trimtab.detach(model)
    assert not model.is_activation_checkpointing
