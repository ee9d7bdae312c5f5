"""The quantised kinds of base: their dense value against float64, how much memory a look takes, how often they are
dequantised, and the places where bitsandbytes goes wrong."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import trimtab
from contract_cases import QUANTISED, Holder, assert_close, quantise
from stored_weights import stored_weight
from trimtab import bases, methods
from trimtab.bases import _quantised
from trimtab.errors import ModelError, SurgeryError

KINDS = sorted(QUANTISED)
DTYPES = [torch.float32, torch.bfloat16]
# Whole blocks of 64 in a row; 32 divides a row and 64 does not, where bitsandbytes' own kernel fails; neither; odd.
SHAPES = [(24, 128), (64, 96), (13, 20), (13, 17)]
# The largest relative error of a row's norm, by kind: half a step of 1/127 of its largest value; a 4-bit code whose
# widest gap is 0.3 of the largest in its block.
COARSE = {"int8": 0.02, "torchao_int8": 0.02, "nf4": 0.2}


def layer(kind: str, shape: tuple[int, int] = (24, 128), dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random layer with bias."""
    dense = nn.Linear(shape[1], shape[0]).to(dtype)
    return quantise(dense, kind)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_dense_value_and_norms(kind: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    dense = nn.Linear(shape[1], shape[0]).to(dtype)
    module = quantise(dense, kind)
    handle = bases.find(module)
    assert handle is not None
    assert type(handle).__module__ == f"trimtab.bases.{kind}"
    assert (handle.shape, handle.dtype, handle.stored_dense) == (shape, dtype, False)
    want = stored_weight(module)
    # One product of two float32 numbers, a sum for doubly quantised scales, and the rounding to the dtype.
    for asked in (None, torch.float32, torch.bfloat16):
        got = handle.weight(asked)
        assert got.dtype == (asked or dtype)
        eps = max(torch.finfo(dtype).eps, torch.finfo(got.dtype).eps)
        assert_close(got, want, 2 * eps, "dense value")
    assert_close(handle.squared_norms("output"), handle.weight().double().square().sum(1), 1e-12, "rows")
    assert_close(handle.squared_norms("input"), handle.weight().double().square().sum(0), 1e-12, "columns")
    before = dense.weight.detach().double()
    assert float((handle.weight().double() - before).norm() / before.norm()) < COARSE[kind]
    assert torch.equal(handle.weight(), handle.weight())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_quantised, "BLOCK", 300)
    for shape in SHAPES:
        handle = bases.find(layer(kind, shape))
        assert isinstance(handle, _quantised.QuantisedBase)
        whole, blocks = handle.weight(), handle.blocks()
        assert [block.start for block in blocks[1:]] == [block.stop for block in blocks[:-1]]
        parts = [handle.rows(block, torch.float32) for block in blocks]
        assert torch.equal(torch.cat(parts), whole)


def _allocated(work: Callable[[], object]) -> int:
    """Bytes that PyTorch's allocator had handed out at the highest while ``work`` ran, beyond those before it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        work()
    held = peak = 0
    found = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(found, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("kind", KINDS)
def test_norms_take_bounded_memory(kind: str) -> None:
    """A few blocks in float32 and float64 (and one scale for 64 weights), whatever the weight's size."""
    handle = bases.find(layer(kind, (2048, 1024), torch.bfloat16))
    assert handle is not None
    handle.squared_norms("output")
    elements = 2048 * 1024
    for axis in ("output", "input"):
        peak = _allocated(lambda: handle.squared_norms(axis))  # noqa: B023
        assert peak < 32 * _quantised.BLOCK + elements / 8, f"{axis}: {peak} bytes"
        assert peak < 2 * elements * 1.2, "less than the dense matrix in bfloat16 and its square"
    assert _allocated(handle.weight) > 2 * elements


@pytest.mark.parametrize("kind", KINDS)
def test_quantising_takes_bounded_memory(kind: str) -> None:
    """The weight is quantised a few rows at a time: what comes on top of the result is a few blocks."""
    if kind == "torchao_int8":
        pytest.skip("torchao quantises all at once")
    dense = bases.find(nn.Linear(2048, 1024, dtype=torch.bfloat16))
    assert dense is not None
    bases.quantise(dense, kind)
    assert _allocated(lambda: bases.quantise(dense, kind)) < 2 * 2048 * 1024 + 64 * _quantised.BLOCK


@pytest.mark.parametrize("method", methods.names("weight"))
@pytest.mark.parametrize("kind", KINDS)
def test_one_dequantisation_a_pass_and_none_kept(kind: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Holder(layer(kind, dtype=torch.bfloat16))
    options: dict[str, Any] = {} if method == "full" else {"rank": 2}
    trimtab.attach(model, trimtab.Rule(match="layer", method=method, magnitude=True, **options))
    calls, looks = [], type(model.adapted.handle).rows

    def counted(self: Any, *arguments: Any) -> Tensor:
        calls.append(1)
        return looks(self, *arguments)

    monkeypatch.setattr(type(model.adapted.handle), "rows", counted)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(5, 128, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(x)
    most = 0 if method == "full" else 1  # which has its own copy
    assert len(calls) == most, "forward"
    if method != "full":
        assert not [tensor for tensor in kept if tensor.shape == (24, 128)], "no dense weight between the passes"
    output.float().square().sum().backward()
    assert len(calls) == 2 * most, "backward"
    with torch.no_grad():
        model(x)
        calls.clear()
        model(x)
    assert len(calls) <= 1, "inference"
    calls.clear()
    model.adapted.adapter(x.detach(), model.adapted.handle).float().square().sum().backward()
    assert len(calls) == most, "nobody wants the gradient of the input"


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_and_copies(kind: str) -> None:
    model = Holder(layer(kind))
    trimtab.attach(model, trimtab.Rule(match="layer", method="dora", rank=2))
    x = torch.randn(5, 128, requires_grad=True)
    found = []
    for twin in (model, copy.deepcopy(model)):
        for again in (False, True):
            twin.zero_grad()
            output = checkpoint(twin, x, use_reentrant=False) if again else twin(x)
            output.square().sum().backward()
            found.append([output.detach(), *(p.grad for p in trimtab.trainable_parameters(twin).values())])
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_that_another_dtype_asked_for_is_not_kept(kind: str) -> None:
    model = Holder(layer(kind))
    trimtab.attach(model, trimtab.Rule(match="layer", method="dora", rank=2))
    with torch.no_grad():
        for parameter in trimtab.trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
        x = torch.randn(5, 128)
        before = model(x)
        twin = copy.deepcopy(model)
        with torch.autocast("cpu"):
            twin(x)
        assert torch.equal(twin(x), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [None, *methods.names("weight")])
def test_a_bias_may_have_more_digits_than_the_input(kind: str, method: str | None) -> None:
    model = Holder(layer(kind))
    if method is not None:
        options = {"magnitude": True} if method == "full" else {"rank": 2, "bias": True}
        trimtab.attach(model, trimtab.Rule(match="layer", method=method, **options))
    x = torch.randn(5, 128)
    expected = model(x)
    output = model(x.bfloat16())
    assert output.dtype == torch.bfloat16
    assert_close(output, expected, 4 * torch.finfo(torch.bfloat16).eps)
    output.sum().backward()
    bias = model.layer.bias if method is None else model.adapted.adapter.bias
    assert bias is not None
    assert bias.grad is not None
    assert bias.grad.tolist() == [5.0] * 24


@pytest.mark.parametrize("kind", KINDS)
def test_the_bare_layer_multiplies_with_its_dequantised_weight(kind: str) -> None:
    """In training and when evaluated, as often as one likes: bitsandbytes' own would quantise the batch or repack the
    weight."""
    module = layer(kind, (64, 128), torch.bfloat16)
    handle = bases.find(module)
    assert handle is not None
    before, x = handle.weight(), torch.randn(3, 5, 128, dtype=torch.bfloat16, requires_grad=True)
    want = torch.nn.functional.linear(x, before, handle.bias)
    (expected,) = torch.autograd.grad(want.float().sum(), x)
    for training in (True, False, False, True):
        module.train(training)
        with torch.no_grad():
            assert torch.equal(module(x), want)
        (got,) = torch.autograd.grad(module(x).float().sum(), x)
        assert torch.equal(got, expected)
        assert torch.equal(handle.weight(), before)


def _theirs(kind: str, dtype: torch.dtype) -> nn.Module:
    """bitsandbytes' own layer, as a user's model has it."""
    import bitsandbytes as bnb

    weight = torch.randn(64, 128, dtype=dtype) / 8
    if kind == "int8":
        module: Any = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False, threshold=6.0)
        module.weight = bnb.nn.Int8Params(weight, has_fp16_weights=False, requires_grad=False)
    else:
        module = bnb.nn.Linear4bit(128, 64, compute_dtype=dtype, quant_type="nf4")
        module.weight = bnb.nn.Params4bit(weight, quant_type="nf4", requires_grad=False, module=module)
    module.bias.data = module.bias.data.to(dtype)
    return module.to("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("looks", [0, 1, 3])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_layer_of_bitsandbytes_evaluated_before(kind: str, looks: int, dtype: torch.dtype) -> None:
    """Its weight moves, and on AVX512-BF16 it is repacked with scales rounded to bfloat16 (2^-9 of them): the base
    still gives what the layer multiplies with."""
    model = Holder(_theirs(kind, dtype)).eval()
    untouched = bases.find(copy.deepcopy(model).layer)
    assert untouched is not None
    x = torch.randn(5, 128, dtype=dtype)
    with torch.no_grad():
        outputs = [model(x) for _ in range(looks)]
    trimtab.attach(model, trimtab.Rule(match="layer", method="dora", rank=2))
    handle = model.adapted.handle
    assert_close(handle.weight(), untouched.weight(), 2**-8 if kind == "nf4" else 0.0, "what was quantised")
    if outputs:
        # Theirs is computed in bfloat16, or with the batch quantised to 8 bits.
        assert_close(model(x).detach(), outputs[-1], 0.02, "the layer's own product")
    # From here on nothing moves: their layer is not called, and after a detachment it leaves its weight alone.
    weight = handle.weight()
    for training in (True, False, True):
        model.train(training)(x)
        with torch.no_grad():
            model(x)
    trimtab.detach(model)
    model.eval()
    with torch.no_grad():
        first = model(x)
        assert torch.equal(model(x), first)
    assert torch.equal(handle.weight(), weight)


@pytest.mark.parametrize("kind", KINDS)
def test_writing_a_weight_quantises_it_anew(kind: str) -> None:
    handle = bases.find(layer(kind))
    assert handle is not None
    weight = torch.randn(24, 128)
    handle.write(weight)
    assert 0 < float((handle.weight() - weight).norm() / weight.norm()) < COARSE[kind]
    assert handle.as_dense(torch.float32) is not handle.module


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = bases.find(nn.Linear(64, 64))
    assert dense is not None
    for kind, package, extra in (("nf4", "bitsandbytes", "quantised"), ("torchao_int8", "torchao", "torchao")):
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [_Missing(package), *sys.meta_path])
        with pytest.raises(ModelError, match=rf"pip install 'trimtab\[{extra}\]'"):
            bases.quantise(dense, kind)


class _Missing:
    """An importer that finds nothing of one package."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, *_: object) -> None:
        if name.split(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _bytes_held(weight: Any, kind: str) -> int:
    """Bytes of all tensors that a quantised weight consists of."""
    if kind == "int8":
        parts = [weight.data, weight.SCB]
    elif kind == "nf4":
        state = weight.quant_state
        parts = [weight.data, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    else:
        parts = [weight.qdata, weight.scale, weight.zero_point]
    return sum(part.nbytes for part in parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_a_weight_are_told_exactly(kind: str, dtype: torch.dtype) -> None:
    for shape in (*SHAPES, (200, 320)):
        module: Any = layer(kind, shape, dtype)
        assert bases.quantised_base(kind).stored_bytes(shape, dtype) == _bytes_held(module.weight, kind)


def test_what_quantising_takes_is_told() -> None:
    """Beside the dense weight, which is there, and the quantised one: never more than is said."""
    dense = bases.find(nn.Linear(2048, 1024, dtype=torch.bfloat16))
    assert dense is not None
    for kind in KINDS:
        bases.quantise(dense, kind)
        base = bases.quantised_base(kind)
        room = base.stored_bytes((1024, 2048), torch.bfloat16) + base.quantising_bytes((1024, 2048), torch.bfloat16)
        assert _allocated(lambda: bases.quantise(dense, kind)) <= room, kind  # noqa: B023


def test_an_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"quantisation 'nf5': expected one of int8, nf4, torchao_int8.*'nf4'\?"):
        bases.quantised_base("nf5")
    assert bases.quantised_by_size() == ["int8", "nf4"], "one for each number of bits, the first by name"


@pytest.mark.parametrize("method", ["lora", "dora", "mora"])
def test_a_weight_that_is_quantised_under_its_adapter_is_told_where_the_adapter_cannot_compute(method: str) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 64))
    trimtab.attach(model, trimtab.Rule(match="0", method=method, rank=2))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    calls: list[Callable[[], Any]] = [
        lambda: trimtab.effective_weight(model, "0"),
        lambda: trimtab.convert_to_lora(model, rank=2),
        lambda: trimtab.merge(model),
    ]
    if method == "dora":
        calls.append(lambda: model(torch.randn(3, 64)))
    else:
        assert model(torch.randn(3, 64)).isfinite().all()
    for call in calls:
        with pytest.raises(SurgeryError, match=r"was quantised after its adapter .* Quantise the model before"):
            call()
