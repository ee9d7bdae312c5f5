"""The engine over other bases than plain weights, and with adapters that PEFT wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from run_fixtures import bare_runs, model_folder, own_cache
from sampling import sample
from tiny_engines import asked, engine_of, text_of
from tiny_gguf import write_gguf
from tiny_runs import rows, tiny_model, write_config, write_model, write_rows
from trimtab.asking import Asked, Drawing
from trimtab.config.read import load_config
from trimtab.runs.load import load_run
from trimtab.serving.engine import Engine
from trimtab.serving.requests import Request
from trimtab.training.run import finetune

__all__ = ["bare_runs", "model_folder", "own_cache"]

PROMPTS = ("Message: fog at noon\nAnswer:", "Message: the crane is free , no wind today\nAnswer:")
DRAWING = Drawing(max_new_tokens=10)


def run_on(folder: Path, base: Path, sections: dict[str, Any]) -> Path:
    """A finished run of few steps."""
    train = write_rows(folder / "train.jsonl", rows(12))
    return finetune(load_config(write_config(folder / "run.yaml", base, train, **sections))).path


def said_alone(run: Path, *, adapter: bool = True) -> list[str]:
    loaded = load_run(run, adapter=adapter)
    asking = Asked(loaded.model, loaded.reader)
    return [asking.write(prompt, DRAWING, lambda _: None).text for prompt in PROMPTS]


BASES: dict[str, dict[str, Any]] = {
    "int8": {"quantisation": "int8"},
    "nf4": {"quantisation": "nf4"},
    "torchao": {"quantisation": "torchao_int8"},
    "full": {"plan": [{"match": "all-linear", "method": "full"}]},
    "gguf": {},
    "tokens": {
        "model": {"add_tokens": ["<tool>"]},
        "plan": [{"match": "*.q_proj", "method": "lora", "rank": 2}],
    },
    "words": {"plan": [{"match": ["*embed_tokens", "*.q_proj"], "method": "dora", "rank": 2}]},
    "mixed": {
        "plan": [
            {"match": "all-linear", "method": "mora", "rank": 4},
            {"match": "*.v_proj", "method": "full"},
            {"match": "*.q_proj", "method": "dora", "rank": 2},
        ]
    },
}


@pytest.mark.parametrize("kind", sample(list(BASES), 3, always=["nf4"]))
def test_a_run_is_served_as_it_answers_alone(kind: str, bare_runs: None, tmp_path: Path) -> None:
    model = tmp_path / "tiny.gguf"
    if kind == "gguf":
        write_gguf(model)
    else:
        model = write_model(tmp_path / "tiny", hidden_size=64, intermediate_size=64)
    run = run_on(tmp_path, model, BASES[kind])
    with Engine.open(str(run)) as engine:
        base, own = (one.name for one in engine.models())
        tickets = [
            [engine.submit(asked(engine, name, prompt, max_new_tokens=10)) for prompt in PROMPTS]
            for name in (own, base)
        ]
        said = [[text_of(ticket) for ticket in some] for some in tickets]
    assert said == [said_alone(run), said_alone(run, adapter=False)]
    assert said[0] != said[1]


PEFT: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "down_proj"]},
    "dora": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "rslora": {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 4},
    "head": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    "words": {"target_modules": ["q_proj", "embed_tokens"]},
    "pattern": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 9}},
}


@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.", "ignore:Model has .tie_word_embeddings")
@pytest.mark.parametrize("tied", [False, True])
def test_adapters_that_peft_wrote_answer_as_in_peft(tied: bool, tmp_path: Path) -> None:
    kinds = {name: one for name, one in PEFT.items() if not (tied and name == "head")}
    folders, logits = {}, {}
    probe = torch.tensor([[5, 40, 60, 7, 80, 33]])
    for seed, (name, options) in enumerate(kinds.items()):
        wrapped = peft.get_peft_model(tiny_model(tie_word_embeddings=tied), peft.LoraConfig(r=2, **options)).eval()
        torch.manual_seed(seed)
        with torch.no_grad():
            for one in wrapped.parameters():
                if one.requires_grad:
                    one.add_(0.1 * torch.randn_like(one))
            logits[name] = wrapped(probe).logits[0, -1].log_softmax(-1)
        wrapped.save_pretrained(folders.setdefault(name, tmp_path / name))
    with engine_of(tiny_model(tie_word_embeddings=tied), folders) as engine:
        request = {"prompt": tuple(probe[0].tolist()), "max_new_tokens": 1, "logprobs": 400, "ignore_end": True}
        tickets = {name: engine.submit(Request(name, **request)) for name in kinds}
        for name, ticket in tickets.items():
            (chosen,) = (one for piece in ticket for one in piece.chosen)
            got = torch.tensor([one.logprob for one in sorted(chosen.top, key=lambda one: one.token)])
            torch.testing.assert_close(got, logits[name], rtol=1e-4, atol=1e-4)
        assert engine.stats().notes == ()


def test_an_adapter_of_another_model_is_told(tmp_path: Path) -> None:
    own, other = write_model(tmp_path / "own"), write_model(tmp_path / "other", initializer_range=0.3)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(own), config).save_pretrained(tmp_path / "legal")
    with Engine.open(str(own), {"legal": tmp_path / "legal"}) as engine:
        assert engine.stats().notes == ()
    with Engine.open(str(other), {"legal": tmp_path / "legal"}) as engine:
        assert engine.stats().notes == (f"the adapter says that it was made for own, and the model is {other}",)
