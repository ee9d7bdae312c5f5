"""Models of transformers that read weights of layers and do not call them: every adapter trains as the bare model with
the plain formula in place of its weights says, and outputs are those of the merged model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sampling
import trimtab
from trimtab.surgery.adapted import Adapted, AdaptedParameter, adapted_modules, bare_modules

IDS = torch.tensor([[3, 5, 7, 3, 11, 2], [2, 9, 0, 11, 4, 8]])


def wavlm() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import WavLMConfig, WavLMForSequenceClassification

    config = WavLMConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        num_feat_extract_layers=2,
        conv_dim=(8, 8),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=6,
        num_conv_pos_embedding_groups=3,
        num_buckets=8,
        max_bucket_distance=16,
        classifier_proj_size=8,
        apply_spec_augment=False,
        layerdrop=0.0,
    )
    return WavLMForSequenceClassification(config), {"input_values": torch.randn(2, 400)}


def xvector() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import Wav2Vec2Config, Wav2Vec2ForXVector

    config = Wav2Vec2Config(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=3,
        intermediate_size=20,
        num_feat_extract_layers=2,
        conv_dim=(8, 8),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=6,
        num_conv_pos_embedding_groups=3,
        tdnn_dim=(10, 10),
        tdnn_kernel=(3, 1),
        tdnn_dilation=(1, 1),
        xvector_output_dim=6,
        apply_spec_augment=False,
        layerdrop=0.0,
    )
    return Wav2Vec2ForXVector(config), {"input_values": torch.randn(2, 400)}


def mamba() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=19, hidden_size=12, state_size=4, num_hidden_layers=2, time_step_rank=3)
    return MambaForCausalLM(config), {"input_ids": IDS}


def falcon_mamba() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    config = FalconMambaConfig(vocab_size=19, hidden_size=12, state_size=4, num_hidden_layers=2, time_step_rank=3)
    return FalconMambaForCausalLM(config), {"input_ids": IDS}


def mamba2() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=19,
        hidden_size=12,
        state_size=4,
        num_hidden_layers=2,
        num_heads=6,
        head_dim=4,
        n_groups=2,
        chunk_size=4,
    )
    return Mamba2ForCausalLM(config), {"input_ids": IDS}


def t5() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=19,
        d_model=12,
        d_kv=4,
        d_ff=20,
        num_layers=2,
        num_heads=3,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config), {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}


def bert() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=19,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=16,
    )
    return BertForMaskedLM(config), {"input_ids": IDS}


def encoder() -> tuple[nn.Module, dict[str, Any]]:
    layer = nn.TransformerEncoderLayer(12, 2, 20, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), {"src": torch.randn(2, 5, 12)}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "wavlm": wavlm,
    "mamba": mamba,
    "t5": t5,
    "bert": bert,
    "encoder": encoder,
    "xvector": xvector,
    "falcon_mamba": falcon_mamba,
    "mamba2": mamba2,
}
METHODS: dict[str, dict[str, Any]] = {
    "dora, exact gradient": {"method": "dora", "rank": 2, "detach_norm": False},
    "lora": {"method": "lora", "rank": 2},
    "mora": {"method": "mora", "rank": 1},
}
CASES = [(model, method) for method in METHODS for model in MODELS]


def answer(model: Any, given: dict[str, Any]) -> Tensor:
    output = model(**given)
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found


def by_hand(layer: Any) -> Tensor:
    """The effective weight in terms of the adapter's tensors."""
    adapter, options, weight = layer.adapter, layer.adapter.options, layer.base.weight.detach()
    names = dict(adapter.named_parameters())
    total = weight + (adapter.delta(weight.dtype) if "M" in names else options.scale * adapter.B @ adapter.A)
    return total if adapter.magnitude is None else adapter.magnitude.unsqueeze(1) * nn.functional.normalize(total)


@pytest.mark.parametrize(("name", "method"), sampling.sample(CASES, 3, always=CASES[:5]))
def test_every_adapter_trains_as_the_bare_model_with_the_formula_in_it(name: str, method: str) -> None:
    torch.manual_seed(2)
    model, given = MODELS[name]()
    model = model.double().eval()
    given = {key: one.double() if one.is_floating_point() else one for key, one in given.items()}
    bare, before = copy.deepcopy(model), answer(model, given).detach()
    trimtab.attach(model, trimtab.Rule(match="all-linear", **METHODS[method]))
    assert torch.allclose(answer(model, given), before, rtol=1e-10, atol=1e-10)
    trained = trimtab.trainable_parameters(model)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    weights = {}
    for place, module in bare_modules(model):
        if isinstance(module, AdaptedParameter):
            weights[place] = by_hand(module)
        elif isinstance(module, Adapted):
            weights[f"{place}.weight"] = by_hand(module)
    assert len(weights) == len(list(adapted_modules(model)))
    output, want = answer(model, given), answer(_With(bare, weights), given)
    assert torch.allclose(output, want, rtol=1e-6, atol=1e-6)
    upstream = torch.randn_like(want)
    found = torch.autograd.grad((output * upstream).sum(), list(trained.values()))
    expected = torch.autograd.grad((want * upstream).sum(), list(trained.values()))
    for key, one, other in zip(trained, found, expected, strict=True):
        assert bool(other.any()), key
        assert float((one - other).norm()) <= 1e-5 * float(other.norm()), key
    merged = copy.deepcopy(model)
    trimtab.merge(merged)
    assert torch.allclose(answer(merged, given), output, rtol=1e-6, atol=1e-6)


class _With:
    """A model called with other tensors in the place of some of its own."""

    def __init__(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        self._model, self._weights = model, weights

    def __call__(self, **given: Any) -> Any:
        return torch.func.functional_call(self._model, self._weights, (), given, tie_weights=False)


def test_t5_looks_at_weights_without_computing_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = t5()
    trimtab.attach(model, trimtab.Rule(match="all-linear", method="dora", rank=2))
    calls: list[str] = []
    for name, module in model.named_modules():
        if hasattr(module, "acting_weight"):
            monkeypatch.setattr(module, "acting_weight", lambda handle, name=name: calls.append(name))
    answer(model, given)
    assert not calls
