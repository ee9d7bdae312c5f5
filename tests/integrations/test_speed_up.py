"""PEFT's layers with our kernels, held against the same layers without: PEFT's own forward pass is the reference."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import trimtab
from sampling import sample
from trimtab.errors import SurgeryError
from trimtab.integrations.peft_layer_adapter import PeftAdapter

# PEFT says so of Conv1D, of convolutions with groups, and of a bias that cannot be merged.
pytestmark = [pytest.mark.filterwarnings(f"ignore:{said}") for said in ("fan_in_fan_out", "LoRA adapter", "`lora_bias")]
IDS = torch.tensor([[3, 4, 7, 8, 10, 11], [0, 1, 2, 0, 5, 9]])
TARGETS = {
    "linear": ["linear", "bare"],
    "turned": ["turned"],
    "embedding": ["embedding", "linear"],
    "convolution": ["convolution", "grouped"],
    "all": ["linear", "bare", "turned", "embedding", "convolution"],
}


class Net(nn.Module):
    """One layer of each kind that PEFT adapts and we have kernels for."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.embedding = nn.Embedding(12, 8, padding_idx=0)
        self.linear = nn.Linear(8, 6)
        self.turned = Conv1D(5, 6)
        self.convolution = nn.Conv1d(5, 4, 3, padding=1)
        self.grouped = nn.Conv1d(4, 4, 3, groups=2)
        self.bare = nn.Linear(4, 3, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.turned(torch.relu(self.linear(self.embedding(ids)))))
        hidden = self.grouped(torch.tanh(self.convolution(hidden.mT)))
        found: Tensor = self.bare(hidden.mT)
        return found


def made(targets: str = "all", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """PEFT's model, with trained tensors that are far from where they start."""
    torch.manual_seed(0)
    model = get_peft_model(Net(), LoraConfig(r=4, target_modules=TARGETS[targets], **options)).to(dtype)
    disturb(model)
    return model.train()


@torch.no_grad()
def disturb(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.2 * torch.randn_like(parameter)


def outcome(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    """The output and the gradients of everything that is trained."""
    torch.manual_seed(seed)
    model.zero_grad()
    output = model(IDS)
    output.square().sum().backward()
    named = model.named_parameters()
    return {"output": output.detach(), **{name: one.grad for name, one in named if one.grad is not None}}


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / (1e-3 + other[name].norm())) for name in other)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The adapters that our kernels computed with, one entry a call."""
    seen: list[str] = []
    compute = PeftAdapter.compute

    def counted(self: PeftAdapter, x: Tensor, base: Any, layer: Any, name: str) -> Tensor:
        seen.append(name)
        return compute(self, x, base, layer, name)

    monkeypatch.setattr(PeftAdapter, "compute", counted)
    return iter([seen])


@pytest.fixture
def ours(calls: Iterator[list[str]]) -> list[str]:
    return next(calls)


CASES = [
    (targets, dora, dropout, extra)
    for targets in TARGETS
    for dora in (False, True)
    for dropout in (0.0, 0.3)
    for extra in ("", "rslora", "lora_bias")
    if not (targets == "convolution" and dora)
    and not (extra == "lora_bias" and (dora or targets in ("embedding", "all")))
]


@pytest.mark.parametrize(("targets", "dora", "dropout", "extra"), sample(CASES, 12))
def test_outputs_and_gradients_are_those_of_peft_with_its_dropout(
    targets: str, dora: bool, dropout: float, extra: str, ours: list[str]
) -> None:
    options = {"use_rslora": True} if extra == "rslora" else {"lora_bias": True} if extra else {}
    model = made(targets, use_dora=dora, lora_dropout=dropout, **options)
    right, names = outcome(model), list(model.state_dict())
    report = trimtab.speed_up(model)
    assert len(report.layers) == len(TARGETS[targets])
    assert not report.left
    assert difference(outcome(model), right) < 1e-11
    assert list(model.state_dict()) == names
    assert len(ours) == len(TARGETS[targets])
    if dropout and targets != "embedding":
        assert not torch.equal(outcome(model, seed=2)["output"], right["output"])
    assert difference(outcome(model.eval()), outcome(plain_copy(model))) < 1e-11


def plain_copy(model: Any) -> Any:
    """A copy whose layers are PEFT's own again."""
    plain = copy.deepcopy(model)
    for module in layers(plain):
        module.__class__ = type(module).__bases__[1]
    return plain


@pytest.mark.parametrize(("dora", "dropout"), [(False, 0.0), (False, 0.2), (True, 0.0)])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_in_bfloat16_it_is_as_near_to_the_formula_as_peft(
    dora: bool, dropout: float, adapter_dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["0", "2"], use_dora=dora, lora_dropout=dropout)
    model = get_peft_model(nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64)), config)
    disturb(model)
    for one in model.parameters():
        one.data = one.data.bfloat16() if one.requires_grad is False or adapter_dtype == torch.bfloat16 else one.data
    x = torch.randn(50, 64).bfloat16()
    found = []
    for kind in ("exact", "peft", "ours"):
        one = copy.deepcopy(model).double() if kind == "exact" else copy.deepcopy(model)
        if kind == "ours":
            trimtab.speed_up(one)
        torch.manual_seed(3)
        output = one(x.double() if kind == "exact" else x)
        output.double().square().mean().backward()
        named = one.named_parameters()
        found.append([output.detach().double(), *(p.grad.double() for _, p in named if p.grad is not None)])
    exact, peft, ours = found
    for right, theirs, own in zip(exact, peft, ours, strict=True):
        assert (own - right).norm() < 2 * (theirs - right).norm() + 2**-8 * right.norm()


def test_what_peft_does_with_adapters_goes_on(ours: list[str], tmp_path: Path) -> None:
    def through(model: Any) -> list[Tensor]:
        """The outputs of all that one can do."""
        found = []
        with torch.no_grad():
            found.append(model.eval()(IDS))
            model.add_adapter("other", LoraConfig(r=3, target_modules=TARGETS["all"], lora_alpha=20))
            model.set_adapter("other")
            torch.manual_seed(5)
            disturb(model.double())
            found.append(model(IDS))
            with model.disable_adapter():
                found.append(model(IDS))
            found.append(model(IDS, adapter_names=["other", "__base__"]))
            model.base_model.set_adapter(["default", "other"])
            found.append(model(IDS))
            model.set_adapter("default")
            for module in model.modules():
                if hasattr(module, "scale_layer"):
                    module.scale_layer(0.5)
            found.append(model(IDS))
            model.merge_adapter()
            found.append(model(IDS))
            model.unmerge_adapter()
            found.append(model(IDS))
            model.delete_adapter("other")
            model.save_pretrained(tmp_path)
            found.append(PeftModel.from_pretrained(Net().double(), tmp_path)(IDS))
            merged = model.merge_and_unload()
            assert type(merged) is Net
            assert not any("peft" in type(module).__module__ for module in merged.modules())
            return [*found, merged(IDS)]

    plain = made(use_dora=False)
    quick = copy.deepcopy(plain)
    trimtab.speed_up(quick)
    torch.manual_seed(7)
    right = through(plain)
    torch.manual_seed(7)
    for place, (one, other) in enumerate(zip(through(quick), right, strict=True)):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12), place
    assert ours.count("default") == 3 * len(TARGETS["all"])
    assert ours.count("other") == len(TARGETS["all"])


def test_nothing_that_is_kept_goes_stale(ours: list[str]) -> None:
    model = made("linear", use_dora=True).eval()
    trimtab.speed_up(model)
    layer = model.base_model.model.linear

    def check() -> None:
        with torch.no_grad():
            assert torch.allclose(model(IDS), plain_copy(model)(IDS), rtol=1e-10, atol=1e-12)

    check()
    layer.lora_A["default"].weight.data += 0.3
    check()
    layer.base_layer.weight.data[2] += 0.3
    check()
    layer.set_scale("default", 3.0)
    check()
    model.load_state_dict({name: 1.1 * one for name, one in model.state_dict().items()})
    check()
    layer.base_layer = nn.Linear(8, 6).double()
    check()
    layer.lora_magnitude_vector["default"].weight = nn.Parameter(torch.rand(6).double())
    check()
    model.float()
    with torch.no_grad():
        assert torch.allclose(model(IDS), plain_copy(model)(IDS), rtol=1e-4, atol=1e-5)
    assert len(ours) == 2 * 8


def test_copies_and_pickles_are_sped_up_and_their_own(ours: list[str]) -> None:
    model = made("linear", use_dora=True)
    trimtab.speed_up(model)
    outcome(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        disturb(other)
        assert difference(outcome(other), outcome(plain_copy(other))) < 1e-11
    assert repr(model) == repr(plain_copy(model))
    assert len(ours) == 2 * 3


def test_threads_do_not_meet_in_a_layer() -> None:
    model = made("linear", use_dora=True).eval()
    trimtab.speed_up(model)
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS["linear"], use_dora=True))
    layer, x = model.base_model.model.linear.double(), torch.randn(500, 8).double()
    kept = layer.__dict__["_trimtab_kept"]
    alone = {name: kept.adapter.compute(x, kept.base, layer, name) for name in ("default", "other")}

    def many(name: str) -> bool:
        with torch.no_grad():
            outputs = [kept.adapter.compute(x, kept.base, layer, name) for _ in range(60)]
        return all(torch.allclose(one, alone[name], rtol=1e-12) for one in outputs)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(many, ["default", "other"] * 4))


def test_what_is_no_plain_product_with_one_adapter_is_pefts_own(ours: list[str]) -> None:
    model = made("linear", use_dora=True)
    trimtab.speed_up(model)
    layer = model.base_model.model.linear
    seen = []
    handle = layer.lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
    outcome(model)
    assert seen
    assert len(ours) == 1  # the other layer
    handle.remove()
    layer.base_layer.weight.requires_grad_(True)
    assert difference(outcome(model), outcome(plain_copy(model))) < 1e-11
    assert layer.base_layer.weight.grad is not None
    assert len(ours) == 2


def test_transforms_of_torch_func_see_pefts_own(ours: list[str]) -> None:
    """With its dropout, which ours cannot draw there."""
    model = made("linear", use_dora=True, lora_dropout=0.5).train()
    trimtab.speed_up(model)
    tensors = {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}
    layer = model.base_model.model.linear
    x = torch.randn(3, layer.in_features, dtype=layer.base_layer.weight.dtype)
    own = {name.split("linear.", 1)[1]: one for name, one in tensors.items() if ".linear." in name}
    grads = torch.func.grad(lambda these: torch.func.functional_call(layer, these, (x,)).square().sum())(own)
    assert grads.keys() == own.keys()
    assert not ours


def test_a_dispatched_model_is_sped_up_before_and_after(ours: list[str]) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = made("linear", use_dora=True)
    right = outcome(model)
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None or hasattr(module, "lora_A"):
            add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))
    trimtab.speed_up(model)
    assert difference(outcome(model), right) < 1e-11
    assert len(ours) == 2


@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.3, marks=pytest.mark.full)])
def test_a_compiled_model_is_sped_up(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import layer as pefts

    model = made("linear", dtype=torch.float32, use_dora=True, lora_dropout=dropout)
    right = outcome(model)
    trimtab.speed_up(model)
    monkeypatch.setattr(pefts.Linear, "forward", None)  # which is not called any more
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = {name.removeprefix("_orig_mod."): one for name, one in outcome(compiled).items()}
    if not dropout:  # which a compiled model draws in another way
        assert difference(found, right) < 1e-5


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if "peft_layers" in type(module).__module__]


def test_a_variant_that_we_lack_is_left_and_told(ours: list[str]) -> None:
    model = made("linear")
    config = LoraConfig(r=2, target_modules=["linear"], alora_invocation_tokens=[1], task_type="CAUSAL_LM")
    model.add_adapter("invoked", config)
    with pytest.warns(trimtab.TrimtabWarning, match="ALoraLinear, a variant of LoRA"):
        report = trimtab.speed_up(model)
    assert len(report.layers) == 2
    (left,) = report.left
    assert left == "base_model.model.linear (adapter invoked)"
    assert left in str(report)
    outcome(model)
    assert ours == ["default", "default"]


def test_dora_with_dropout_in_half_precision_trains_as_in_peft_and_it_is_told(ours: list[str]) -> None:
    model = made("linear", dtype=torch.bfloat16, use_dora=True, lora_dropout=0.3)
    right = outcome(model)
    with pytest.warns(trimtab.TrimtabWarning, match="DoRA with dropout"):
        report = trimtab.speed_up(model)
    assert len(report.layers) == len(report.left) == 2
    assert "base_model.model.bare (adapter default, in training)" in report.left
    assert all(torch.equal(one, right[name]) for name, one in outcome(model).items())
    assert not ours
    model.eval()(IDS)
    assert ours == ["default", "default"]


def test_a_layer_that_we_cannot_speed_up_is_left_and_told() -> None:
    net = nn.ModuleDict(
        {"sparse": nn.Embedding(5, 4, sparse=True), "wide": nn.Conv1d(4, 4, 3, dilation=2), "fine": nn.Linear(4, 4)}
    )
    model = get_peft_model(net, LoraConfig(target_modules=["sparse", "wide", "fine"]))
    with pytest.warns(trimtab.TrimtabWarning, match="dilation") as told:
        report = trimtab.speed_up(model)
    assert len(told) == 1
    assert report.layers == ("base_model.model.fine",)
    assert set(report.left) == {"base_model.model.sparse", "base_model.model.wide"}


@pytest.mark.parametrize("dora", [False, True])
def test_four_bits_are_sped_up_and_eight_refused(dora: bool, ours: list[str]) -> None:
    bits = pytest.importorskip("bitsandbytes").nn
    torch.manual_seed(0)
    four, eight = bits.Linear4bit(64, 128, quant_type="nf4"), bits.Linear8bitLt(128, 3, has_fp16_weights=False)
    net = nn.Sequential(four.to("cpu"), nn.Tanh(), eight.to("cpu"))
    for kind, taken, x in (("4", "0", torch.randn(5, 64)), ("8", "2", torch.randn(5, 128))):
        net.is_loaded_in_4bit, net.is_loaded_in_8bit = kind == "4", kind == "8"
        model = get_peft_model(copy.deepcopy(net), LoraConfig(r=4, target_modules=[taken], use_dora=dora))
        if kind == "8":
            with pytest.raises(SurgeryError, match=r"none of 1 LoRA layers.*int8"):
                trimtab.speed_up(model)
            continue
        disturb(model)
        layer = model.base_model.model[0]
        right = layer(x)
        trimtab.speed_up(model)
        assert torch.allclose(layer(x), right, atol=1e-5)
        assert type(pickle.loads(pickle.dumps(layer))) is type(layer)
    assert ours == ["default"]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Linear(3, 3), "get_peft_model"),
        ("no model", "got str"),
        (lambda: get_peft_model(nn.Sequential(nn.Linear(3, 3)), _ia3()), "IA3"),
        (lambda: _attached(), "trimtab's own"),
        (
            lambda: get_peft_model(nn.Sequential(nn.Conv1d(3, 3, 3, dilation=2)), LoraConfig(target_modules=["0"])),
            "none of 1",
        ),
    ],
)
def test_what_cannot_be_sped_up_is_refused_in_words(model: Any, said: str) -> None:
    with pytest.raises(SurgeryError, match=said):
        trimtab.speed_up(model if isinstance(model, nn.Module) or not callable(model) else model())


def _ia3() -> Any:
    from peft import IA3Config

    return IA3Config(target_modules=["0"], feedforward_modules=[])


def _attached() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3))
    trimtab.attach(model, trimtab.Rule(match="0", method="lora", rank=2))
    return model


def test_twice_is_once_and_new_layers_come_in() -> None:
    model = made("linear")
    first = trimtab.speed_up(model)
    assert trimtab.speed_up(model) == first
    model.add_adapter("wider", LoraConfig(target_modules=["linear", "turned"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(trimtab.speed_up(model).layers) == len(first.layers) + 1
