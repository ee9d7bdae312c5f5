"""Tiny random models with experts, of every way in which a model keeps and multiplies them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}


def qwen3_moe() -> nn.Module:
    """``[experts, out, in]``, a shared scheme of transformers."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    own = {"intermediate_size": 24, "moe_intermediate_size": 24, "num_experts": 5}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **own))


def gpt_oss() -> nn.Module:
    """``[experts, in, out]`` with biases, gate and up interleaved."""
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(GptOssConfig(**SIZES, intermediate_size=24, num_local_experts=3))


def llama4() -> nn.Module:
    """``[experts, in, out]``, all rows through all experts in one batched product."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    own = {"intermediate_size": 12, "intermediate_size_mlp": 20, "num_local_experts": 3, "interleave_moe_layer_step": 1}
    return Llama4ForCausalLM(Llama4TextConfig(**SIZES | {"num_experts_per_tok": 1}, **own))


def jetmoe() -> nn.Module:
    """``weight [experts, out, in]`` of modules called with rows sorted by expert; its attention has experts, too."""
    from transformers import JetMoeConfig, JetMoeForCausalLM

    own = {"intermediate_size": 12, "num_local_experts": 3, "kv_channels": 8}
    sizes = {name: value for name, value in SIZES.items() if name not in ("head_dim", "num_attention_heads")}
    return JetMoeForCausalLM(JetMoeConfig(**sizes, **own))


def dbrx() -> nn.Module:
    """``[experts * rows, columns]``, cut into experts at every pass; one of its three stacks is ``[in, out]``."""
    from transformers import DbrxConfig, DbrxForCausalLM

    ffn = {"ffn_hidden_size": 12, "moe_num_experts": 3, "moe_top_k": 2, "hidden_size": 16}
    attention = {"kv_n_heads": 1, "clip_qkv": 8, "rope_theta": 10000.0}
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 2, "vocab_size": 40, "max_seq_len": 64}
    return DbrxForCausalLM(DbrxConfig(**sizes, ffn_config=ffn, attn_config=attention, pad_token_id=0))


def mixtral() -> nn.Module:
    """As Qwen3-MoE; its modules had other names in transformers 4."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=5))


MODELS = {
    "qwen3_moe": qwen3_moe,
    "gpt_oss": gpt_oss,
    "llama4": llama4,
    "jetmoe": jetmoe,
    "mixtral": mixtral,
    "dbrx": dbrx,
}


class OwnExperts(nn.Module):
    """Experts in a way that the library has never seen: every row through every expert, weighed."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 3
        self.inner = nn.Parameter(torch.randn(3, 6, 4))
        self.outer = nn.Parameter(torch.randn(3, 4, 6))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        inner = torch.einsum("eoi,ti->teo", self.inner, x).tanh()
        return torch.einsum("eoi,tei,te->to", self.outer, inner, weights)


class OwnModel(nn.Module):
    """``OwnExperts`` behind a router."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = OwnExperts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.router(x).softmax(-1))


def implementations(model: nn.Module) -> list[str]:
    """The ways in which transformers lets ``model`` multiply its experts."""
    decorated = any(hasattr(module, "is_transposed") for module in model.modules())
    return ["eager", "batched_mm", "grouped_mm"] if decorated else ["eager"]


def made(name: str, dtype: torch.dtype = torch.float32, implementation: str = "eager") -> Any:
    """The model called ``name`` with the same random values each time."""
    torch.default_generator.manual_seed(4)
    model: Any = MODELS[name]().to(dtype)
    for module in model.modules():  # transformers leaves Llama 4's experts without values
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dim() == 3:
                nn.init.normal_(parameter, std=0.2)
    if len(implementations(model)) > 1:
        model.set_experts_implementation(implementation)
    return model


def tokens() -> Tensor:
    return torch.randint(1, 40, (2, 7), generator=torch.Generator().manual_seed(5))
