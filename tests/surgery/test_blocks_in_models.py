"""Adapter blocks in whole models: which blocks a rule takes, beside adapters on the weights inside, watched and passed
by by other code."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plain_formula
import trimtab
from contract_cases import stir
from trimtab.surgery.adapted import Adapted, adapted_modules, bare_modules
from trimtab.surgery.targets import find_targets

Make = Callable[..., nn.Module]
IDS = torch.tensor([[1, 5, 9, 30, 2], [7, 7, 3, 11, 39]])
NESTED = [
    trimtab.Rule(match="all-linear", method="dora", rank=2),
    trimtab.Rule(match=["*.mlp", "*.self_attn", "*.attn"], method="serial", bottleneck=3),
    trimtab.Rule(match="*.mlp", layers="1", method="parallel", bottleneck=3),
    trimtab.Rule(match="*.1", method="serial", bottleneck=2, activation="silu"),
]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def chosen(model: nn.Module, *rules: dict[str, Any]) -> dict[str, str]:
    """Module name -> method."""
    plan = trimtab.Plan([{"method": "serial", **rule} for rule in rules])
    return {target.name: target.method for target in find_targets(model, plan)}


# Which blocks --------------------------------------------------------------------------------------------------------


def test_globs(tiny_llama: Make) -> None:
    model = tiny_llama()
    both = [f"model.layers.{block}" for block in (0, 1)]
    assert list(chosen(model, {"match": "*.mlp"})) == [f"{block}.mlp" for block in both]
    assert list(chosen(model, {"match": ["*.mlp", "*.self_attn"], "layers": "1"})) == [
        "model.layers.1.self_attn",
        "model.layers.1.mlp",
    ]
    assert list(chosen(model, {"match": "model.layers.*"})) == both, "of blocks inside one another the outermost"
    assert list(chosen(model, {"match": "model.layers.*"}, {"match": "*.mlp", "method": "parallel"})) == [
        "model.layers.0",
        "model.layers.0.mlp",
        "model.layers.1",
        "model.layers.1.mlp",
    ]


def test_weights_and_blocks_do_not_compete(tiny_llama: Make) -> None:
    """A rule on one kind never takes, nor takes away, a module of the other."""
    got = chosen(tiny_llama(), {"match": "*.mlp"}, {"match": "*", "method": "lora", "rank": 2})
    assert [name for name, method in got.items() if method == "serial"] == [f"model.layers.{n}.mlp" for n in (0, 1)]
    assert len([name for name, method in got.items() if method == "lora"]) == 2 * 7 + 2, (
        "the embedding and the head, too"
    )
    assert set(chosen(tiny_llama(), {"match": "*", "method": "lora", "rank": 2}).values()) == {"lora"}


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"match": "all-linear"}, "nothing has such a name"),
        (
            {"match": "*.q_proj"},
            "names 2 that are no blocks (Linear; such as model.layers.0.self_attn.q_proj)",
        ),
        ({"match": "*norm"}, "(LlamaRMSNorm; such as"),
        ({"match": "*.layers"}, "(ModuleList; such as model.layers)"),
        ({"match": "*.mpl"}, "Near misses: *.mlp"),
        ({"match": "*.mlp", "layers": "inner:1"}, "in no block that 'layers' selects"),
    ],
    ids=str,
)
def test_what_is_no_block(tiny_llama: Make, rule: dict[str, Any], words: str) -> None:
    with pytest.raises(trimtab.PlanError) as caught:
        chosen(tiny_llama(), rule)
    assert words in str(caught.value)
    assert ("Method serial sits on blocks" in str(caught.value)) == ("layers" not in rule)


def test_a_model_without_blocks() -> None:
    with pytest.raises(trimtab.PlanError, match=r"nothing has such a name\. The model has no blocks\. Method serial"):
        trimtab.attach(nn.Sequential(nn.Linear(4, 4)), trimtab.Rule(match="x", method="serial"))


def test_a_later_rule_takes_a_block(tiny_llama: Make) -> None:
    with pytest.raises(trimtab.PlanError, match=r"all 2 that it matches, such as model.layers.0.mlp, are decided by"):
        chosen(tiny_llama(), {"match": "*.mlp"}, {"match": "*.mlp", "method": "parallel"})


# Beside adapters on weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2"])
def test_blocks_around_adapted_layers(kind: str, request: pytest.FixtureRequest) -> None:
    make: Make = request.getfixturevalue(kind)
    bare = make()
    model = copy.deepcopy(bare)
    expected = logits(bare)
    report = trimtab.attach(model, trimtab.Plan(NESTED))
    names = dict(bare.named_modules())
    assert all(module.name in names for module in report.modules), "called what they are called without adapters"
    assert {module.method for module in report.modules} == {"dora", "serial", "parallel"}
    assert report.trainable_parameters == sum(one.numel() for one in trimtab.trainable_parameters(model).values())
    assert report.total_parameters == sum(one.numel() for one in bare.parameters())
    assert torch.allclose(logits(model), expected, atol=1e-5)

    stir(model)
    model(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".adapter." in name), name
    adapted = logits(model)
    assert not torch.allclose(adapted, expected, atol=1e-2)
    assert torch.equal(logits(copy.deepcopy(model)), adapted)
    for name, module in adapted_modules(model):
        if module.method == "dora":
            assert trimtab.effective_weight(model, name).shape == trimtab.effective_weight(bare, name).shape

    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(trimtab.SurgeryError, match=r"merge: \d adapters sit on blocks, .*Nothing was changed"):
        trimtab.merge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), adapted)

    assert trimtab.detach(model) == len(report.modules)
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in bare.named_modules()
    }
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model), expected)
    trimtab.attach(model, trimtab.Plan(NESTED))  # and it can be done again


def test_only_a_block_may_be_merged_around(tiny_llama: Make) -> None:
    """Without adapters on blocks the same layers do merge."""
    model = tiny_llama()
    trimtab.attach(model, trimtab.Plan(NESTED[:1]))
    assert len(trimtab.merge(model).modules) == 14


def test_numbers_in_a_llama(tiny_llama: Make) -> None:
    """Serial behind the MLP, parallel beside the attention, by the plain formula."""
    model = tiny_llama().double()
    layer = model.model.layers[0]
    seen: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen[name] = (kwargs["hidden_states"] if not args else args[0], output)

        return hook

    watched = [layer.mlp.register_forward_hook(keep("mlp"), with_kwargs=True)]
    watched.append(layer.self_attn.register_forward_hook(keep("attention"), with_kwargs=True))
    trimtab.attach(
        model,
        trimtab.Plan(
            [
                trimtab.Rule(match="*.0.mlp", method="serial", bottleneck=3),
                trimtab.Rule(match="*.0.self_attn", method="parallel", bottleneck=3),
            ]
        ),
    )
    stir(model)
    after: dict[str, Any] = {}
    layer.mlp.register_forward_hook(lambda module, args, output: after.update(mlp=output))
    layer.self_attn.register_forward_hook(lambda module, args, output: after.update(attention=output))
    logits(model)
    for hook in watched:
        hook.remove()
    for name, method, adapter in [
        ("mlp", "serial", layer.mlp.adapter),
        ("attention", "parallel", layer.self_attn.adapter),
    ]:
        tensors = {key: value.detach() for key, value in adapter.named_parameters()}
        x, output = seen[name]
        h = output if isinstance(output, Tensor) else output[0]
        got = after[name] if isinstance(after[name], Tensor) else after[name][0]
        assert torch.allclose(got, plain_formula.block(method, {}, tensors, x, h), atol=1e-12)


def test_state_dict_and_whole_model_copies(tiny_llama: Make) -> None:
    model = tiny_llama()
    other = copy.deepcopy(model)
    for one in (model, other):
        trimtab.attach(one, trimtab.Plan(NESTED))
    stir(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    whole = torch.load(file, weights_only=False)
    assert torch.equal(logits(whole), logits(model))
    trimtab.detach(whole)
    assert not any(module._forward_hooks for module in whole.modules()), "a copy can let go of its own hooks"
    assert not torch.equal(logits(whole), logits(model))


def test_generation_with_a_cache_is_that_without(tiny_llama: Make) -> None:
    model = tiny_llama()
    trimtab.attach(model, trimtab.Plan(NESTED))
    stir(model)
    said = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens = [model.generate(IDS[:1], use_cache=cache, **said) for cache in (True, False)]
    assert torch.equal(*tokens)


def test_gradient_checkpointing_in_a_llama(tiny_llama: Make) -> None:
    seen = []
    for again in (False, True):
        torch.manual_seed(2)
        model = tiny_llama()
        trimtab.attach(model, trimtab.Plan(NESTED))
        stir(model)
        if again:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        seen.append({name: one.grad for name, one in trimtab.trainable_parameters(model).items()})
    for name, value in seen[0].items():
        assert torch.allclose(value, seen[1][name], atol=1e-7), name  # DoRA's norms are summed in another order


# Code that looks at a block ------------------------------------------------------------------------------------------


def test_attributes_are_the_blocks(tiny_llama: Make) -> None:
    model = tiny_llama()
    mlp, attention = model.model.layers[0].mlp, model.model.layers[0].self_attn
    trimtab.attach(model, trimtab.Rule(match=["*.mlp", "*.self_attn"], method="serial", bottleneck=2))
    wrapped = model.model.layers[0].mlp
    assert isinstance(wrapped, Adapted)
    assert wrapped.gate_proj is mlp.gate_proj
    assert wrapped.hidden_size == 16
    assert wrapped.act_fn is mlp.act_fn
    assert model.model.layers[0].self_attn.layer_idx == attention.layer_idx == 0
    assert wrapped.method == "serial", "its own come first"
    with pytest.raises(AttributeError, match=r"LlamaMLP.*no attribute 'nonsense'"):
        _ = wrapped.nonsense
    assert "method=serial, rule=1" in repr(model)
    assert "16 -> 16, bottleneck=2" in repr(model)


def test_a_block_that_copies_itself_in_its_own_way() -> None:
    class Own(nn.Sequential):
        def __deepcopy__(self, memo: dict[int, Any]) -> Own:
            raise AssertionError("a copy of the whole is asked of the whole")

    model = nn.ModuleDict({"a": Own(nn.Linear(4, 4))})
    trimtab.attach(model, trimtab.Rule(match="a", method="serial", bottleneck=2))
    assert not hasattr(model["a"], "__deepcopy__")
    assert hasattr(model["a"].base, "__deepcopy__")


def test_recorded_hidden_states_have_passed_the_adapter(tiny_llama: Make) -> None:
    """transformers records what its own classes give, by hooks on them."""
    model = tiny_llama()
    trimtab.attach(model, trimtab.Rule(match="model.layers.?", method="serial", bottleneck=2))
    stir(model)
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
        assert len(states) == 3
        entered: list[Tensor] = []
        model.model.layers[1].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
        model(IDS)
    assert torch.equal(states[1], entered[0])


def test_the_fused_encoder_layer_does_not_pass_a_block_by() -> None:
    """In eval without gradients PyTorch's encoder layer reads the weights of its attention and calls nothing."""
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        bare = model(x)
    trimtab.attach(model, trimtab.Rule(match="*.self_attn", method="serial", bottleneck=3, width=16))
    with torch.no_grad():
        assert torch.allclose(model(x), bare, atol=1e-6)
    stir(model, 0.5)
    slow = model(x).detach()
    with torch.no_grad():
        assert torch.equal(model(x), slow)
    assert not torch.allclose(slow, bare, atol=1e-2)


def test_a_block_that_hangs_in_two_places_gets_one_adapter() -> None:
    block = nn.Sequential(nn.Linear(4, 4))
    model = nn.ModuleDict({"a": block, "b": nn.ModuleList([block])})
    report = trimtab.attach(model, trimtab.Rule(match="a", method="serial", bottleneck=2))
    assert [(module.name, module.aliases) for module in report.modules] == [("a", ("b.0",))]
    assert model["a"] is model["b"][0]
    assert trimtab.detach(model) == 1
    assert model["a"] is model["b"][0] is block


def test_blocks_that_share_a_weight_have_adapters_of_their_own() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4)), "b": nn.Sequential(nn.Linear(4, 4))})
    model["b"][0].weight = model["a"][0].weight
    report = trimtab.attach(model, trimtab.Rule(match="?", method="serial", bottleneck=2))
    assert [module.parameters for module in report.modules] == [2 * 4 * 2 + 2 + 4] * 2


def test_modes_inside_a_block_stay() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    block[1].eval()
    model = nn.ModuleDict({"a": block})
    trimtab.attach(model, trimtab.Rule(match="a", method="serial", bottleneck=2))
    assert model["a"].training
    assert model["a"].adapter.training
    assert not block[1].training


def test_shapes_can_be_worked_out_without_memory() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(4096, 14336), nn.SiLU(), nn.Linear(14336, 4096))})
    report = trimtab.attach(model, trimtab.Rule(match="mlp", method="parallel", bottleneck=64))
    assert report.counts["trainable"] == 2 * 64 * 4096 + 64 + 4096
    assert model["mlp"](torch.empty(3, 4096, device="meta")).shape == (3, 4096)


def test_bare_names(tiny_llama: Make) -> None:
    model = tiny_llama()
    before = [name for name, _ in model.named_modules(remove_duplicate=False)]
    trimtab.attach(model, trimtab.Plan(NESTED))
    assert [name for name, _ in bare_modules(model)] == before
