"""What works on one architecture: it is made tiny, adapted with ``all-linear``, and everything is held against the bare
model or against PEFT.

The reference of a gradient is the bare model's own: with ``G`` that of a weight, LoRA's ``B`` gets ``s G A^T`` at step
0, and DoRA's magnitude the sum of each row of ``G W / ||W||`` (at step 0 the norm is the magnitude).
"""

from __future__ import annotations

import copy
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers
from model_list import architectures
from tiny_config import tiny
from tiny_inputs import candidates, mended
from tiny_overrides import CONFIGS, INPUTS, TRAINING
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import trimtab
from trimtab.surgery.adapted import AdaptedLayer, adapted_modules

SECONDS = 120
ROUNDING, SUMS = 1e-5, 1e-3
"""Two ways to compute one thing in float32 through a few layers; and gradients, which are sums that can cancel."""
MEANINGS = {
    "LoRA: step 0": "the outputs are the bare model's, bit for bit",
    "LoRA: gradients": "every adapter whose weight gets a gradient in the bare model gets the one that follows from it",
    "DoRA: step 0": "the outputs are the bare model's within rounding",
    "DoRA: gradients": "as for LoRA; the magnitude, too",
    "saved, loaded": "saved, and loaded onto the bare model: the outputs are the same, bit for bit",
    "merged": "so they are after a merge, within rounding",
    "from_pretrained": "and after save_pretrained and from_pretrained of the merged model",
    "PEFT's folder": "what PEFT saves of its own all-linear LoRA of rank 2 loads here with PEFT's outputs",
}
CHECKS = tuple(MEANINGS)


@dataclass
class Record:
    """What was found. ``checks`` says "yes", or what was wrong; ``reason`` why the model could not be made at all.
    ``rule`` is ``*`` where there is no linear layer, and ``options`` are those that the model asks for."""

    name: str
    model_type: str
    mappings: list[str]
    rule: str = "all-linear"
    options: dict[str, bool] = field(default_factory=dict)
    inputs: str = ""
    modules: int = 0
    unreached: dict[str, int] = field(default_factory=dict)
    checks: dict[str, str] = field(default_factory=dict)
    reason: str = ""

    def plain(self) -> dict[str, Any]:
        return asdict(self)


class NotMadeError(Exception):
    """The model cannot be made tiny, or run, here."""


class TooLongError(BaseException):
    """The time for one architecture is over. No ``Exception``, so that no library takes it for an error of its own."""


def examine(name: str) -> Record:
    """Everything that is checked of the class ``name``."""
    listed = architectures()[name]
    record = Record(listed.name, listed.model_type, listed.mappings)
    with warnings.catch_warnings(), _at_most(SECONDS), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        try:
            _examine(record, folder)
        except NotMadeError as error:
            record.reason = str(error)
        except TooLongError:
            record.reason = f"not through in {SECONDS} s"
        except Exception as error:
            record.reason = f"not examined: {_words(error)}"
    return record


def _examine(record: Record, folder: str) -> None:
    model, record.inputs, inputs = made(record.name, record.model_type)
    bare = _Bare(model, inputs)
    try:
        _attached(copy.deepcopy(model), record, "lora", 2)
    except trimtab.PlanError:  # no linear layer but its head
        record.rule = "*"
    try:
        for method, rank in (("LoRA", 2), ("DoRA", 1)):
            _begin(record, copy.deepcopy(model), bare, method, rank)
        adapted = copy.deepcopy(model)
        report = _attached(adapted, record, "dora", 1)
    except trimtab.errors.TrimtabError as error:
        raise NotMadeError(f"attach: {_words(error)}") from None
    # Copied before it has run: some models keep what the last pass has left.
    merged = copy.deepcopy(adapted)
    check = record.checks
    record.modules = len(report.modules)
    record.unreached = dict(getattr(report, "unreached", None) or {})
    stir(adapted)
    stir(merged)
    try:
        expected = bare.run(adapted)
    except Exception as error:
        check.update(dict.fromkeys(CHECKS[4:], _words(error)))
        return
    if _apart(expected, bare.outputs) < 1e-6 and any(gradient is not None for gradient in bare.gradients.values()):
        check["DoRA: step 0"] = "the stirred adapter changes no output"

    @_said(check, "saved, loaded")
    def _() -> None:
        trimtab.save_adapter(adapted, f"{folder}/adapter")
        again = copy.deepcopy(model)
        trimtab.load_adapter(again, f"{folder}/adapter")
        _same(bare.run(again), expected, "loaded", exactly=True)

    @_said(check, "merged")
    def _() -> None:
        trimtab.merge(merged)
        _same(bare.run(merged), expected, "merged", 1e-4)

    @_said(check, "from_pretrained")
    def _() -> None:
        try:
            _same(bare.run(_through_disk(merged, f"{folder}/merged")), expected, "loaded", 1e-4)
        except Exception as error:
            _blame_bare(model, bare, f"{folder}/bare")
            raise error

    @_said(check, "PEFT's folder")
    def _() -> None:
        _peft(model, bare, f"{folder}/peft")


def made(name: str, model_type: str) -> tuple[nn.Module, str, dict[str, Any]]:
    """A tiny random model, what its inputs are, and the inputs. Raises NotMadeError with the reason."""
    override = CONFIGS.get(name, CONFIGS.get(model_type, {}))
    torch.manual_seed(0)
    try:
        kind: Any = getattr(transformers, name)
    except AttributeError:
        raise NotMadeError("transformers has no such class") from None
    try:
        model = kind(tiny(getattr(kind, "config_class", None) or CONFIG_MAPPING[model_type], override)).eval()
    except ImportError as error:
        raise NotMadeError(_package(error)) from None
    except Exception as error:
        raise NotMadeError(f"not made tiny: {_words(error)}") from None
    if (numbers := sum(parameter.numel() for parameter in model.parameters()) // 10**6) >= 30:
        raise NotMadeError(f"not made tiny: it has {numbers} million numbers")
    _without_zeros(model)
    if any(word in model_type for word in TRAINING):
        model.train()
    wrong = []
    given = INPUTS.get(name, INPUTS.get(model_type))
    torch.manual_seed(5)
    for kind_of, inputs in [("given", given(model))] if given else candidates(model):
        trial: dict[str, Any] | None = inputs
        for _ in range(3):
            if trial is None:
                break
            try:
                torch.manual_seed(1)
                with torch.no_grad():
                    if _tensors(copy.deepcopy(model)(**copy.deepcopy(trial))):
                        return _with_statistics(model, trial), kind_of, trial
                    trial = None
                    wrong.append("no tensors in its outputs")
            except Exception as error:
                wrong.append(f"{kind_of}: {_words(error)}")
                trial = mended(model, trial, str(error))
    raise NotMadeError("no inputs that it takes: " + " | ".join(dict.fromkeys(wrong)))


class _Bare:
    """What the bare model computes, and the gradient of each of its parameters by name."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        self.inputs = inputs
        self.model = copy.deepcopy(model)
        self.outputs = self.run(self.model)
        self.model.requires_grad_(True)
        self.no_way_back = ""
        try:
            self.backward(self.model)
        except Exception as error:
            self.no_way_back = f"nor the bare model: {_words(error)}"
        self.gradients = {
            name: parameter.grad for name, parameter in self.model.named_parameters(remove_duplicate=False)
        }
        self.names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        if not all(_is_number(tensor).any() for tensor in self.outputs):
            raise NotMadeError("the bare model's outputs are not numbers")

    def _forward(self, model: nn.Module) -> list[Tensor]:
        torch.manual_seed(1)
        return _tensors(model(**copy.deepcopy(self.inputs)))

    def run(self, model: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return [tensor.clone() for tensor in self._forward(model)]

    def backward(self, model: nn.Module) -> None:
        """The gradients of a weighted sum of all outputs, if they have any."""
        generator = torch.Generator().manual_seed(2)
        total = []
        for tensor in self._forward(model):
            weights = torch.randn(tensor.shape, generator=generator)  # also for one that hangs on no trained tensor
            if tensor.requires_grad:
                total.append((torch.where(_is_number(tensor), tensor, 0.0) * weights).sum().float())
        if total:
            torch.stack(total).sum().backward()


def _attached(model: nn.Module, record: Record, method: str, rank: int) -> Any:
    rule = trimtab.Rule(match=record.rule, method=method, rank=rank, alpha=2 * rank, **record.options)
    return trimtab.attach(model, rule)


def _begin(record: Record, model: nn.Module, bare: _Bare, method: str, rank: int) -> None:
    """Attach to ``model``, a copy of the bare one, compare at step 0, and compare the gradients."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    _attached(model, record, method.lower(), rank)

    @_said(record.checks, f"{method}: step 0")
    def _() -> None:
        _same(bare.run(model), bare.outputs, "step 0", exactly=method == "LoRA")

    @_said(record.checks, f"{method}: gradients")
    def _() -> None:
        if bare.no_way_back:
            raise AssertionError(bare.no_way_back)
        bare.backward(model)
        _gradients(model, bare, names)

    if "keep_product" in record.checks[f"{method}: gradients"] and not record.options:
        record.options["keep_product"] = True
        trimtab.detach(model)
        _begin(record, model, bare, method, rank)


def _gradients(model: nn.Module, bare: _Bare, names: dict[int, str]) -> None:
    compared: list[tuple[str, Tensor, Tensor]] = []
    missing, counted = [], 0
    for place, module in adapted_modules(model):
        if not isinstance(module, AdaptedLayer):
            continue
        adapter = module.adapter
        name = names.get(id(module.handle.parameter), "")
        gradient = bare.gradients.get(name)
        if gradient is None:
            continue
        counted += 1
        if any(parameter.grad is None for parameter in adapter.parameters()):
            missing.append(place)
            continue
        matrix = gradient.T if module.handle.stored_transposed else gradient
        if matrix.shape != module.handle.shape or _is_used_elsewhere(bare.model, name, model):
            continue
        weight = module.handle.weight().detach()
        expected = {"B": adapter.options.scale * matrix @ adapter.A.detach().T}
        if adapter.magnitude is not None:
            norms = weight.norm(dim=1)
            expected["magnitude"] = (matrix * weight).sum(1) / torch.where(norms > 0, norms, 1.0)
        compared += [(f"{place}.{one}", getattr(adapter, one).grad, value) for one, value in expected.items()]
    # Rounding in the largest of them may be all there is in one whose terms cancel.
    floor = 1e-5 * max((float(value.norm()) for _, _, value in compared), default=0.0)
    wrong = [
        f"{place} ({float((found - value).norm() / value.norm()):.1e})"
        for place, found, value in compared
        if not (found - value).norm() <= SUMS * value.norm() + floor
    ]
    if missing:
        raise AssertionError(f"none for {len(missing)} of {counted} adapters, such as {missing[0]}")
    if wrong:
        raise AssertionError(f"{len(wrong)} are not the bare model's, such as {wrong[0]}")


def _is_used_elsewhere(bare: nn.Module, name: str, adapted: nn.Module) -> bool:
    """Whether the weight is also that of a module which has no adapter here (a tied embedding)."""
    parameter = dict(bare.named_parameters(remove_duplicate=False))[name]
    places = [one for one, other in bare.named_parameters(remove_duplicate=False) if other is parameter]
    reached = {
        id(module.handle.parameter) for _, module in adapted_modules(adapted) if isinstance(module, AdaptedLayer)
    }
    plain = sum(
        held is not None and id(held) in reached and not any(part == "base" for part in where.split("."))
        for where, module in adapted.named_modules()
        for held in module._parameters.values()
    )
    return len(places) > 1 and plain > 0


def stir(model: nn.Module) -> None:
    """Move every trained tensor, as far as a long training would."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in trimtab.trainable_parameters(model).items():
            if name.endswith("magnitude"):
                parameter.mul_(0.9 + 0.2 * torch.rand_like(parameter))
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))


def _through_disk(model: Any, folder: str) -> nn.Module:
    model.save_pretrained(folder)
    loaded: nn.Module = type(model).from_pretrained(folder)
    return loaded.eval()


def _blame_bare(model: nn.Module, bare: _Bare, folder: str) -> None:
    """Raise if transformers does not even save and load the bare model."""
    try:
        again = bare.run(_through_disk(copy.deepcopy(model), folder))
    except Exception as error:
        raise AssertionError(f"nor does transformers with the bare model: {_words(error)}") from None
    if (apart := _apart(again, bare.outputs)) > 1e-4:
        raise AssertionError(f"nor does transformers with the bare model: {apart:.1e} apart")


def _peft(model: nn.Module, bare: _Bare, folder: str) -> None:
    import peft

    torch.manual_seed(4)
    try:
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", init_lora_weights=False)
        theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
        expected = bare.run(theirs.base_model.model)
        theirs.save_pretrained(folder)
    except Exception as error:
        raise AssertionError(f"nor PEFT: {_words(error)}") from None
    again = copy.deepcopy(model)
    trimtab.load_adapter(again, folder)
    if _apart(bare.run(again), expected) > 1e-4 and _apart(bare.run(again), _merged(theirs, bare)) <= 1e-4:
        raise AssertionError("nor PEFT: its own merged model computes what ours does, and its adapted model does not")
    _same(bare.run(again), expected, "loaded", 1e-4)


def _merged(theirs: Any, bare: _Bare) -> list[Tensor]:
    """PEFT's adapter in the weights themselves, where a model that reads them, and calls no layer, has it, too."""
    return bare.run(theirs.merge_and_unload())


def _said(checks: dict[str, str], name: str) -> Callable[[Callable[[], None]], None]:
    """Run a check, and note "yes" or what was wrong."""

    def run(check: Callable[[], None]) -> None:
        try:
            check()
            checks[name] = "yes"
        except Exception as error:
            checks[name] = _words(error)

    return run


def _tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors in an output, without those that a pass keeps for the next."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() and output.numel() else []
    if isinstance(output, dict):
        kept = [
            value for name, value in output.items() if name not in ("cache", "past_key_values", "cache_params", "mems")
        ]
        return [tensor for value in kept for tensor in _tensors(value)]
    if isinstance(output, list | tuple):
        return [tensor for value in output for tensor in _tensors(value)]
    return []


def _is_number(tensor: Tensor) -> Tensor:
    """Where ``tensor`` is neither infinite nor NaN nor a mask, which would drown everything beside it in a norm."""
    return torch.isfinite(tensor) & (tensor.abs() < 1e30)


def _apart(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest relative distance of two tensors that belong together; infinite if they do not."""
    if [tensor.shape for tensor in one] != [tensor.shape for tensor in other]:
        return float("inf")
    worst = 0.0
    for first, second in zip(one, other, strict=True):
        finite = _is_number(second)
        if not torch.equal(finite, _is_number(first)):
            return float("inf")
        difference = (first.double() - second.double())[finite].norm()
        worst = max(worst, float(difference / second.double()[finite].norm().clamp_min(1e-30)) if difference else 0.0)
    return worst


def _same(one: list[Tensor], other: list[Tensor], what: str, rounding: float = ROUNDING, exactly: bool = False) -> None:
    apart = _apart(one, other)
    if not apart <= (0.0 if exactly else rounding):
        raise AssertionError(f"{what}: outputs are {apart:.1e} apart")


def _without_zeros(model: nn.Module) -> None:
    """Give weights that begin as one number (heads of zeros, gates of ones) some difference, and layers that begin with
    next to no weight in the sum (a scale of 1e-6) some weight."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.conv._ConvNd) and module.weight.std() > 0:  # a signal dies away in them
                module.weight.mul_(module.weight[0].numel() ** -0.5 / module.weight.std())
        for parameter in model.parameters():
            if (
                parameter.is_floating_point()
                and parameter.numel()
                and bool((parameter == parameter.flatten()[0]).all())
            ):
                if parameter.dim() > 1:
                    parameter.add_(0.05 * torch.randn_like(parameter))
                elif 0 < parameter.flatten()[0].abs() < 0.1:
                    parameter.fill_(0.5)


def _with_statistics(model: nn.Module, inputs: dict[str, Any]) -> nn.Module:
    """``model`` with batch norms that know these inputs: without, a signal dies away in layers of small weights."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    counted = copy.deepcopy(model)
    if norms:
        try:
            for module in counted.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.momentum = None  # the mean over all that was seen
                    module.train()
            counted(**copy.deepcopy(inputs))
        except Exception:  # one place for each channel: nothing to count
            return model
        model.load_state_dict(counted.state_dict())
    return model


def _package(error: ImportError) -> str:
    words = str(error).split()
    return f"needs the package {words[words.index('requires') + 2]}" if "requires" in words else _words(error)


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (
        (f"{text[:240]}..." if len(text) > 240 else text)
        if isinstance(error, AssertionError)
        else f"{type(error).__name__}: {text[:240]}"
    )


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def over(*_: Any) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
