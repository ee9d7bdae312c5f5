"""Ties of transformers models through a merge: undone where an adapter asks for it, and kept everywhere else, on disk
as in memory. The tolerance is that of float32 sums taken in another order."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import trimtab

_SEQ2SEQ = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 2}
_BERT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "tie_word_embeddings": True,
}

MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "the flag scales, by the forward pass": ("SwitchTransformersForConditionalGeneration", _T5, "lm_head"),
    "the flag scales, by the forward pass of another": ("UMT5ForConditionalGeneration", _T5, "lm_head"),
    "the flag scales, once the configuration is read": ("LongT5ForConditionalGeneration", _T5, "lm_head"),
    "three ties": ("MarianMTModel", _SEQ2SEQ, "lm_head"),
    "three ties and a buffer": ("M2M100ForConditionalGeneration", _SEQ2SEQ, "lm_head"),
    "a tied bias beside the weight": ("BertForMaskedLM", _BERT, "cls.predictions.decoder"),
    "a tied bias in a head of another make": ("RobertaForMaskedLM", _BERT, "lm_head.decoder"),
}


def _built(name: str, sizes: dict[str, Any]) -> Any:
    kind = getattr(transformers, name)
    return kind(kind.config_class(**sizes)).eval()


def _logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 15).reshape(2, 6)
    with torch.no_grad():
        output = model(input_ids=ids, decoder_input_ids=ids[:, :4]) if model.config.is_encoder_decoder else model(ids)
        return output.logits


def _stir(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in trimtab.trainable_parameters(model).values():
            parameter.add_(0.3 * torch.randn_like(parameter))


def _groups(model: nn.Module) -> list[set[str]]:
    """The names that share a parameter, a set for each parameter that has more than one."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return sorted((group for group in names.values() if len(group) > 1), key=min)


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).detach().norm() / other.detach().norm()) < 1e-6


@pytest.mark.parametrize("case", MODELS)
def test_an_adapted_head_is_merged_saved_and_loaded_and_all_other_ties_stay(case: str, tmp_path: Path) -> None:
    name, sizes, head = MODELS[case]
    model = _built(name, sizes)
    bare, before = _logits(model), _groups(model)
    assert any(f"{head}.weight" in group for group in before)
    trimtab.attach(model, trimtab.Rule(match=head, method="lora", rank=3))
    _stir(model)
    adapted = _logits(model)
    assert not torch.allclose(adapted, bare, atol=1e-2)

    assert trimtab.merge(model).untied == (head,)
    assert _close(_logits(model), adapted)
    after = [group - {f"{head}.weight"} for group in before]
    assert _groups(model) == [group for group in after if len(group) > 1]
    model.tie_weights()
    assert _close(_logits(model), adapted), "tie_weights, as resizing calls it, ties what is left"

    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert _close(_logits(again), adapted)
    assert _groups(again) == _groups(model)


PARTS = [
    ["model.encoder.embed_tokens"],  # the rest stays tied
    ["model.shared"],  # which no pass reads, and from which the table of the model would tie the rest again
    ["model.encoder.embed_tokens", "model.decoder.embed_tokens"],  # tied to each other, which the table cannot say
    ["model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens"],
]


@pytest.mark.parametrize("match", PARTS, ids=len)
@pytest.mark.parametrize("method", ["dora", "full"])
def test_adapted_embeddings_are_merged_saved_and_loaded(method: str, match: list[str], tmp_path: Path) -> None:
    model = _built("MBartForConditionalGeneration", _SEQ2SEQ)
    trimtab.attach(model, trimtab.Rule(match=match, method=method, **({} if method == "full" else {"rank": 3})))
    _stir(model)
    adapted = _logits(model)
    report = trimtab.merge(model)
    assert len(set(report.untied)) == len(report.untied) > 0
    assert _close(_logits(model), adapted)
    model.save_pretrained(tmp_path)
    assert _close(_logits(type(model).from_pretrained(tmp_path).eval()), adapted)
    model.tie_weights()
    assert _close(_logits(model), adapted)


def test_embeddings_and_a_head_of_one_weight_take_one_adapter(tmp_path: Path) -> None:
    model = _built("MBartForConditionalGeneration", _SEQ2SEQ)
    before = _groups(model)
    report = trimtab.attach(model, trimtab.Rule(match=["*shared", "*embed_tokens", "lm_head"], method="lora", rank=2))
    assert sum(one.parameters > 0 for one in report.modules) == 1
    assert len(report.modules) == 4
    _stir(model)
    adapted = _logits(model)
    assert trimtab.merge(model).untied == ()
    assert _close(_logits(model), adapted)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert _groups(again) == _groups(model) == before
    assert _close(_logits(again), adapted)


def test_layers_of_one_weight_that_peft_trained_apart(tmp_path: Path) -> None:
    """PEFT gives each of two tied layers its own adapter, which they keep here: loaded, saved, loaded again, merged."""
    model = _Three(_Config()).eval()
    bare, x = copy.deepcopy(model), torch.randn(5, 6)
    config = peft.LoraConfig(r=2, target_modules=["a", "b", "c"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    expected = theirs.base_model.model(x)
    theirs.save_pretrained(tmp_path / "peft")
    trimtab.load_adapter(model, tmp_path / "peft")
    assert _close(model(x), expected)
    assert len({id(module.adapter) for module in (model.a, model.b, model.c)}) == 3
    trimtab.save_adapter(model, tmp_path / "ours")
    trimtab.load_adapter(bare, tmp_path / "ours")
    assert torch.equal(bare(x), model(x))
    trimtab.merge(model)
    assert _close(model(x), expected)
    model.save_pretrained(tmp_path / "merged")
    assert _close(_Three.from_pretrained(tmp_path / "merged").eval()(x), expected)


def test_a_merge_of_other_layers_changes_no_tie(tmp_path: Path) -> None:
    model = _built("MarianMTModel", _SEQ2SEQ)
    before = _groups(model)
    trimtab.attach(model, trimtab.Rule(match="all-linear", method="dora", rank=2))
    _stir(model)
    adapted = _logits(model)
    assert trimtab.merge(model).untied == ()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert _groups(again) == _groups(model) == before
    assert _close(_logits(again), adapted)


def test_a_merged_model_can_be_resized() -> None:
    """Resizing ties the weights again, and has to leave alone what the merge has undone."""
    model = _built("MBartForConditionalGeneration", _SEQ2SEQ)
    trimtab.attach(model, trimtab.Rule(match="lm_head", method="lora", rank=3))
    _stir(model)
    adapted = _logits(model)
    trimtab.merge(model)
    model.resize_token_embeddings(44, mean_resizing=False)
    assert _close(_logits(model)[..., :40], adapted)


def test_a_model_merged_twice(tmp_path: Path) -> None:
    model = _built("UMT5ForConditionalGeneration", _T5)
    for _ in range(2):
        trimtab.attach(model, trimtab.Rule(match=["lm_head", "*.q"], method="lora", rank=2))
        _stir(model)
        adapted = _logits(model)
        trimtab.merge(model)
        assert _close(_logits(model), adapted)
    model.save_pretrained(tmp_path)
    assert _close(_logits(type(model).from_pretrained(tmp_path).eval()), adapted)


class _Config(transformers.PretrainedConfig):
    model_type = "three-in-a-row"
    tie_word_embeddings = True


class _Three(transformers.PreTrainedModel):
    """Three layers with one weight: b and c are tied to a."""

    config_class = _Config
    _tied_weights_keys: dict[str, str] = {"b.weight": "a.weight", "c.weight": "a.weight"}  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.a

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class _Scaled(_Three):
    """One tie, which also scales."""

    _tied_weights_keys: dict[str, str] = {"c.weight": "a.weight"}  # noqa: RUF012

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.b(torch.tanh(self.a(x))))
        return self.c(hidden * 0.25 if self.config.tie_word_embeddings else hidden)


@pytest.mark.parametrize("kind", [_Three, _Scaled])
@pytest.mark.parametrize(
    "match", [["a"], ["b"], ["c"], ["a", "b"], ["b", "c"], ["a", "c"], ["a", "b", "c"]], ids="".join
)
def test_any_part_of_a_tie(kind: Callable[..., Any], match: list[str], tmp_path: Path) -> None:
    model = kind(_Config()).eval()
    assert model.c.weight is model.a.weight
    trimtab.attach(model, trimtab.Rule(match=match, method="lora", rank=3))
    _stir(model)
    x = torch.randn(5, 6)
    adapted = model(x)
    trimtab.merge(model)
    assert _close(model(x), adapted)
    model.save_pretrained(tmp_path)
    assert _close(kind.from_pretrained(tmp_path).eval()(x), adapted)  # type: ignore[attr-defined]
    model.tie_weights()
    assert _close(model(x), adapted)


def test_a_flag_that_says_one_tie_is_turned_off_and_any_other_stays() -> None:
    flags = {}
    for name, kind in {"one": "GPT2LMHeadModel", "three": "MarianMTModel"}.items():
        model = _built(kind, {**_SEQ2SEQ, "n_embd": 16, "n_layer": 1, "n_head": 2} if name == "one" else _SEQ2SEQ)
        trimtab.attach(model, trimtab.Rule(match="lm_head", method="lora", rank=2))
        trimtab.merge(model)
        flags[name] = model.config.tie_word_embeddings
    assert flags == {"one": False, "three": True}
