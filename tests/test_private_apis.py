"""What the library uses of others without their promise: names that begin with an underscore, modules that do, and
tables that torch's modules keep. Each has a test here that says which version took it away; until then it may be used.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

SOURCE = Path(__file__).resolve().parents[1] / "src" / "trimtab"
# The tests below hold these.
TESTED = {
    *("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_apply"),
    *("_raw_saved_tensors", "_grouped_mm"),
    *("_backward_hooks", "_backward_pre_hooks", "_version", "_schema", "_make_wrapper_subclass"),
    *("_conv_forward", "_reversed_padding_repeated_twice", "_tied_weights_keys"),
    *("_disabled_torch_function_impl", "_C", "_is_tracing", "_are_functorch_transforms_active"),
    *("_compiled_call_impl", "_call_impl", "_dynamo", "_functorch", "_subclasses", "_python_dispatch"),
    *("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_cdata", "_local_scalar_dense", "_unsafe_view"),
    *("_NormBase", "_non_persistent_buffers_set"),
    *("_get_fsdp_state", "_fsdp_param_groups", "_execution_engine"),
    *("_n_gpu",),
    *("_is_hf_initialized", "_init_weights", "_attn_implementation", "_supports_default_dynamic_cache"),
    *("_conv_forward", "_reversed_padding_repeated_twice", "_tied_weights_keys"),
    *("_make_wrapper_subclass", "_foreach_lerp_", "_convert_weight_packed_for_cpu_inverse"),
}
# Promised in their documentation, for all that: of named tuples, and of the operating system.
PROMISED = {"_replace", "_asdict", "_fields", "_make", "_exit", "__future__"}


def without(library: str, name: str) -> str:
    return f"{library} {importlib.metadata.version(library)} has no {name} as the library uses it"


def private(nodes: list[ast.AST]) -> Iterator[str]:
    """The names with an underscore that one file reads from what it did not make itself."""
    made = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    made |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and _own(node)}
    made |= {node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and _is_name(node.target)}
    for node in nodes:
        if isinstance(node, ast.Attribute) and not _own(node):
            yield from {node.attr} - made
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("trimtab"):
            yield from (part for part in str(node.module).split("."))
            yield from (alias.name for alias in node.names)


def _own(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def _is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name)


def test_every_private_name_in_use_has_its_test() -> None:
    used: dict[str, set[str]] = {}
    trees = {path: list(ast.walk(ast.parse(path.read_text("utf-8")))) for path in SOURCE.rglob("*.py")}
    definitions = (ast.FunctionDef, ast.ClassDef)
    defined = {node.name for nodes in trees.values() for node in nodes if isinstance(node, definitions)}
    for path, nodes in trees.items():
        for name in private(nodes):
            if name.startswith("_") and not name.endswith("__") and name not in defined - TESTED:
                used.setdefault(name, set()).add(str(path.relative_to(SOURCE)))
    assert used.keys() - PROMISED <= TESTED, {name: used[name] for name in used.keys() - PROMISED - TESTED}
    assert TESTED - {"_apply"} <= used.keys(), "nobody uses these any more: their tests can go"


def test_the_tables_of_a_module() -> None:
    layer = nn.Linear(2, 3)
    layer.register_buffer("kept", torch.zeros(1))
    model = nn.Sequential(layer)
    assert model._modules == {"0": layer}, without("torch", "Module._modules")
    model._modules["0"] = other = nn.Linear(2, 3)
    assert model[0] is other, without("torch", "Module._modules, by which a module is replaced,")
    assert set(layer._parameters) == {"weight", "bias"}, without("torch", "Module._parameters")
    assert set(layer._buffers) == {"kept"}, without("torch", "Module._buffers")


def test_what_a_norm_of_batches_counts() -> None:
    from torch.nn.modules.batchnorm import _NormBase

    norm = nn.BatchNorm1d(2)
    assert isinstance(norm, _NormBase), without("torch", "_NormBase, from which batch norms are derived,")
    norm(torch.zeros(3, 2))
    assert int(norm.num_batches_tracked) == 1, without("torch", "num_batches_tracked, which counts,")
    norm.register_buffer("passing", torch.zeros(1), persistent=False)
    assert norm._non_persistent_buffers_set == {"passing"}, without("torch", "Module._non_persistent_buffers_set")


def test_what_fsdp2_keeps_of_its_parameters(tmp_path: Path) -> None:
    """`surgery.sharded` lets what is gathered ask for gradients where its parts do."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'one'}", rank=0, world_size=1)
    layer: Any = fully_shard(nn.Linear(2, 3), mesh=init_device_mesh("cpu", (1,)))
    layer(torch.ones(1, 2))
    held = [one for group in layer._get_fsdp_state()._fsdp_param_groups for one in group.fsdp_params]
    assert len(held) == 2, without("torch", "FSDPModule._get_fsdp_state()._fsdp_param_groups")
    assert all(one._unsharded_param.requires_grad for one in held), without("torch", "FSDPParam._unsharded_param")
    layer.reshard()
    assert {id(one.sharded_param) for one in held} == {id(one) for one in layer.parameters()}
    dist.destroy_process_group()


def test_the_end_of_a_backward_pass_can_be_waited_for() -> None:
    done = []
    x = torch.ones(1, requires_grad=True)
    x.register_post_accumulate_grad_hook(
        lambda _: torch.autograd.Variable._execution_engine.queue_callback(lambda: done.append(float(x.grad)))
    )
    (2 * x).sum().backward()
    assert done == [2.0], without("torch", "Variable._execution_engine.queue_callback")


def test_what_is_taught_to_transformers() -> None:
    """`integrations` hides these in a model, or wraps them in the Trainer, by their names."""
    import inspect

    from transformers import PreTrainedModel, Trainer

    assert PreTrainedModel._hf_peft_config_loaded is False, without("transformers", "_hf_peft_config_loaded")
    for name in ("save_pretrained", "active_adapters", "get_adapter_state_dict", "set_adapter", "delete_adapter"):
        assert callable(getattr(PreTrainedModel, name)), without("transformers", f"PreTrainedModel.{name}")
    for name, arguments in (
        ("_save", ["self", "output_dir", "state_dict"]),
        ("_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
        ("_save_optimizer_and_scheduler", ["self", "output_dir"]),
        ("_save_checkpoint", ["self", "model", "trial"]),
        ("_load_best_model", ["self"]),
        ("create_optimizer", ["self", "model"]),
    ):
        method = inspect.unwrap(getattr(Trainer, name))
        assert list(inspect.signature(method).parameters) == arguments, without("transformers", f"Trainer.{name}")


def test_weights_of_a_head_are_drawn_by_transformers() -> None:
    """`models.heads` draws a module anew, whatever it was: what is marked as drawn is left alone."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(vocab_size=9, **sizes))
    model.classifier.weight.data.fill_(7.0)
    model.classifier.weight._is_hf_initialized = True
    model._init_weights(model.classifier)
    assert bool((model.classifier.weight == 7.0).all()), without("transformers", "_is_hf_initialized")
    model.classifier.weight._is_hf_initialized = False
    model._init_weights(model.classifier)
    assert bool((model.classifier.weight.abs() < 1.0).all()), without("transformers", "PreTrainedModel._init_weights")


def test_hooks_of_a_module_can_be_seen() -> None:
    layer = nn.Linear(2, 3)
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    layer.register_forward_hook(lambda *_: None)
    layer.register_forward_pre_hook(lambda *_: None)
    layer.register_full_backward_hook(lambda *_: None)
    layer.register_full_backward_pre_hook(lambda *_: None)
    assert len(layer._backward_hooks) == 1, without("torch", "Module._backward_hooks")
    assert len(layer._backward_pre_hooks) == 1, without("torch", "Module._backward_pre_hooks")
    assert len(layer._forward_hooks) == 1, without("torch", "Module._forward_hooks")
    assert len(layer._forward_pre_hooks) == 1, without("torch", "Module._forward_pre_hooks")


def test_what_a_tensor_of_our_own_is_made_of() -> None:
    class Shell(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise NotImplementedError

    shell = torch.Tensor._make_wrapper_subclass(Shell, (2, 3), dtype=torch.bfloat16, device="cpu")
    assert (shell.shape, shell.dtype) == ((2, 3), torch.bfloat16), without("torch", "Tensor._make_wrapper_subclass")
    assert torch.ops.aten.add_.Tensor._schema.is_mutable, without("torch", "OpOverload._schema.is_mutable")
    argument = torch.ops.aten.add_.Tensor._schema.arguments[0]
    assert argument.alias_info.is_write, without("torch", "OpOverload._schema, which says what is written to,")
    assert callable(torch._C._disabled_torch_function_impl), without("torch", "_disabled_torch_function_impl")
    assert not torch._C._is_tracing(), without("torch", "_is_tracing")
    assert not torch._C._are_functorch_transforms_active(), without("torch", "_are_functorch_transforms_active")
    active = torch.func.vmap(lambda x: x * torch._C._are_functorch_transforms_active())(torch.ones(2))
    assert bool(active.all()), without("torch", "_are_functorch_transforms_active")


def test_what_convolutions_and_tied_models_say_of_themselves() -> None:
    from transformers import LlamaForCausalLM

    layer = nn.Conv1d(2, 3, 3, padding="same", padding_mode="circular")
    assert callable(layer._conv_forward), without("torch", "Conv1d._conv_forward")
    assert len(layer._reversed_padding_repeated_twice) == 2, without("torch", "_reversed_padding_repeated_twice")
    assert "lm_head.weight" in LlamaForCausalLM._tied_weights_keys, without("transformers", "_tied_weights_keys")


def test_a_tensor_counts_its_changes() -> None:
    tensor = torch.zeros(2)
    before = tensor._version
    tensor.add_(1)
    assert tensor._version > before, without("torch", "Tensor._version")


def test_what_moves_a_module_goes_through_apply() -> None:
    class Seen(nn.Linear):
        calls = 0

        def _apply(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return super()._apply(*args, **kwargs)

    layer = Seen(2, 3)
    layer.half()
    layer.to("meta")
    assert layer.calls == 2, without("torch", "Module._apply, through which .half() and .to() go,")


def test_a_compiled_call_stands_beside_the_plain_one() -> None:
    layer = nn.Linear(2, 3)
    x = torch.randn(1, 2)
    assert layer._compiled_call_impl is None, without("torch", "Module._compiled_call_impl")
    layer._compiled_call_impl = lambda x: "compiled"
    assert layer(x) == "compiled", without("torch", "Module._compiled_call_impl, called where it is set,")
    assert torch.equal(layer._call_impl(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_a_tensor_can_stand_for_another_without_holding_it() -> None:
    class Standing(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError

    one = torch.Tensor._make_wrapper_subclass(Standing, (2, 3), strides=(1, 2), dtype=torch.half, requires_grad=True)
    assert (one.shape, one.stride(), one.dtype, one.requires_grad) == ((2, 3), (1, 2), torch.half, True), without(
        "torch", "Tensor._make_wrapper_subclass"
    )


def test_settings_of_the_compiler() -> None:
    from torch._dynamo.exc import TorchDynamoException

    from trimtab.training.compiling import SETTINGS

    assert issubclass(TorchDynamoException, Exception)
    with torch._dynamo.config.patch(SETTINGS):
        assert all(getattr(torch._dynamo.config, name) == value for name, value in SETTINGS.items())
    with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
        assert torch._functorch.config.force_non_lazy_backward_lowering


def test_what_the_estimate_of_a_run_is_traced_with() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Listening():
        x = torch.zeros(2, 3)
        view = x[0]
    assert seen[0] is torch.ops.aten.zeros.default, without("torch", "TorchDispatchMode")
    assert x.untyped_storage()._cdata == view.untyped_storage()._cdata, without("torch", "UntypedStorage._cdata")
    assert x.untyped_storage()._cdata != torch.zeros(1).untyped_storage()._cdata


@pytest.mark.parametrize("name", ["_local_scalar_dense", "_unsafe_view", "_grouped_mm"])
def test_operations_of_torch(name: str) -> None:
    assert hasattr(torch.ops.aten, name), without("torch", f"operation aten.{name}")
    whole = torch.ops.aten._unsafe_view(torch.arange(6), [2, 3])
    assert whole._base is None, without("torch", "aten._unsafe_view, which is no view for autograd,")


def test_one_step_towards_a_mean_for_many_tensors() -> None:
    means, new = [torch.zeros(2)], [torch.ones(2)]
    torch._foreach_lerp_(means, new, 0.25)
    assert means[0].tolist() == [0.25, 0.25], without("torch", "_foreach_lerp_")


def test_what_the_processor_can_do() -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        ask = getattr(torch.cpu, name, None)
        assert ask is not None, without("torch", f"torch.cpu.{name}")
        assert isinstance(ask(), bool)


def test_a_weight_that_bitsandbytes_packed_can_be_unpacked() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    unpack = getattr(functional, "_convert_weight_packed_for_cpu_inverse", None)
    assert unpack is not None, without("bitsandbytes", "_convert_weight_packed_for_cpu_inverse")
    pack = functools.partial(functional._convert_weight_packed_for_cpu, block_n=32)
    stored, state = functional.quantize_4bit(torch.randn(64, 64), quant_type="nf4", blocksize=64)
    packed, changed = pack(stored, state)
    again, _ = unpack(packed, changed)
    assert torch.equal(again.flatten(), stored.flatten()), without("bitsandbytes", "way back from a packed weight")


def test_saved_tensors_can_be_unpacked_one_by_one() -> None:
    """`trimtab.ops.frozen_linear` does without the one that was changed in place."""

    class Times(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
            output = x * factor
            ctx.save_for_backward(output, factor)
            return output

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
            with pytest.raises(RuntimeError, match="inplace"):
                _ = ctx.saved_tensors
            assert hasattr(ctx, "_raw_saved_tensors"), without("torch", "_raw_saved_tensors")
            return grad * ctx._raw_saved_tensors[1].unpack(), None

    x = torch.randn(3, requires_grad=True)
    Times.apply(x, torch.full((3,), 5.0)).add_(1).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((3,), 5.0))


def test_how_a_convolution_pads() -> None:
    layer = nn.Conv2d(2, 3, 3, padding=(1, 2))
    assert list(layer._reversed_padding_repeated_twice) == [2, 2, 1, 1], without(
        "torch", "_reversed_padding_repeated_twice"
    )
    calls = []
    layer._conv_forward = lambda *_: calls.append(1)  # type: ignore[method-assign,assignment,return-value]
    layer(torch.zeros(1, 2, 4, 4))
    assert calls, without("torch", "_conv_forward, which forward calls,")


def test_where_a_model_says_what_is_tied() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=4, n_embd=4, n_layer=1, n_head=1))
    tied = model._tied_weights_keys
    assert tied == {"lm_head.weight": "transformer.wte.weight"}, without("transformers", "_tied_weights_keys")


def test_where_a_trainer_keeps_its_device(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path))
    arguments._n_gpu = 5
    assert arguments.n_gpu == 5, without("transformers", "TrainingArguments._n_gpu")
    arguments.__dict__["_setup_devices"] = torch.device("meta")
    assert arguments.device == torch.device("meta"), without("transformers", "TrainingArguments._setup_devices")
    assert hasattr(arguments.distributed_state, "device"), without("accelerate", "PartialState.device")


def test_where_a_model_says_how_it_computes_attention() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))
    assert model.config._attn_implementation == "sdpa", without("transformers", "_attn_implementation")
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager", without("transformers", "_attn_implementation, which follows,")
    assert model._supports_flash_attn is True, without("transformers", "_supports_flash_attn")


def test_how_a_function_is_marked_whose_result_a_compiler_may_keep() -> None:
    marked = torch.compiler.assume_constant_result(lambda: 1)
    assert marked._dynamo_marked_constant is True, without("torch", "_dynamo_marked_constant")


def test_which_models_have_a_cache_of_their_own() -> None:
    from transformers import LlamaForCausalLM, MiniMaxForCausalLM

    kinds = [kind._supports_default_dynamic_cache() for kind in (LlamaForCausalLM, MiniMaxForCausalLM)]
    assert kinds == [True, False], without("transformers", "_supports_default_dynamic_cache")
