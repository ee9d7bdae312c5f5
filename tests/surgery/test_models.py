"""Adapters inside whole models: Llama, GPT-2, and PyTorch's own encoder layer with its fast path."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import trimtab
from trimtab.surgery.adapted import Adapted, adapted_modules

RULES = [
    trimtab.Rule(match="all-linear", method="dora", rank=2),
    trimtab.Rule(match=["*.v_proj", "*.mlp.c_fc"], method="mora", rank=2, magnitude=True),
    trimtab.Rule(match=["*.down_proj", "*.mlp.c_proj"], method="lora", rank=2, layers="outer:1"),
    trimtab.Rule(match=["*.up_proj", "*.attn.c_proj"], method="full", layers="1"),
]


def stir(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in trimtab.trainable_parameters(model).items():
            if name.endswith("magnitude"):
                parameter.mul_(0.9 + 0.2 * torch.rand_like(parameter))
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2"])
def test_a_mix_of_all_methods(kind: str, request: pytest.FixtureRequest) -> None:
    make: Callable[..., nn.Module] = request.getfixturevalue(kind)
    model = make()
    ids = torch.randint(0, 40, (3, 9))
    bare = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(ids).logits
    report = trimtab.attach(model, trimtab.Plan(RULES))
    assert {module.method for module in report.modules} == {"lora", "dora", "mora", "full"}
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, expected, atol=1e-5), "step 0"

    stir(model)
    output = model(ids, labels=ids)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".adapter." in name), name
    with torch.no_grad():
        adapted = model(ids).logits
        assert not torch.allclose(adapted, expected, atol=1e-3)
        by_hand = copy.deepcopy(bare)
        for name, module in adapted_modules(model):
            by_hand.get_submodule(name).weight.copy_(module.handle.as_stored(trimtab.effective_weight(model, name)))
            if module.bias is not None:  # which full fine-tuning trains as well
                by_hand.get_submodule(name).bias.copy_(module.bias)
        assert torch.allclose(by_hand(ids).logits, adapted, atol=1e-4)
        copied = copy.deepcopy(model)
        trimtab.merge(model)
        assert torch.allclose(model(ids).logits, adapted, atol=1e-4)
        assert not any(isinstance(module, Adapted) for module in model.modules())
        trimtab.detach(copied)
        assert torch.equal(copied(ids).logits, expected)
    assert model.state_dict().keys() == bare.state_dict().keys()


def test_generation_after_training_steps_uses_the_new_adapter(tiny_llama: Callable[..., nn.Module]) -> None:
    """Generation runs without gradients, between steps, from what the last look kept."""
    model = tiny_llama()
    trimtab.attach(model, trimtab.Rule(match="all-linear", method="dora", rank=2))
    optimiser = torch.optim.AdamW(trimtab.trainable_parameters(model).values(), lr=0.05, fused=True)
    ids = torch.randint(2, 40, (1, 6))
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        with torch.no_grad():
            model(ids)
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            cached = model(ids).logits
            assert torch.equal(cached, copy.deepcopy(model)(ids).logits)
        tokens = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
        merged = copy.deepcopy(model)
        trimtab.merge(merged)
        again = merged.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert torch.equal(tokens, again)


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_fast_path_of_the_encoder_layer(norm_first: bool) -> None:
    """In eval without gradients PyTorch reads ``linear1.weight`` and never calls the layer."""
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True, norm_first=norm_first).eval()
    model = nn.Sequential(layer)
    bare = copy.deepcopy(model)
    trimtab.attach(model, trimtab.Rule(match="*.linear?", method="dora", rank=2))
    stir(model)
    for name in ("linear1", "linear2"):
        with torch.no_grad():
            bare[0].get_submodule(name).weight.copy_(trimtab.effective_weight(model, f"0.{name}"))
    x = torch.randn(2, 5, 16)
    slow = bare(x)  # with gradients, step by step
    calls = []
    model[0].linear1.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        quiet = model(x)
    assert torch.allclose(quiet, slow, atol=1e-5)
    # A hook switches the fast path off; without it the layer is not called at all, and the result is the same.
    assert calls
    model[0].linear1._forward_hooks.clear()
    model[0].linear1.forward = None  # type: ignore[assignment]
    with torch.no_grad():
        assert torch.allclose(model(x), slow, atol=1e-5)


def test_a_module_moved_to_another_dtype_as_a_whole() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    trimtab.attach(model, trimtab.Rule(match="*", method="dora", rank=2))
    stir(model)
    x = torch.randn(5, 6)
    with torch.no_grad():
        expected = model(x)
        model.double()
        assert torch.allclose(model(x.double()), expected.double(), atol=1e-6)
        model.bfloat16()
        assert torch.allclose(model(x.bfloat16()).float(), expected, atol=0.05)


def test_shapes_can_be_worked_out_without_memory() -> None:
    """A plan is shown for models that are never loaded: everything runs on the meta device."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 4096), nn.Linear(4096, 1024))
    report = trimtab.attach(model, trimtab.Rule(match="*", method="dora", rank=8))
    assert report.counts["trainable"] == 8 * (4096 + 4096) + 4096 + 8 * (4096 + 1024) + 1024
    assert report.counts["zero_rows"] == 0
    x = torch.empty(3, 4096, device="meta", requires_grad=True)
    output = model(x)
    assert output.shape == (3, 1024)
    output.sum().backward()
    assert model[0].adapter.A.grad.shape == (8, 4096)
    with torch.no_grad():
        assert model(x).shape == (3, 1024)


class _Listed(nn.Module):
    """Registers its layers, and goes through lists of its own that hold them, too."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[nn.Module] = []
        for number in range(3):
            layer = nn.Linear(6, 6)
            self.steps.append(layer)
            self.add_module(str(number), layer)
        self.last = nn.Linear(6, 4)
        self.__dict__["hidden"] = self.last
        self.heads = (self.last, nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for step in self.steps:
            x = torch.tanh(step(x))
        return self.hidden(x) + self.heads[1](self.heads[0](x))


def test_layers_that_a_model_holds_in_lists_of_its_own() -> None:
    model = nn.Sequential(_Listed())
    x = torch.randn(5, 6)
    bare, before = model(x), copy.deepcopy(model)
    trimtab.attach(model, trimtab.Rule(match="*", method="dora", rank=2))
    assert torch.allclose(model(x), bare, atol=1e-6)
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in trimtab.trainable_parameters(model).values())
    stir(model)
    adapted = model(x)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), adapted)
    trimtab.detach(copied)
    assert torch.equal(copied(x), before(x))
    assert type(copied[0].steps[1]) is type(copied[0].hidden) is type(copied[0].heads[0]) is nn.Linear
    trimtab.merge(model)
    assert torch.allclose(model(x), adapted, atol=1e-6)
    assert model[0].steps[0] is model[0].get_submodule("0")
