"""TRL's trainers with an attached model and no peft_config: what they save is an adapter folder, and it is what was
trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab
from adapted_models import logits
from sampling import sample

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's own, and what it still asks of transformers
WORDS = ["<pad>", "<eos>", "<unk>", "the", "harbour", "tug", "buoy", "is", "red", "green", "fast", "slow", "where"]
IDS = torch.tensor([[3, 4, 7, 8, 10, 11]])
TEXTS = ["the tug is fast", "the buoy is red", "where is the tug", "slow harbour"]
RULES = [trimtab.Rule(match="*_proj", method="dora", rank=2), trimtab.Rule(match="*.o_proj", method="dora", rank=3)]


@pytest.fixture
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.trainer import base_trainer

    monkeypatch.setattr(base_trainer, "send_telemetry", lambda **_: None)


def model_class(trainer: str) -> Any:
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    return LlamaForSequenceClassification if trainer == "reward" else LlamaForCausalLM


def store(trainer: str, folder: Path, **changes: int) -> Path:
    """The folder of a base: DPO and GRPO load their reference model from it, by its name."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, **changes}
    marks = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    config = LlamaConfig(vocab_size=len(WORDS), num_labels=1, **sizes, **marks)
    model_class(trainer)(config).save_pretrained(folder)
    return folder


def make(trainer: str, model: Any, tokenizer: Any, folder: Path, reference: Any = None, **options: Any) -> Any:
    import trl
    from datasets import Dataset

    common = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "save_steps": 2,
        "logging_steps": 100,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        **options,
    }
    pairs = [{"prompt": "the tug is", "chosen": " fast", "rejected": " green"}] * 4
    if trainer == "sft":
        rows = Dataset.from_list([{"text": text} for text in TEXTS])
        arguments = trl.SFTConfig(max_length=16, **common)
        return trl.SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    if trainer == "dpo":
        arguments = trl.DPOConfig(max_length=16, **common)
        rows = Dataset.from_list(pairs)
        return trl.DPOTrainer(model, reference, args=arguments, train_dataset=rows, processing_class=tokenizer)
    if trainer == "grpo":
        arguments = trl.GRPOConfig(num_generations=2, max_completion_length=4, beta=0.1, **common)
        return trl.GRPOTrainer(
            model,
            reward_funcs=lambda completions, **_: [float(text.count("fast")) - len(text) for text in completions],
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": text} for text in TEXTS]),
            processing_class=tokenizer,
        )
    rows = Dataset.from_list([{"chosen": "the tug is fast", "rejected": "the tug is green"}] * 4)
    arguments = trl.RewardConfig(max_length=16, **common)
    return trl.RewardTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)


@pytest.mark.parametrize("trainer", sample(["sft", "grpo", "reward", "dpo"], 4))
def test_a_trainer_saves_what_it_trained(trainer: str, tokenizer: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    base = store(trainer, tmp_path / "base")

    def load() -> Any:
        return model_class(trainer).from_pretrained(base, dtype=torch.float32)

    model = load()
    trimtab.attach(model, RULES)
    made = make(trainer, model, tokenizer, tmp_path / "run")
    made.train()
    right = logits(model, IDS)
    assert not torch.equal(right, logits(load(), IDS))
    made.save_model(str(tmp_path / "end"))
    for folder in (tmp_path / "run" / "checkpoint-2", tmp_path / "end"):
        assert not {"config.json", "model.safetensors"} & {path.name for path in folder.iterdir()}
        again = load()
        trimtab.load_adapter(again, folder)
        assert torch.equal(logits(again, IDS), right)
        assert torch.allclose(logits(PeftModel.from_pretrained(load(), folder), IDS), right, atol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("trainer", ["sft", "dpo"])
def test_a_head_that_is_read_in_parts_is_trained(trainer: str, method: str, tokenizer: Any, tmp_path: Path) -> None:
    """TRL takes log-probabilities from the head's weight, and does not call the head."""
    base = store(trainer, tmp_path / "base")
    model = model_class(trainer).from_pretrained(base, dtype=torch.float32)
    rank = {} if method == "full" else {"rank": 2}
    trimtab.attach(model, [*RULES, trimtab.Rule(match="lm_head", method=method, **rank)])
    before = trimtab.effective_weight(model, "lm_head")
    made = make(trainer, model, tokenizer, tmp_path / "run")
    made.train()
    assert not torch.equal(trimtab.effective_weight(model, "lm_head"), before)
    again = model_class(trainer).from_pretrained(base, dtype=torch.float32)
    trimtab.load_adapter(again, tmp_path / "run" / "checkpoint-2")
    assert torch.allclose(logits(again, IDS), logits(model, IDS), atol=1e-6)


@pytest.mark.full
def test_a_reward_head_that_was_unfrozen_is_trained_and_saved(tokenizer: Any, tmp_path: Path) -> None:
    base = store("reward", tmp_path / "base")
    model = model_class("reward").from_pretrained(base, dtype=torch.float32)
    trimtab.attach(model, RULES)
    model.score.requires_grad_(True)
    before = model.score.weight.detach().clone()
    make("reward", model, tokenizer, tmp_path / "run").train()
    assert not torch.equal(model.score.weight, before)
    again = model_class("reward").from_pretrained(base, dtype=torch.float32)
    trimtab.load_adapter(again, tmp_path / "run" / "checkpoint-2")
    assert torch.equal(logits(again, IDS), logits(model, IDS))


@pytest.mark.full
def test_the_bare_model_is_the_reference_of_dpo(tokenizer: Any, tmp_path: Path) -> None:
    """Its margins are of the log-probabilities with adapters against those without, which the context gives, too."""
    model = model_class("dpo").from_pretrained(store("dpo", tmp_path / "base"), dtype=torch.float32)
    trimtab.attach(model, RULES)
    made = make("dpo", model, tokenizer, tmp_path / "run", precompute_ref_log_probs=True)
    assert made.ref_model is None, "no second model in memory"
    with torch.no_grad():
        before = model(IDS).logits
    made.train()
    model.eval()
    assert not torch.equal(model(IDS).logits, before)
    with trimtab.disable_adapter(model), torch.no_grad():
        assert torch.allclose(model(IDS).logits, before, atol=1e-6)


@pytest.mark.full
def test_a_model_without_its_adapters_is_the_reference_of_dpo(tokenizer: Any, tmp_path: Path) -> None:
    """It trains what a reference model of its own would have it train, and nothing is loaded for that."""
    base = store("dpo", tmp_path / "base")

    def trained(with_reference: bool) -> Any:
        torch.manual_seed(0)
        model = model_class("dpo").from_pretrained(base, dtype=torch.float32)
        trimtab.attach(model, RULES)
        options = {"max_steps": 3}
        made = make(
            "dpo", model, tokenizer, tmp_path / "run", trimtab.reference(model) if with_reference else None, **options
        )
        made.train()
        if with_reference:
            assert {id(one) for one in made.ref_model.parameters()} == {id(one) for one in model.parameters()}
            assert torch.equal(made.ref_model(IDS).logits, logits(model_class("dpo").from_pretrained(base), IDS))
        return model

    assert torch.allclose(logits(trained(True), IDS), logits(trained(False), IDS), atol=1e-5)


@pytest.mark.full
def test_magnitudes_on_a_4_bit_base_are_not_rounded(tokenizer: Any, tmp_path: Path) -> None:
    """TRL casts the factors to bfloat16, as it does PEFT's; a magnitude would not move in it."""
    from transformers import BitsAndBytesConfig

    base = store("sft", tmp_path / "base", hidden_size=64, intermediate_size=64)
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = model_class("sft").from_pretrained(base, quantization_config=quantised, device_map="cpu")
    trimtab.attach(model, RULES)
    magnitude = model.model.layers[0].mlp.up_proj.adapter.magnitude
    start = magnitude.detach().clone()
    made = make("sft", model, tokenizer, tmp_path / "run", learning_rate=1e-5)
    assert magnitude.dtype == torch.bfloat16
    made.create_optimizer()
    assert magnitude.dtype == torch.float32
    assert torch.equal(magnitude, start)
    made.train()
    assert not torch.equal(magnitude, start)


@pytest.mark.full
def test_training_resumes_in_trl(tokenizer: Any, tmp_path: Path) -> None:
    base = store("sft", tmp_path / "base")

    def attached() -> Any:
        model = model_class("sft").from_pretrained(base, dtype=torch.float32)
        trimtab.attach(model, RULES)
        return model

    model, again = attached(), attached()
    make("sft", model, tokenizer, tmp_path / "run", max_steps=4).train()
    resumed = make("sft", again, tokenizer, tmp_path / "again", max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.allclose(logits(again, IDS), logits(model, IDS), atol=1e-6)


def test_the_bare_model_is_the_reference_that_dpo_loads(tokenizer: Any, tmp_path: Path) -> None:
    model = model_class("dpo").from_pretrained(store("dpo", tmp_path / "base"), dtype=torch.float32)
    trimtab.attach(model, RULES)
    made = make("dpo", model, tokenizer, tmp_path / "run")
    made.train()
    with trimtab.disable_adapter(model):
        assert torch.equal(logits(model, IDS), logits(made.ref_model, IDS))
    assert not torch.equal(logits(model, IDS), logits(made.ref_model, IDS))


def test_a_sped_up_peft_model_is_its_own_reference_in_dpo(tokenizer: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base, found = store("dpo", tmp_path / "base"), []
    for sped_up in (False, True):
        model = model_class("dpo").from_pretrained(base, dtype=torch.float32)
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=2, use_dora=True, target_modules="all-linear"))
        if sped_up:
            assert len(trimtab.speed_up(model).layers) == 14
        made = make("dpo", model, tokenizer, tmp_path / f"run-{sped_up}", max_steps=3, logging_steps=1)
        made.train()
        assert made.ref_model is None
        logged = [one for one in made.state.log_history if "loss" in one]
        kept = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected")
        found.append(torch.tensor([[one[name] for name in kept] for one in logged]))
        assert (tmp_path / f"run-{sped_up}" / "checkpoint-2" / "adapter_model.safetensors").exists()
    plain, quick = found
    assert plain.shape == (3, 4)
    assert plain[1:, 2:].abs().min() > 0  # it is no longer its own reference
    assert torch.allclose(quick, plain, rtol=2e-3, atol=1e-5)
