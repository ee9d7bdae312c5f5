"""Every method on every kind of base: how it behaves in use. Modes, dropout, copies, inputs of all shapes, and what
inference keeps while optimisers change the values.

Where two runs must do the same arithmetic the results are compared bit for bit. Where the order of sums may differ, a
few float32 units are allowed; half precision has the tolerances of ``test_contract``.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from itertools import cycle

import pytest
import torch

import plain_formula
import sampling
import trimtab
from contract_cases import (
    SHAPES,
    Case,
    Holder,
    Reference,
    assert_close,
    assert_same,
    cases,
    cases_with,
    each_once,
    frozen,
    gradients,
    stir,
)
from trimtab.ops.dropout import dropout

EPS = torch.finfo(torch.float32).eps
FULL = each_once(cases([torch.float32], SHAPES[2:]))
HALVES = sampling.sample(each_once(cases([torch.bfloat16], SHAPES[2:], dropout=0.0)), 2)
DROPPED = [case for case in cases([torch.float32], SHAPES[:2], dropout=0.5) if case.sits_on == "weight"]


# Modes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FULL + HALVES, ids=str)
def test_eval_equals_train_without_dropout(case: Case) -> None:
    model = case.trained()
    x = case.input()
    evaluated = model.eval()(x)
    with torch.no_grad():
        quiet = model(x)
        again = model(x)  # from what the first look kept
    with torch.inference_mode():
        inferred = model(x)
    assert torch.equal(evaluated, quiet)
    assert torch.equal(evaluated, again)
    assert torch.equal(evaluated, inferred)
    if not case.said.get("dropout"):
        assert torch.equal(evaluated, model.train()(x))


@pytest.mark.parametrize("case", FULL + HALVES, ids=str)
def test_a_step_after_an_evaluation_is_unchanged(case: Case) -> None:
    x = case.input()
    ends = []
    for look in (False, True):
        model = case.trained().train()
        optimiser = torch.optim.AdamW(trimtab.trainable_parameters(model).values(), lr=1e-2)
        for _ in range(2):
            if look:
                model.eval()
                with torch.no_grad():
                    model(x)
                with torch.inference_mode():
                    model(x)
                model.train()
            torch.default_generator.manual_seed(5)
            model(x).float().square().sum().backward()
            optimiser.step()
            optimiser.zero_grad()
        ends.append({name: value.detach().clone() for name, value in model.named_parameters()})
    assert_same(*ends)


@pytest.mark.parametrize("case", DROPPED, ids=str)
def test_dropout_acts_on_the_input_of_the_update_only(case: Case) -> None:
    model = case.trained().train()
    plain = Reference(model.adapted, case)
    x = case.input().requires_grad_()
    x64 = x.detach().double().requires_grad_()
    torch.default_generator.manual_seed(3)
    output = model(x)
    torch.default_generator.manual_seed(3)
    mask = dropout(torch.ones_like(x), case.said["dropout"]).detach().double()
    assert 0 < (mask == 0).sum() < mask.numel()

    update = plain.update()
    ratios = plain_formula.ratios(plain.weight + update, plain.magnitude, case.axis, case.said.get("detach_norm", True))
    if case.axis == "input":
        assert ratios is not None
        seen = x64 * ratios
        expected = seen @ plain.weight.t() + (seen * mask) @ update.t()
    else:
        expected = x64 @ plain.weight.t() + (x64 * mask) @ update.t()
        expected = expected if ratios is None else expected * ratios
    expected = expected if plain.bias is None else expected + plain.bias
    assert_close(output, expected, 4 * EPS, "output")

    upstream = torch.randn_like(output)
    output.backward(upstream)
    expected.backward(upstream.double())
    assert x.grad is not None
    assert x64.grad is not None
    assert_close(x.grad, x64.grad, 6 * EPS, "gradient of the input")
    for name, parameter in model.adapted.adapter.named_parameters():
        assert parameter.grad is not None
        want = plain.tensors[name].grad
        assert want is not None
        assert_close(parameter.grad, want, 6 * EPS, f"gradient of {name}")


@pytest.mark.parametrize("case", each_once(DROPPED), ids=str)
def test_with_nearly_all_dropped_the_base_remains(case: Case) -> None:
    options = {**case.said, "dropout": 0.9999}
    case = Case(case.method, tuple(options.items()), case.base, case.bias, case.dtype, case.shape)
    model = case.trained().train()
    plain = Reference(model.adapted, case)
    ratios = plain_formula.ratios(plain.weight + plain.update(), plain.magnitude, case.axis)
    weight = plain.weight
    if ratios is not None:
        weight = weight * (ratios.unsqueeze(1) if case.axis == "output" else ratios)
    x = case.input()
    assert_close(model(x), plain_formula.product(x.double(), weight, plain.bias).detach(), 4 * EPS)


# Copies ------------------------------------------------------------------------------------------------------------


def _pickled(model: Holder) -> Holder:
    return pickle.loads(pickle.dumps(model))


def _saved_whole(model: Holder) -> Holder:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = [copy.deepcopy, _pickled, _saved_whole]
COPIES = cases_with({"duplicate": WAYS}, [torch.float32], SHAPES[2:], biased=True)
COPIED = COPIES if sampling.everything else list(zip((case for case in FULL if case.bias), cycle(WAYS)))


@pytest.mark.parametrize(("case", "duplicate"), COPIED, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_copy_is_whole_and_its_own(case: Case, duplicate: Callable[[Holder], Holder]) -> None:
    model = case.trained().eval()
    x = case.input()
    with torch.no_grad():
        before = model(x)  # a copy must not carry what an inference kept
        other = duplicate(model)
        assert torch.equal(other(x), before)
        stir(other)
        assert not torch.equal(other(x), before)
        frozen(other.adapted.base).write(torch.ones(case.shape))
    assert torch.equal(model(x), before)
    trimtab.detach(other)
    # torchao stores 1 as 127 steps of 1 / 127.5.
    assert_close(
        frozen(other.layer).weight(), torch.ones(case.shape), 1 / 127, "the copy reads and gives back its own base"
    )


@pytest.mark.parametrize("case", FULL + HALVES, ids=str)
def test_state_dict_round_trip(case: Case) -> None:
    model, other = case.trained().eval(), case.fresh().eval()
    x = case.input()
    with torch.no_grad():
        other(x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    # bitsandbytes' 4-bit layer writes what it does not read again: more about its weight, which is there already.
    other.load_state_dict(torch.load(file, weights_only=True), strict=case.base != "nf4")
    with torch.no_grad():
        assert torch.equal(other(x), model(x))


# Inputs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FULL, ids=str)
def test_any_number_of_dimensions(case: Case) -> None:
    model = case.trained()
    plain = Reference(model.adapted, case)
    for tokens in [(), (3,), (2, 3), (2, 3, 2), (0,), (2, 0)]:
        x = torch.randn(*tokens, case.shape[1], requires_grad=True)
        model.zero_grad()
        output = model(x)
        assert output.shape == (*tokens, case.shape[0])
        assert_close(output, plain(x.detach()), 4 * EPS)
        output.square().sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
        for name, value in gradients(model).items():
            assert bool(value.isfinite().all()), name
            assert bool(x.numel()) == bool(value.any()), f"{name}: a gradient where there are tokens"


@pytest.mark.parametrize("case", FULL, ids=str)
def test_inputs_and_gradients_that_are_not_contiguous(case: Case) -> None:
    wide = torch.randn(4, 3, 2 * case.shape[1])
    views = {
        "transposed": wide.transpose(0, 1)[..., : case.shape[1]],
        "every second": wide[..., ::2],
        "expanded": wide[:1, :1, : case.shape[1]].expand(2, 3, -1),
    }
    for name, view in views.items():
        assert not view.is_contiguous()
        seen = []
        for x in (view, view.contiguous()):
            model = case.trained()
            leaf = x.detach().requires_grad_()
            output = model(leaf)
            upstream = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
            if x is view:  # the same values, in another order in memory
                upstream = upstream.transpose(0, 1).contiguous().transpose(0, 1)
            output.backward(upstream)
            assert leaf.grad is not None
            seen.append({"output": output.detach(), "input": leaf.grad, **gradients(model)})
        for key, value in seen[0].items():
            assert_close(value, seen[1][key], 4 * EPS, f"{name}: {key}")


# Optimisers and the norm that inference keeps -----------------------------------------------------------------------

Change = Callable[[Holder], None]


def _step(**settings: bool) -> Change:
    def change(model: Holder) -> None:
        parameters = list(trimtab.trainable_parameters(model).values())
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        torch.optim.AdamW(parameters, lr=0.05, **settings).step()

    return change


def _load(model: Holder) -> None:
    other = copy.deepcopy(model)
    stir(other)
    model.load_state_dict(other.state_dict())


def _assign(model: Holder) -> None:
    other = copy.deepcopy(model)
    stir(other)
    model.load_state_dict(other.state_dict(), assign=True)


def _swap_data(model: Holder) -> None:
    for parameter in trimtab.trainable_parameters(model).values():
        parameter.data = parameter.data + 0.05 * torch.randn_like(parameter)


def _write_data(model: Holder) -> None:
    for parameter in trimtab.trainable_parameters(model).values():
        parameter.data.add_(0.05 * torch.randn_like(parameter))


def _write_magnitude(model: Holder) -> None:
    for name, parameter in trimtab.trainable_parameters(model).items():
        if name.endswith("magnitude"):
            parameter.data.mul_(1.1)


CHANGES: dict[str, Change] = {
    "plain": _step(foreach=False),
    "foreach": _step(foreach=True),
    "fused": _step(fused=True),
    "load_state_dict": _load,
    "assign": _assign,
    "swap_data": _swap_data,
    "write_data": _write_data,
    "magnitude": _write_magnitude,
}
LOOKS = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
# One kind of base is enough for what only autograd and Python can get wrong.
LOOKED_AT = cases_with({"change": list(CHANGES), "look": list(LOOKS)}, [torch.float32], on=["linear"], magnitude=True)


@pytest.mark.parametrize(("case", "change", "look"), LOOKED_AT, ids=str)
def test_inference_sees_new_values(case: Case, change: str, look: str) -> None:
    model = case.trained().eval()
    x = case.input()
    with LOOKS[look]():
        old = model(x)
    CHANGES[change](model)
    with LOOKS[look]():
        new = model(x)
    assert not torch.allclose(new, old)
    assert_close(new, Reference(model.adapted, case)(x).detach(), 4 * EPS)
