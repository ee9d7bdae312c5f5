"""What a run leaves to its device: attention, Liger's kernels, batches without padding, float16. What needs a GPU is
stood in for here; that it is chosen, told, refused and put in its place is what is tested."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

import trimtab
from evaluation_cases import gpt2, llama
from tiny_runs import tiny_model
from trimtab import tasks
from trimtab.config.read import load_config
from trimtab.errors import ConfigError, ModelError, RunError
from trimtab.runs.folder import RunFolder
from trimtab.training import on_device
from trimtab.training.on_device import fitted, packing_fault
from trimtab.training.run import finetune

pytestmark = pytest.mark.usefixtures("bare_runs")


@pytest.fixture
def configured(make_yaml: Callable[..., Path]) -> Callable[..., Any]:
    """A run's configuration with ``key.sub=value`` on top."""
    return lambda *said: load_config(make_yaml(), said)


@pytest.fixture
def fit(configured: Callable[..., Any]) -> Callable[..., tuple[Any, list[str]]]:
    """Fit a model as a run of these settings would; gives the settled configuration and what was told."""

    def call(model: Any, *said: str, dtype: torch.dtype | None = None) -> tuple[Any, list[str]]:
        told: list[str] = []
        job: Any = tasks.job_of(configured(*said))
        if dtype is not None:
            job = _Like(job.config, dtype, "bfloat16")
        return fitted(job, model, told.append).config, told

    return call


@dataclass(frozen=True)
class _Like:
    """As much of a job as is looked at."""

    config: Any
    dtype: torch.dtype
    precision: str
    task: str = "causal_lm"
    reader: Any = None


def stand_in(monkeypatch: pytest.MonkeyPatch, *packages: str, generation: int = 9, fails: str = "") -> None:
    """As if these packages were installed, and a GPU were there."""
    monkeypatch.setattr(on_device, "_installed", lambda name: name in packages)
    monkeypatch.setattr(on_device, "_generation", lambda: generation)

    def put(model: Any, name: str) -> None:
        if fails:
            raise ImportError(fails)
        model.config._attn_implementation = name

    monkeypatch.setattr(type(tiny_model()), "set_attn_implementation", put)


def test_a_processor_is_left_as_it_is_and_nothing_is_told(fit: Any) -> None:
    config, told = fit(tiny_model())
    assert told == []
    assert config.train.padding_free is False


@pytest.mark.parametrize(
    ("packages", "generation", "chosen"),
    [
        (("flash_attn", "flash_attn_interface"), 9, "flash_attention_3"),
        (("flash_attn",), 9, "flash_attention_2"),
        (("flash_attn", "flash_attn_interface"), 8, "flash_attention_2"),
        (("flash_attn", "flash_attn_interface"), 7, "sdpa"),
        ((), 9, "sdpa"),
    ],
)
def test_auto_takes_the_newest_flash_attention_that_is_there(
    fit: Any, monkeypatch: pytest.MonkeyPatch, packages: tuple[str, ...], generation: int, chosen: str
) -> None:
    stand_in(monkeypatch, *packages, generation=generation)
    monkeypatch.setattr(on_device, "_packs", lambda *_: False)
    model = tiny_model()
    _, told = fit(model, dtype=torch.bfloat16)
    assert model.config._attn_implementation == chosen
    assert told == ([] if chosen == "sdpa" else [f"on this device: attention by {chosen}"])
    model = tiny_model()
    assert fit(model, dtype=torch.float32)[1] == []  # it computes in half precision only


def test_what_is_installed_and_does_not_work_is_passed_over_by_auto(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "flash_attn")
    put = type(tiny_model()).set_attn_implementation

    def broken(model: Any, name: str) -> None:
        if name.startswith("flash"):
            raise ImportError("undefined symbol")
        put(model, name)

    monkeypatch.setattr(type(tiny_model()), "set_attn_implementation", broken)
    model = tiny_model()
    assert fit(model, dtype=torch.bfloat16)[1] == []
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ModelError, match=r"model.attention: flash_attention_2 cannot be had .* undefined symbol"):
        fit(model, "model.attention=flash_attention_2", dtype=torch.bfloat16)


def test_an_attention_that_is_asked_for_and_missing_is_refused(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    for name, reason in (
        ("flash_attention_2", "is not installed: install flash-attn for your CUDA"),
        ("flash_attention_3", "is not installed: install flash-attn-interface"),
        ("kernels-community/flash-attn2", "is fetched by the package kernels"),
    ):
        with pytest.raises(ModelError, match=f"model.attention: {name} {reason}"):
            fit(tiny_model(), f"model.attention={name}", dtype=torch.bfloat16)
    with pytest.raises(ModelError, match=r"computes in half precision: set train.precision to bfloat16"):
        fit(tiny_model(), "model.attention=flash_attention_2", dtype=torch.float32)
    stand_in(monkeypatch, "flash_attn", generation=0)
    with pytest.raises(ModelError, match="takes a GPU, and torch sees none here"):
        fit(tiny_model(), "model.attention=flash_attention_2", dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="Did you mean 'flash_attention_2'"):
        fit(tiny_model(), "model.attention=flash_attention2")


def test_padding_is_left_out_by_itself_where_flash_attention_is(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "flash_attn")
    asked = []
    monkeypatch.setattr(on_device, "packing_fault", lambda model, packer: asked.append(packer([ROW, ROW])))
    config, told = fit(tiny_model(), dtype=torch.bfloat16)
    assert told == ["on this device: attention by flash_attention_2; batches without padding"]
    assert config.train.padding_free is True
    assert asked[0]["cu_seq_lens_q"].tolist() == [0, 3, 6]
    assert fit(tiny_model(), "train.padding_free=false", dtype=torch.bfloat16)[0].train.padding_free is False
    monkeypatch.setattr(on_device, "packing_fault", lambda model, packer: "it cannot")
    assert fit(tiny_model(), dtype=torch.bfloat16)[0].train.padding_free is False
    with pytest.raises(ConfigError, match=r"train.padding_free: it cannot; set it to false"):
        fit(tiny_model(), "train.padding_free=true", dtype=torch.bfloat16)


ROW: Any = {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}


def bloom() -> Any:
    return BloomForCausalLM(BloomConfig(vocab_size=90, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.2))


def mamba() -> Any:
    return MambaForCausalLM(MambaConfig(vocab_size=90, hidden_size=16, num_hidden_layers=2, state_size=4))


def test_whether_a_model_keeps_rows_apart_is_tried_out() -> None:
    torch.manual_seed(0)
    for make in (llama, gpt2):
        assert packing_fault(make()) is None
        assert packing_fault(make().to(torch.bfloat16)) is None
    for other in (bloom(), mamba()):
        assert "would see the tokens of the row before it" in str(packing_fault(other.eval()))
    strict = llama()
    own = strict.forward
    strict.forward = lambda input_ids, use_cache=None: own(input_ids)
    assert "does not take positions that begin anew" in str(packing_fault(strict))
    leaks = llama()
    forward = leaks.forward
    leaks.forward = lambda position_ids=None, **said: forward(**said)  # as a model does that is not told of positions
    assert "would see the tokens of the row before it" in str(packing_fault(leaks))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_run_without_padding_ends_with_the_same_adapter(
    configured: Callable[..., Any], tmp_path: Path, attention: str
) -> None:
    losses, adapters = [], []
    for said in ("false", "true"):
        config = configured(
            *("train.max_steps=4", f"train.padding_free={said}", f"model.attention={attention}"),
            *("train.precision=float32", "train.prompt_loss_weight=0.2", f"output={tmp_path / said}"),
            *("train.gradient_accumulation=2", "train.log_every=1"),
        )
        folder = finetune(config)
        losses.append([line.loss for line in folder.read_metrics() if line.kind == "train"])
        adapters.append(trained_tensors(folder))
        notes = folder.read_summary().notes
        assert any("batches without padding (without flash attention" in note for note in notes) == (said == "true")
    for one, other in zip(*losses, strict=True):
        assert math.isclose(one, other, rel_tol=1e-5)
    for name, tensor in adapters[0].items():
        assert torch.allclose(adapters[1][name], tensor, rtol=0, atol=2e-4 * float(tensor.abs().max())), name


def trained_tensors(folder: RunFolder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: value for file in folder.adapter.glob("*.safetensors") for name, value in load_file(file).items()}


def test_float16_trains_with_a_scaled_loss(
    configured: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "train.max_steps=6", "train.log_every=1"
    folder = finetune(configured(*said, "train.precision=float16", f"output={tmp_path / 'half'}"))
    summary, lines = folder.read_summary(), [line for line in folder.read_metrics() if line.kind == "train"]
    assert summary.precision == "float16"
    assert any("gradients are scaled" in note for note in summary.notes)
    full = finetune(configured(*said, "train.precision=float32", f"output={tmp_path / 'full'}"))
    wanted = [line for line in full.read_metrics() if line.kind == "train"]
    for one, other in zip(lines, wanted, strict=True):
        assert math.isclose(one.loss, other.loss, rel_tol=0.02)
        assert one.grad_norm is not None
        assert math.isclose(one.grad_norm, other.grad_norm, rel_tol=0.1)  # unscaled before it is told and clipped


def test_a_step_whose_gradients_overflow_is_left_out(
    configured: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device: scaler(device, init_scale=2.0**40, backoff_factor=2**-12)
    )
    said = "train.max_steps=5", "train.log_every=1", "train.precision=float16", f"output={tmp_path / 'half'}"
    lines = [line for line in finetune(configured(*said)).read_metrics() if line.kind == "train"]
    norms = [line.grad_norm for line in lines]
    assert norms[0] is None
    assert norms[-1] is not None
    assert all(math.isfinite(line.loss) for line in lines)


def test_gradients_that_never_fit_float16_end_the_run(
    configured: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: scaler(device, init_scale=0.5))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_, **__: torch.tensor(math.inf))
    said = "train.max_steps=3", "train.log_every=1", "train.precision=float16", f"output={tmp_path / 'half'}"
    with pytest.raises(RunError, match="diverged"):
        finetune(configured(*said))


def test_liger_is_put_in_on_a_gpu_and_checked(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert importlib.util.find_spec("liger_kernel"), "make setup installs it"
    with pytest.raises(ModelError, match="Liger's kernels take a GPU"):
        fit(tiny_model(), "model.liger=true")
    monkeypatch.setattr(on_device, "_installed", lambda name: False)
    with pytest.raises(ModelError, match=r"pip install 'trimtab\[gpu\]'"):
        fit(tiny_model(), "model.liger=true")


def put_in(
    monkeypatch: pytest.MonkeyPatch, fit: Any, change: Callable[[Any], None], *said: str, model: Any = None
) -> tuple[Any, Any]:
    """Fit ``model`` as if it were on a GPU, Liger doing ``change`` to it; gives what transformers was told, and us."""
    asked: list[dict[str, bool]] = []

    def apply(model: Any, kernels: dict[str, bool]) -> None:
        asked.append(kernels)
        change(model)

    monkeypatch.setattr("transformers.integrations.liger.apply_liger_kernel", apply)
    monkeypatch.setattr(on_device, "_installed", lambda name: name == "liger_kernel")
    model = tiny_model() if model is None else model
    monkeypatch.setattr(type(model), "device", SimpleNamespace(type="cuda"), raising=False)
    monkeypatch.setattr(on_device, "_generation", lambda: 0)
    return asked, fit(model, *said)[1]


def test_of_liger_the_losses_are_not_taken(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, told = put_in(monkeypatch, fit, lambda model: None, "plan.0.method=lora")
    assert told == ["on this device: norms, rotary embedding and gates by Liger's kernels"]
    assert asked[0]["rms_norm"] is asked[0]["rope"] is asked[0]["swiglu"] is True
    assert asked[0]["cross_entropy"] is asked[0]["fused_linear_cross_entropy"] is False
    assert put_in(monkeypatch, fit, lambda model: None, "model.liger=false") == ([], [])


def test_what_writes_over_outputs_is_not_taken_where_magnitudes_are_trained(
    fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, told = put_in(monkeypatch, fit, lambda model: None, "plan.0.method=dora")
    assert told == ["on this device: norms by Liger's kernels"]
    assert asked[0]["rms_norm"] is True
    assert asked[0]["rope"] is asked[0]["swiglu"] is asked[0]["geglu"] is False


def test_gradients_of_magnitudes_are_among_what_is_compared(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(model: Any) -> None:
        model.model.layers[0].self_attn.q_proj.adapter.magnitude.register_hook(lambda grad: 2 * grad)

    model = tiny_model()
    trimtab.attach(model, trimtab.Rule(match="*q_proj", method="dora", rank=2))
    with pytest.raises(ModelError, match="computes something else"):
        put_in(monkeypatch, fit, spoil, model=model)


def test_liger_kernels_that_compute_something_else_are_refused(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(model: Any) -> None:
        with torch.no_grad():
            model.model.norm.weight.mul_(1.5)

    with pytest.raises(ModelError, match=r"model.liger: with Liger's kernels this llama computes something else"):
        put_in(monkeypatch, fit, spoil)


def test_tf32_is_said_and_set(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32 = False
        assert fit(tiny_model())[1] == []
        assert not matmul.allow_tf32
        assert fit(tiny_model(), "train.tf32=true")[1] == ["on this device: products of float32 in TF32"]
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
