"""Whatever happens to a model after its adapters came, it computes what its tensors say: its outputs, with gradients
and without, are those of ``effective_weight``, of the formula written once more, and of the merged model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sampling
import trimtab
from trimtab.ops.stamp import Stamp
from trimtab.surgery.contexts import evaluating, for_inference

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 2},
    "dora": {"method": "dora", "rank": 2},
    "dora, exact gradient": {"method": "dora", "rank": 2, "detach_norm": False},
    "dora of columns": {"method": "dora", "rank": 2, "magnitude_axis": "input"},
    "magnitude alone": {"method": "dora", "rank": 0},
    "mora of magnitudes": {"method": "mora", "rank": 2, "magnitude": True},
    "full": {"method": "full", "magnitude": True},
}
every_method = pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)


def fresh(seed: int, scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 9))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def adapted(options: dict[str, Any], seed: int = 1, scale: float = 1.0) -> nn.Sequential:
    model = fresh(seed, scale)
    trimtab.attach(model, trimtab.Rule(match="*", **options))
    with torch.no_grad():
        for parameter in trimtab.trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def by_hand(layer: Any) -> Tensor:
    """The effective weight in float64."""
    adapter, options, weight = layer.adapter, layer.adapter.options, layer.base.weight.double()
    names = dict(adapter.named_parameters())
    if "weight" in names:
        weight = adapter.weight.double()
    elif "M" in names:
        weight = weight + adapter.delta(torch.float64)
    elif "A" in names:
        weight = weight + options.scale * adapter.B.double() @ adapter.A.double()
    if adapter.magnitude is None:
        return weight
    along = 1 if options.magnitude_axis == "output" else 0
    return adapter.magnitude.double().unsqueeze(along) * weight / weight.norm(dim=along, keepdim=True)


def assert_right(model: nn.Sequential, tolerance: float = 1e-5) -> None:
    """The model computes what its tensors say, in every way of asking it."""
    x = torch.randn(5, 12).to(model[0].base.weight.dtype)
    with torch.no_grad():
        weights = [by_hand(model[place]) for place in (0, 2)]
        biases = [model[place].bias.double() for place in (0, 2)]
        want = F.linear(torch.tanh(F.linear(x.double(), weights[0], biases[0])), weights[1], biases[1])
        for place, weight in zip((0, 2), weights, strict=True):
            assert close(trimtab.effective_weight(model, str(place)), weight, 1e-5)
            assert close(model[place].weight, weight, tolerance)
    for _ in range(2):
        assert close(model(x), want, tolerance), "with gradients"
        with torch.no_grad():
            assert close(model(x), want, tolerance), "without"
        with evaluating(model):
            assert close(model(x), want, tolerance), "served"
            assert close(model(x[:1]), want[:1], tolerance), "one token"
    merged = copy.deepcopy(model)
    trimtab.merge(merged)
    assert close(merged(x), want, tolerance), "merged"


def close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return bool((one.double() - other.double()).norm() <= tolerance * other.double().norm())


def use(model: nn.Sequential) -> None:
    """Let the model remember whatever it remembers."""
    x = torch.randn(3, 12).to(model[0].base.weight.dtype)
    model(x).square().sum().backward()
    with torch.no_grad():
        model(x), model(x)
    with evaluating(model):
        model(x), model(x)


def _in_place(model: Any, change: Callable[[Tensor], object]) -> None:
    with torch.no_grad():
        for place in (0, 2):
            change(model[place].base.weight)


def _replace(model: Any) -> None:
    for place in (0, 2):
        model[place].weight = nn.Parameter(3 * torch.randn_like(model[place].base.weight), requires_grad=False)


def _replace_on_the_base(model: Any) -> None:
    for place in (0, 2):
        model[place].base.weight = nn.Parameter(3 * torch.randn_like(model[place].base.weight), requires_grad=False)


def _other_data(model: Any) -> None:
    for place in (0, 2):
        model[place].base.weight.data = 3 * torch.randn_like(model[place].base.weight)


def _data_of_what_is_read(model: Any) -> None:
    for place in (0, 2):
        model[place].weight.data = 3 * torch.randn_like(model[place].base.weight)


def _other_layer(model: Any) -> None:
    for place in (0, 2):
        out_features, in_features = model[place].base.weight.shape
        model[place].base = nn.Linear(in_features, out_features).requires_grad_(False)


def _state(model: Any, **said: Any) -> None:
    other = adapted({**OPTIONS_OF[id(model)]}, seed=7, scale=3.0)
    assert not any(model.load_state_dict({name: one.clone() for name, one in other.state_dict().items()}, **said))


def _base_state(model: Any) -> None:
    other = fresh(7, 3.0).state_dict()
    state = {f"{name[0]}.base{name[1:]}": tensor for name, tensor in other.items()}
    assert not model.load_state_dict(state, strict=False).unexpected_keys


def _swapped(model: Any) -> None:
    other = adapted({**OPTIONS_OF[id(model)]}, seed=7, scale=3.0)
    for place in (0, 2):
        torch.utils.swap_tensors(model[place].base.weight, other[place].base.weight)


OPTIONS_OF: dict[int, dict[str, Any]] = {}
CHANGES: dict[str, Callable[[Any], object]] = {
    "nothing": lambda model: None,
    "load_state_dict": _state,
    "load_state_dict with assign": lambda model: _state(model, assign=True),
    "the base's state alone": _base_state,
    "times two": lambda model: _in_place(model, lambda weight: weight.mul_(2)),
    "a row": lambda model: _in_place(model, lambda weight: weight[3].mul_(5)),
    "data times two": lambda model: _in_place(model, lambda weight: weight.data.mul_(2)),
    "a row of data": lambda model: _in_place(model, lambda weight: weight.data[3].mul_(5)),
    "a number of data": lambda model: _in_place(model, lambda weight: weight.data[3, 4].fill_(9)),
    "by numpy": lambda model: _in_place(model, lambda weight: weight.numpy().__setitem__((3, 4), 9.0)),
    "another weight": _replace,
    "another weight under the adapter": _replace_on_the_base,
    "other data": _other_data,
    "other data of what is read": _data_of_what_is_read,
    "another layer": _other_layer,
    "swapped tensors": _swapped,
    "another magnitude": lambda model: [one.data.mul_(2) for one in trimtab.trainable_parameters(model).values()],
}


PAIRS = [(method, change) for method in METHODS for change in CHANGES]


@pytest.mark.parametrize(("method", "name"), sampling.sample(PAIRS, 5, always=[("dora", change) for change in CHANGES]))
def test_a_model_computes_what_its_tensors_say(method: str, name: str) -> None:
    options, change = METHODS[method], CHANGES[name]
    model = adapted(options)
    OPTIONS_OF[id(model)] = options
    use(model)
    change(model)
    assert_right(model)


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_in_another_dtype_it_computes_what_its_tensors_say(options: dict[str, Any], dtype: torch.dtype) -> None:
    model = adapted(options)
    use(model)
    model.to(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 0.03
    if dtype == torch.float64:
        assert_right(model, 1e-5)
        layer: Any = model[0]
        x = torch.randn(4, 12, dtype=dtype)
        assert close(layer(x), F.linear(x, by_hand(layer), layer.bias), tolerance)
    else:
        assert_right(model, tolerance)
    model.float()
    assert_right(model)


@every_method
def test_a_tie_that_is_made_later_is_followed(options: dict[str, Any]) -> None:
    model = adapted(options)
    use(model)
    embedding = nn.Embedding(20, 12).requires_grad_(False)
    model[0].weight = embedding.weight
    assert model[0].base.weight is embedding.weight
    assert_right(model)
    with torch.no_grad():
        embedding.weight.mul_(3)
    assert_right(model)


@every_method
def test_a_state_is_loaded_by_another_process(options: dict[str, Any]) -> None:
    """A fresh network with the same plan, and then the checkpoint: restarted training."""
    one = adapted(options, scale=3.0)
    state = pickle.loads(pickle.dumps(one.state_dict()))
    other = adapted(options, seed=2)
    other.load_state_dict(state)
    x = torch.randn(5, 12)
    assert torch.equal(other(x), one(x))
    assert_right(other)


def on_meta(options: dict[str, Any]) -> nn.Sequential:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 9))
        trimtab.attach(model, trimtab.Rule(match="*", **options))
    return model


@every_method
def test_built_without_memory_it_takes_all_from_the_checkpoint(options: dict[str, Any]) -> None:
    one = adapted(options, scale=3.0)
    x = torch.randn(5, 12)
    for model in (on_meta(options), on_meta(options).to_empty(device="cpu")):
        model.load_state_dict({name: tensor.clone() for name, tensor in one.state_dict().items()}, assign=True)
        assert torch.equal(model(x), one(x))
        assert_right(model)
    model = on_meta(options).to_empty(device="cpu")
    model.load_state_dict(one.state_dict())
    assert torch.equal(model(x), one(x))
    assert_right(model)


@every_method
def test_built_without_memory_and_given_the_base_alone_it_starts_there(options: dict[str, Any]) -> None:
    model = on_meta(options).to_empty(device="cpu")
    bare = fresh(5, 3.0)
    _load_base(model, bare)
    x = torch.randn(5, 12)
    assert torch.allclose(model(x), bare(x), atol=1e-5)
    assert_right(model)
    before = [parameter.clone() for parameter in trimtab.trainable_parameters(model).values()]
    assert all(bool(parameter.isfinite().all()) for parameter in before)
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in trimtab.trainable_parameters(model).values())
    with torch.no_grad():
        model[0].base.weight.mul_(2)
    model(x)
    after = trimtab.trainable_parameters(model).values()
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True)), "it started once"


def test_what_starts_at_the_base_is_saved_as_it_starts(tmp_path: Path) -> None:
    options = METHODS["mora of magnitudes"]
    model, bare = on_meta(options).to_empty(device="cpu"), fresh(5, 3.0)
    _load_base(model, bare)
    trimtab.save_adapter(model, tmp_path)
    other = fresh(5, 3.0)
    trimtab.load_adapter(other, tmp_path)
    x = torch.randn(5, 12)
    assert torch.allclose(other(x), bare(x), atol=1e-5)


def _load_base(model: nn.Module, bare: nn.Module) -> None:
    state = {f"{name[0]}.base{name[1:]}": tensor for name, tensor in bare.state_dict().items()}
    model.load_state_dict(state, strict=False)


NOWHERE = "on the meta device"


@every_method
def test_an_adapter_without_memory_says_so(options: dict[str, Any], tmp_path: Path) -> None:
    """A product with tensors that have no memory would give whatever lies in the memory of the product."""
    model = on_meta(options)
    with pytest.raises(trimtab.AdapterError, match=NOWHERE):
        trimtab.save_adapter(model, tmp_path)
    state = {f"{name[0]}.base{name[1:]}": tensor for name, tensor in fresh(5).state_dict().items()}
    model.load_state_dict(state, strict=False, assign=True)
    x = torch.randn(5, 12)
    with pytest.raises(trimtab.SurgeryError, match=rf"the adapter \({options['method']}\) is {NOWHERE}.*to_empty"):
        model(x)
    with torch.no_grad(), trimtab.for_inference(model), pytest.raises(trimtab.SurgeryError, match=NOWHERE):
        model(x[:1])
    with pytest.raises(trimtab.SurgeryError, match=NOWHERE):
        trimtab.merge(model)


def test_a_whole_module_without_memory_says_so() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv1d(4, 6, 3))
    trimtab.attach(model, trimtab.Rule(match="*", method="full"))
    state = {f"0.base.{name}": tensor for name, tensor in nn.Conv1d(4, 6, 3).state_dict().items()}
    model.load_state_dict(state, strict=False, assign=True)
    with pytest.raises(trimtab.SurgeryError, match=NOWHERE):
        model(torch.randn(2, 4, 7))


def test_an_adapter_that_is_loaded_where_no_memory_is_says_so(tmp_path: Path) -> None:
    trimtab.save_adapter(adapted(METHODS["lora"], scale=3.0), tmp_path)
    with torch.device("meta"):
        model = fresh(5)
    with pytest.warns(trimtab.TrimtabWarning, match=f"{NOWHERE}.*not its numbers"):
        trimtab.load_adapter(model, tmp_path)


@every_method
def test_copies_and_pickles_of_a_used_model_go_their_own_ways(options: dict[str, Any]) -> None:
    model = adapted(options)
    use(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        _in_place(other, lambda weight: weight.data.mul_(3))
        assert_right(other)
        assert_right(model)


def replica(module: nn.Module) -> nn.Module:
    """What ``nn.DataParallel`` makes of a module for each pass: copies of the modules, whose tensors are no parameters
    (torch.nn.parallel.replicate). Here they are twice those of the original."""
    other = module._replicate_for_data_parallel()
    other._former_parameters = {}
    for name, child in module._modules.items():
        other._modules[name] = None if child is None else replica(child)
        if child is not None:
            setattr(other, name, other._modules[name])
    for name, parameter in module._parameters.items():
        if parameter is None:
            other._parameters[name] = None
        else:
            copied = 2 * parameter
            setattr(other, name, copied)
            other._former_parameters[name] = copied
    return other


@every_method
def test_replicas_use_their_own_tensors(options: dict[str, Any]) -> None:
    model = adapted(options)
    use(model)
    x = torch.randn(5, 12)
    doubled = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in doubled.parameters():
            parameter.mul_(2)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            other: Any = replica(model)
            assert torch.allclose(other(x), doubled(x), rtol=1e-4, atol=1e-4)
            assert torch.allclose(other[0].weight, doubled[0].weight, rtol=1e-4, atol=1e-5)
    with for_inference(model), torch.no_grad():
        model(x[:1])
        assert torch.allclose(replica(model)(x[:1]), doubled(x[:1]), rtol=1e-4, atol=1e-4)
    found = torch.autograd.grad(replica(model)(x).square().sum(), list(trimtab.trainable_parameters(model).values()))
    want = torch.autograd.grad(doubled(x).square().sum(), list(trimtab.trainable_parameters(doubled).values()))
    assert all(torch.allclose(one, 2 * it, rtol=1e-3, atol=1e-3) for one, it in zip(found, want, strict=True))
    found, want = (
        torch.autograd.grad(read.weight.square().sum(), [one for name, one in of.named_parameters() if name != "bias"])
        for read, of in ((replica(model)[0], model[0].adapter), (doubled[0], doubled[0].adapter))
    )
    assert all(torch.allclose(one, 2 * it, rtol=1e-3, atol=1e-3) for one, it in zip(found, want, strict=True))
    assert_right(model)


@pytest.mark.parametrize(
    "options", list(METHODS.values()) if sampling.everything else [METHODS["dora"], METHODS["dora of columns"]]
)
def test_a_compiled_model_follows_its_tensors(options: dict[str, Any]) -> None:
    model = adapted(options)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 12)
    for _ in range(2):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert torch.allclose(compiled(x), model(x), atol=1e-5)
        _in_place(model, lambda weight: weight.data.mul_(2))


def test_functional_call_takes_another_base() -> None:
    model = adapted(METHODS["dora"])
    use(model)
    other = adapted(METHODS["dora"], seed=6, scale=3.0)
    x = torch.randn(5, 12)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            got = torch.func.functional_call(model, dict(other.named_parameters()), (x,))
            assert torch.allclose(got, other(x), atol=1e-6)
    assert_right(model)


@pytest.mark.parametrize("kind", ["int8", "torchao_int8"])
def test_a_quantised_base_is_followed(kind: str) -> None:
    from trimtab import bases

    base = bases.find(nn.Linear(64, 16))
    assert base is not None
    model = nn.Sequential(bases.quantise(base, kind))
    trimtab.attach(model, trimtab.Rule(match="0", method="dora", rank=2))
    layer: Any = model[0]
    x = torch.randn(5, 64)
    with torch.no_grad():
        layer.adapter.B.normal_()
        for _ in range(2):
            assert close(layer(x), F.linear(x, trimtab.effective_weight(model, "0"), layer.bias), 1e-4)
            layer.handle.stored()[1].mul_(3)  # the scales


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (4000, 16), (16, 4000), (129, 128), (40, 30, 20)])
@pytest.mark.parametrize("turned", [False, True])
def test_a_change_of_any_row_or_column_is_seen(shape: tuple[int, ...], turned: bool) -> None:
    weight = torch.randn(shape)
    if turned:
        weight = weight.mT
    stamp = Stamp([weight])
    assert stamp.fits([weight])
    rows, columns = weight.data.flatten(0, -2) if weight.is_contiguous() else weight.data.reshape(-1, 1), weight.data
    for place in range(0, weight.shape[-2], 7):
        change = rows[place] if weight.is_contiguous() else columns[..., place, :]
        change.mul_(2)
        assert not stamp.fits([weight]), f"row {place}"
        change.div_(2)
        assert stamp.fits([weight])
    for place in range(0, weight.shape[-1], 7):
        columns[..., place].mul_(2)
        assert not stamp.fits([weight]), f"column {place}"
        columns[..., place].div_(2)
    assert stamp.fits([weight])


def test_a_stamp_knows_another_tensor_of_the_same_numbers() -> None:
    weight = torch.randn(3, 4)
    stamp = Stamp([weight])
    assert not stamp.fits([weight.clone()])
    assert not stamp.fits([weight, weight])
    assert not stamp.fits([])
    weight.add_(0)
    assert not stamp.fits([weight], quickly=True), "its version says that it was changed"
