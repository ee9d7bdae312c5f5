"""A transformers model with adapters: ``save_pretrained`` writes an adapter folder, and transformers knows that it may
train a frozen, perhaps quantised base.

What is changed stands in the model's own dictionary and hides the methods of its class. It is taken away with the
adapters. Nothing of it holds the model by a bound method, so that copies and pickles of the model are right.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trimtab.adapters.safe_read import read_tensors
from trimtab.adapters.store import save_adapter
from trimtab.bases import is_instance_by_name
from trimtab.errors import SurgeryError
from trimtab.surgery import names
from trimtab.surgery.adapted import carriers

# The attribute of a model that keeps what our attributes have replaced in its dictionary.
_REPLACED = "_trimtab_replaced"


def attached(model: nn.Module) -> None:
    """Teach every transformers model in ``model`` that holds adapters, and ``model`` itself if it is one."""
    for module in model.modules():
        if is_instance_by_name(module, "transformers.modeling_utils", "PreTrainedModel") and _REPLACED not in vars(
            module
        ):
            if next(carriers(module), None) is None:
                continue
            ours: dict[str, Any] = {name: MethodOf(module, function) for name, function in _METHODS.items()}
            # With this, transformers lets a quantised base be trained, and lets gradients into a frozen embedding where
            # activations are checkpointed. Whatever else it would do by it is among the methods below.
            ours["_hf_peft_config_loaded"] = True
            vars(module)[_REPLACED] = {name: vars(module)[name] for name in ours if name in vars(module)}
            vars(module)[_REPLACED] |= {name: _NOTHING for name in ours if name not in vars(module)}
            vars(module).update(ours)


def removed(model: nn.Module) -> None:
    """Undo ``attached``."""
    for module in model.modules():
        for name, before in vars(module).pop(_REPLACED, {}).items():
            if before == _NOTHING:
                del vars(module)[name]
            else:
                vars(module)[name] = before


# Stands for an attribute that the model had not; a word, so that it is itself after a copy.
_NOTHING = "trimtab: nothing"


class MethodOf:
    """Calls ``function`` with ``model`` first: a method of one model alone, which goes with it into copies."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        self.model, self.function = model, function
        self.__name__, self.__doc__ = function.__name__, function.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.model, *args, **kwargs)


def save_pretrained(
    model: nn.Module,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """Write the model's adapter, and nothing of its base, into ``save_directory`` (``trimtab.save_adapter``).

    ``state_dict`` may hold the model's whole tensors where its own are spread over several processes. What else
    transformers can be told is about the files of whole models, and has no effect. For a whole model, call
    ``trimtab.merge(model)`` first.
    """
    if not is_main_process:
        return
    folder = save_adapter(model, save_directory, state_dict=state_dict)
    if push_to_hub:
        # Transformers' own way, which calls this function again for a folder that it uploads.
        known = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")
        said = {name: options[name] for name in known if name in options}
        model.push_to_hub(options.get("repo_id") or folder.name, **said)  # type: ignore[operator]


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters that are in use."""
    name = names.active_adapter(model)
    disabled = any(module.adapters_disabled for module in carriers(model))
    return [] if name is None or disabled else [name]


def get_adapter_state_dict(
    model: nn.Module, adapter_name: str | None = None, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The trained tensors, under the names that they have in the folder of the adapter."""
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder, adapter_name, state_dict=state_dict)
        [path] = Path(folder).glob("*.safetensors")
        tensors, _ = read_tensors(path)
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def set_adapter(model: nn.Module, adapter_name: str | list[str]) -> None:
    """Switch to the adapter of this name, and adapters on."""
    chosen = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    for name in chosen:
        names.known_adapter(model, name, "set_adapter")
    if len(chosen) != 1:
        raise SurgeryError(
            f"set_adapter: expected the name of one adapter, got {chosen}; one is active at a time. Rows of a batch "
            "can go through different ones (trimtab.per_row), and trimtab.combine adds some up"
        )
    names.set_adapter(model, chosen[0])
    enable_adapters(model)


def enable_adapters(model: nn.Module) -> None:
    """Switch the adapters on again."""
    for module in carriers(model):
        module.adapters_disabled = False


def disable_adapters(model: nn.Module) -> None:
    """Switch the adapters off: the model computes what it did without them. (``trimtab.disable_adapter`` does so for a
    while.)"""
    for module in carriers(model):
        module.adapters_disabled = True


def add_adapter(model: nn.Module, *_: Any, **__: Any) -> None:
    """Refused: PEFT's layers would be put inside of ours."""
    raise SurgeryError(
        "add_adapter: the model carries trimtab's adapters, and transformers would put PEFT's into them. Call "
        "trimtab.merge(model) or trimtab.detach(model) first; trimtab.load_adapter reads PEFT's folders"
    )


def load_adapter(model: nn.Module, *_: Any, **__: Any) -> None:
    """Refused: transformers would load the folder by means of PEFT."""
    raise SurgeryError(
        "load_adapter: the model carries trimtab's adapters, and transformers would load PEFT's into them. Use "
        "trimtab.load_adapter(model, folder), which reads both"
    )


def delete_adapter(model: nn.Module, adapter_names: str | list[str]) -> None:
    """Remove the adapters of these names (``trimtab.delete_adapter``)."""
    chosen = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    for name in chosen:
        names.known_adapter(model, name, "delete_adapter")
    for name in chosen:
        names.delete_adapter(model, name)


_METHODS: dict[str, Callable[..., Any]] = {
    one.__name__: one
    for one in (
        *(save_pretrained, active_adapters, get_adapter_state_dict, set_adapter, enable_adapters, disable_adapters),
        *(add_adapter, load_adapter, delete_adapter),
    )
}
