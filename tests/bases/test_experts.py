"""Experts that a model keeps in one parameter, each with an adapter of its own.

What the models compute is held against the bare model with the effective weights in it, which are computed expert by
expert by the plain formulas in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import expert_models
import plain_formula
import sampling
import trimtab
from contract_cases import stir
from expert_models import made
from trimtab.methods import _stack
from trimtab.ops import expert_rows
from trimtab.surgery.adapted import AdaptedParameter, adapted_modules

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "lora, rank-stabilised": {"rank": 3, "rank_stabilised": True},
    "dora": {"rank": 2},
    "dora, exact gradient": {"rank": 2, "detach_norm": False},
    "dora, by input": {"rank": 2, "magnitude_axis": "input"},
    "dora, product kept": {"rank": 2, "keep_product": True},
    "dora, magnitude alone": {"rank": 0},
    "mora": {"rank": 2},
    "mora, sharing": {"rank": 3, "form": "sharing", "magnitude": True},
    "full": {"magnitude": True},
}
CASES = [
    (model, implementation, method)
    for model in ("qwen3_moe", "gpt_oss", "llama4", "jetmoe", "dbrx")
    for implementation in (["eager"] if model in ("llama4", "jetmoe", "dbrx") else ["eager", "batched_mm"])
    for method in METHODS
]


def attached(model: Any, method: str, **options: Any) -> trimtab.AttachReport:
    rule = trimtab.Rule(
        match=["*.experts.*_proj", "*put_linear.weight", "*.experts.mlp.*", "experts.*"],
        method=method.split(",")[0],
        **METHODS[method] | options,
    )
    return trimtab.attach(model, rule)


def effective_weights(model: nn.Module, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """``name -> effective stack`` as the model keeps it, from copies ``leaves`` of the trained tensors."""
    found = {}
    for name, adapted in adapted_modules(model):
        assert isinstance(adapted, AdaptedParameter)
        options = adapted.adapter.options.model_dump()
        frozen = adapted.base.weight.detach().double()
        flat = frozen.shape if frozen.dim() == 2 else None
        if flat:  # DBRX has its three experts one below the other
            frozen = frozen.view(3, -1, flat[1])
        turned = frozen.shape[1] == adapted.adapter.in_features and frozen.shape[2] == adapted.adapter.out_features
        turned = turned and (frozen.shape[1] != frozen.shape[2] or adapted.handle.stored_transposed)
        experts = []
        for expert, stored in enumerate(frozen):
            weight = stored.t() if turned else stored
            own = {key: leaves[f"{name}.{key}"][expert] for key, _ in adapted.adapter.named_parameters()}
            total = weight + plain_formula.update(adapted.method, options, own, weight)
            axis, detach = options["magnitude_axis"], options["detach_norm"]
            effective = plain_formula.effective(total, own.get("magnitude"), axis, detach)
            experts.append(effective.t() if turned else effective)
        found[name] = torch.cat(experts) if flat else torch.stack(experts)
    return found


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{name}.{key}": parameter
        for name, adapted in adapted_modules(model)
        for key, parameter in adapted.adapter.named_parameters()
    }


@pytest.mark.parametrize(("name", "implementation", "method"), sampling.sample(CASES, 4))
def test_outputs_and_gradients_are_those_of_the_bare_model_with_the_effective_weights(
    name: str, implementation: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    formed: list[int] = []
    read = _stack.StackPass.read
    monkeypatch.setattr(_stack.StackPass, "read", lambda self: formed.append(1) or read(self))
    bare = made(name, torch.float64, implementation)
    model = copy.deepcopy(bare)
    attached(model, method)
    stir(model)
    tensors = trained(model)
    outputs = model(expert_models.tokens()).logits
    upstream = torch.randn_like(outputs)
    gradients = torch.autograd.grad(outputs, list(tensors.values()), upstream, allow_unused=True)
    assert bool(formed) == (method == "full"), "effective weights of all experts were formed"

    leaves = {key: value.detach().clone().requires_grad_() for key, value in tensors.items()}
    weights = dict(bare.named_parameters()) | effective_weights(model, leaves)
    expected = functional_call(bare, weights, (expert_models.tokens(),)).logits
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-12)
    plain = torch.autograd.grad(expected, list(leaves.values()), upstream, allow_unused=True)
    for key, got, right in zip(tensors, gradients, plain, strict=True):
        assert got is not None, key
        assert right is not None, key
        torch.testing.assert_close(got, right, rtol=0, atol=1e-10 * max(1, float(right.detach().abs().max())), msg=key)


@pytest.mark.parametrize("method", ["lora", "dora", "mora"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_grouped_products_give_what_expert_after_expert_gives(name: str, method: str) -> None:
    model = made(name)
    attached(model, method)
    stir(model)
    found = []
    for implementation in ("eager", "grouped_mm"):
        model.set_experts_implementation(implementation)
        outputs = model(expert_models.tokens()).logits
        found.append([outputs, *torch.autograd.grad(outputs.square().sum(), list(trained(model).values()))])
    for one, other in zip(*found, strict=True):  # sums in another order
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(one.detach().abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", expert_models.MODELS)
def test_step_0_is_the_bare_model_bit_for_bit_in_each_of_its_ways(name: str, dtype: torch.dtype) -> None:
    model = made(name, dtype).eval()
    for implementation in expert_models.implementations(model):
        if name in ("qwen3_moe", "gpt_oss"):
            model.set_experts_implementation(implementation)
        for method in ("lora", "mora"):
            bare = model(expert_models.tokens()).logits
            attached(model, method)
            assert torch.equal(model(expert_models.tokens()).logits, bare), implementation
            with torch.no_grad():
                assert torch.equal(model(expert_models.tokens()).logits, bare), implementation
            trimtab.detach(model)


@pytest.mark.parametrize("match", ["*.experts", "*.experts.*", ["*.gate_up_proj", "*.down_proj"]])
def test_experts_are_named_by_what_holds_them_or_by_themselves(match: str | list[str]) -> None:
    model = made("qwen3_moe")
    report = trimtab.attach(model, trimtab.Rule(match=match, method="lora", rank=2))
    names = [f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("gate_up_proj", "down_proj")]
    assert [module.name for module in report.modules] == names
    assert [(module.out_features, module.in_features) for module in report.modules] == [(48, 16), (16, 24)] * 2
    assert report.trainable_parameters == 2 * 5 * 2 * ((48 + 16) + (16 + 24))
    assert isinstance(model.model.layers[0].mlp.experts, type(made("qwen3_moe").model.layers[0].mlp.experts))


def test_each_expert_has_factors_drawn_as_those_of_a_layer() -> None:
    """Uniform between -1/sqrt(in) and 1/sqrt(in): of 48 numbers the largest comes within a fifth of the bound."""
    model = expert_models.OwnModel()
    attached(model, "lora", rank=4)
    drawn = dict(trained(model))["experts.inner.A"]
    assert drawn.shape == (3, 4, 4)
    assert 0.4 < float(drawn.detach().abs().max()) <= 0.5


def test_all_linear_takes_no_experts_and_says_how_many_numbers_they_have() -> None:
    model = made("qwen3_moe")
    report = trimtab.attach(model, trimtab.Rule(match="all-linear", method="lora", rank=2))
    assert not [module.name for module in report.modules if "experts" in module.name]
    assert report.unreached["Qwen3MoeExperts"] == 2 * 5 * (48 * 16 + 16 * 24)


def test_experts_multiplied_in_a_way_of_their_own_have_right_outputs_and_gradients() -> None:
    torch.default_generator.manual_seed(2)
    bare = expert_models.OwnModel().double()
    for method in ("dora", "mora, sharing"):
        model = copy.deepcopy(bare)
        attached(model, method)
        stir(model)
        x = torch.randn(9, 4, dtype=torch.float64)
        tensors = trained(model)
        outputs = model(x)
        gradients = torch.autograd.grad(outputs.square().sum(), list(tensors.values()))
        leaves = {key: value.detach().clone().requires_grad_() for key, value in tensors.items()}
        expected = functional_call(bare, dict(bare.named_parameters()) | effective_weights(model, leaves), (x,))
        torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-12)
        plain = torch.autograd.grad(expected.square().sum(), list(leaves.values()))
        torch.testing.assert_close(list(gradients), list(plain), rtol=0, atol=1e-10)


def test_dropout_drops_inputs_of_the_update_and_is_refused_where_no_input_is_known() -> None:
    model = made("qwen3_moe", implementation="grouped_mm").train()
    attached(model, "lora", dropout=0.5)
    stir(model)
    one, other = (model(expert_models.tokens()).logits for _ in range(2))
    assert not torch.equal(one, other)
    model.eval()
    assert torch.equal(model(expert_models.tokens()).logits, model(expert_models.tokens()).logits)
    own = expert_models.OwnModel()
    attached(own, "lora", dropout=0.5)
    with pytest.raises(RuntimeError, match="set dropout: 0 on the rule"):
        own(torch.randn(3, 4))


def _quantised(module: Any) -> None:
    stored = module.gate_up_proj.data.to(torch.float8_e4m3fn)
    module.gate_up_proj = nn.Parameter(stored, requires_grad=False)


def test_quantised_experts_are_refused_in_words() -> None:
    model = made("gpt_oss")
    _quantised(model.model.layers[1].mlp.experts)
    with pytest.raises(trimtab.PlanError, match=r"layers\.1\.mlp\.experts\.gate_up_proj .*quantised .float8_e4m3fn"):
        trimtab.attach(model, trimtab.Rule(match="*.experts", method="lora", rank=2))
    report = trimtab.attach(model, trimtab.Rule(match="*.down_proj", method="lora", rank=2))
    assert len(report.modules) == 2


@pytest.mark.parametrize(
    ("name", "method"),
    [
        (name, method)
        for name, some in {"qwen3_moe": ("dora", "mora"), "gpt_oss": ("lora", "full")}.items()
        for method in (("lora", "dora", "mora", "full") if sampling.everything else some)
    ],
)
def test_what_is_saved_is_loaded_and_what_is_merged_is_a_model_like_any(name: str, method: str, tmp_path: Path) -> None:
    model = made(name).eval()
    bare = copy.deepcopy(model)
    attached(model, method)
    stir(model)
    outputs = model(expert_models.tokens()).logits
    trimtab.save_adapter(model, tmp_path / "adapter")
    loaded = copy.deepcopy(bare)
    trimtab.load_adapter(loaded, tmp_path / "adapter")
    assert torch.equal(loaded(expert_models.tokens()).logits, outputs)
    assert torch.equal(copy.deepcopy(model)(expert_models.tokens()).logits, outputs)
    with trimtab.disable_adapter(model):
        assert torch.equal(model(expert_models.tokens()).logits, bare(expert_models.tokens()).logits)

    trimtab.merge(model)
    torch.testing.assert_close(model(expert_models.tokens()).logits, outputs, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path / "merged")
    again = type(bare).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(expert_models.tokens()).logits, outputs, rtol=0, atol=1e-6)
    trimtab.detach(loaded)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in bare.state_dict().items())
    assert torch.equal(loaded(expert_models.tokens()).logits, bare(expert_models.tokens()).logits)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_gradient_checkpointing_changes_no_gradient(implementation: str) -> None:
    model = made("qwen3_moe", implementation=implementation).train()
    attached(model, "dora")
    stir(model)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(expert_models.tokens(), labels=expert_models.tokens()).loss.backward()
        found.append([parameter.grad for parameter in trained(model).values()])
    torch.testing.assert_close(*found)


def test_a_model_writes_the_same_text_before_and_after_its_merge() -> None:
    model = made("qwen3_moe").eval()
    attached(model, "dora")
    stir(model)
    asked = {"max_new_tokens": 6, "do_sample": False}
    written = model.generate(expert_models.tokens(), **asked)
    trimtab.merge(model)
    assert torch.equal(model.generate(expert_models.tokens(), **asked), written)


def _sorted_rows(device: str) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor], expert_rows.SortedRows]]:
    """Rows of four experts, of whom one has none, on a device that multiplies groups or (``cpu``) in turn."""
    weight, x = torch.randn(4, 6, 8), torch.randn(20, 8)
    ends = torch.tensor([7, 7, 12, 20], dtype=torch.int32)

    def rows(weight: Tensor) -> expert_rows.SortedRows:
        made = expert_rows.SortedRows(weight, lambda rows: made.times(rows, weight.mT), ends)
        made._in_turn = device == "cpu"
        return made

    return weight, x, ends, rows


@pytest.mark.parametrize("rank", [2, 3, 8])
def test_products_of_groups_as_on_an_accelerator_are_those_in_turn(rank: int) -> None:
    from trimtab.ops.frozen_linear import frozen_linear
    from trimtab.ops.low_rank import LowRank

    found = []
    for device in ("cpu", "accelerator"):
        torch.default_generator.manual_seed(1)
        weight, x, _, rows = _sorted_rows(device)
        given = [x, torch.randn(4, rank, 8), torch.randn(4, 6, rank), torch.rand(4, 6) + 1]
        given = [one.requires_grad_() for one in given]
        x, a, b, magnitude = given
        norm = (weight + 1.5 * b @ a).norm(dim=2).detach()
        output = frozen_linear(
            x, weight, through=rows(weight), update=LowRank(1.5), tensors=(a, b), magnitude=magnitude, norm=norm
        )
        found.append([output, *torch.autograd.grad(output.square().sum(), given)])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


LOOKS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda stack: stack,
    "one": lambda stack: stack[1],
    "one, turned": lambda stack: stack[-1].t(),
    "one of those turned": lambda stack: stack.mT[1],
    "a row of one": lambda stack: stack[1][2],
    "a part": lambda stack: stack[1:],
    "a table": lambda stack: stack[torch.tensor([[0, 2], [1, 1]])],
    "chosen": lambda stack: stack[torch.tensor([2, 0])],
    "one of the chosen": lambda stack: stack[torch.tensor([2, 0])][0],
    "all turned": lambda stack: stack.mT,
    "in another order": lambda stack: stack.transpose(0, 1),
    "split in another order": lambda stack: stack.unbind(1)[2],
    "of another dtype": lambda stack: stack.to(torch.float32),
    "several rows for each of the chosen": lambda stack: torch.bmm(stack[torch.tensor([2, 0])], stack[:2].mT + 0),
    "the same from the left": lambda stack: torch.bmm(stack[1:] + 0, stack[torch.tensor([2, 0])].mT),
    "a product with all": lambda stack: nn.functional.linear(torch.eye(stack.shape[2], dtype=stack.dtype), stack[1]),
}


def test_what_no_model_was_known_to_do_with_its_experts_meets_the_effective_weights() -> None:
    """Each in a sum, which has no fast way."""
    model = expert_models.OwnModel().double()
    attached(model, "lora")
    stir(model)
    for name, whole in effective_weights(model, {key: one.detach() for key, one in trained(model).items()}).items():
        for said, look in LOOKS.items():
            found, wanted = look(getattr(model.experts, name.rpartition(".")[2])), look(whole)
            assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype), said
            room = 1e-12 if wanted.dtype == torch.float64 else 1e-5
            torch.testing.assert_close(found + 0, wanted + 0, rtol=0, atol=room, msg=said)


def test_a_grouped_product_of_as_many_rows_for_each_expert_meets_the_effective_weights() -> None:
    model = expert_models.OwnModel()
    attached(model, "lora")
    stir(model)
    whole = effective_weights(model, {key: one.detach().double() for key, one in trained(model).items()})
    rows = torch.randn(3, 5, 4)
    found = torch.nn.functional.grouped_mm(rows, model.experts.inner.mT)
    torch.testing.assert_close(found.double(), rows.double() @ whole["experts.inner"].mT, rtol=0, atol=1e-5)


def test_experts_that_stand_one_below_the_other_are_read_as_they_are_stored() -> None:
    model = made("dbrx", torch.float64)
    attached(model, "lora")
    stir(model)
    for name, whole in effective_weights(model, {key: one.detach() for key, one in trained(model).items()}).items():
        holder, _, own = name.rpartition(".")
        stack = getattr(model.get_submodule(holder), own)
        for found, wanted in (
            (stack + 0, whole),
            (stack[5] + 0, whole[5]),
            (stack.view(3, -1, whole.shape[1])[1] + 0, whole.view(3, -1, whole.shape[1])[1]),
            (stack.view(-1) + 0, whole.view(-1)),
        ):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", ["dora", "mora"])
def test_whatever_way_rows_are_multiplied_with_experts_no_effective_weight_is_formed(
    dtype: torch.dtype, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that dropout, which drops inputs of the update, has inputs to drop; here, against the effective weights."""
    model = expert_models.OwnModel().to(dtype)
    attached(model, method, rank=1, magnitude=True, detach_norm=False)
    stir(model)
    monkeypatch.setattr(_stack.StackPass, "read", lambda self: pytest.fail("effective weights were formed"))
    chosen, linear = torch.tensor([2, 0, 0, 1]), torch.nn.functional.linear
    leaves = {key: one.detach().double() for key, one in trained(model).items()}
    for name, whole in effective_weights(model, leaves).items():
        stack = getattr(model.experts, name.rpartition(".")[2])
        x, bias, rows = (torch.randn(*size) for size in ((4, whole.shape[2]), whole.shape[1:2], (3, 4, whole.shape[2])))
        x, bias, rows = x.to(dtype), bias.to(dtype), rows.to(dtype)
        for found, wanted in (
            (linear(x, stack[1], bias), linear(x.double(), whole[1], bias.double())),
            (linear(rows, stack[2]), linear(rows.double(), whole[2])),
            (x @ stack.to(dtype)[2].mT, x.double() @ whole[2].mT),
            (torch.stack([x @ one.mT for one in stack]), x.double() @ whole.mT),
            (rows @ stack.mT, rows.double() @ whole.mT),
            (torch.bmm(rows, stack.transpose(1, 2)), rows.double() @ whole.mT),
            (torch.bmm(stack[chosen], x.unsqueeze(2)), whole[chosen] @ x.double().unsqueeze(2)),
            (torch.bmm(x.unsqueeze(1), stack[chosen].mT), x.double().unsqueeze(1) @ whole[chosen].mT),
        ):
            room = 1e-12 if dtype == torch.float64 else 0.03 * float(wanted.abs().max())
            torch.testing.assert_close(found.double(), wanted, rtol=0, atol=room)
