"""sentence-transformers' trainers with an adapted model. What they write into a checkpoint is the adapter of the
transformers model inside, since that saves itself as one; what they read back is a whole model.

So the adapter is loaded into the model that has it, where they would load the state of another one. What is trained
elsewhere in the model has no place in such a checkpoint, and is refused before training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from trimtab.adapters.placing import holds_adapter
from trimtab.adapters.store import load_adapter
from trimtab.bases import is_instance_by_name
from trimtab.errors import AdapterError
from trimtab.integrations.on_import import on_import
from trimtab.integrations.wrapping import wrap_methods
from trimtab.surgery.adapted import carriers
from trimtab.surgery.attach import trainable_parameters
from trimtab.surgery.names import known_adapter
from trimtab.surgery.wrappers import unwrapped


def teach_when_imported() -> None:
    """Teach the trainers, now or when they are imported."""
    on_import("sentence_transformers.base.trainer", lambda module: teach(module.BaseTrainer))


def teach(trainer: Any) -> None:
    """Wrap the methods of the class ``trainer``, unless they are."""
    wrappers = {"_load_from_checkpoint": _loading_a_checkpoint, "create_optimizer": _creating_the_optimizer}
    wrap_methods(trainer, wrappers, mark="trimtab_wraps_sentences")


def _inside(model: Any) -> nn.Module | None:
    """The first model of transformers in ``model`` that carries adapters."""
    for module in unwrapped(model).modules():
        is_one = is_instance_by_name(module, "transformers.modeling_utils", "PreTrainedModel")
        if is_one and next(carriers(module), None) is not None:
            return module
    return None


def _loading_a_checkpoint(method: Callable[..., None]) -> Callable[..., None]:
    def _load_from_checkpoint(self: Any, checkpoint_path: str) -> None:
        inside = _inside(self.model)
        if inside is None or not holds_adapter(checkpoint_path):
            return method(self, checkpoint_path)
        load_adapter(inside, checkpoint_path, known_adapter(inside, None, "load_from_checkpoint"))

    return _load_from_checkpoint


def _creating_the_optimizer(method: Callable[..., Any]) -> Callable[..., Any]:
    def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = unwrapped(self.model)
        if next(carriers(model), None) is not None and self.args.save_strategy != "no":
            inside = _inside(model)
            held = set() if inside is None else {id(one) for one in inside.parameters()}
            if left := [name for name, one in trainable_parameters(model).items() if id(one) not in held]:
                raise AdapterError(
                    f"{left[0]} is trained outside of the transformers model ({len(left)} such tensors), and a "
                    "checkpoint of sentence-transformers would lack it. Leave its module out of the plan and freeze "
                    'it; or train with save_strategy="no", and call trimtab.save_adapter(model, folder) afterwards'
                )
        return method(self, *args, **kwargs)

    return create_optimizer
