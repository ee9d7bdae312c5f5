"""transformers' ``Trainer``, and what is derived from it (TRL's trainers), with an adapted model: its checkpoints are
adapter folders, from which it resumes and takes the best model.

How a model is saved, transformers asks the model (`transformers_model.py`). How it is loaded, and how a model is saved
that is not transformers', is decided in ``Trainer`` itself, so some of its methods are wrapped, once in a process.
For a model without our adapters they do what they did.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from trimtab.adapters.formats import file_names
from trimtab.adapters.placing import holds_adapter
from trimtab.adapters.store import load_adapter, save_adapter
from trimtab.adapters.unfrozen import require_savable
from trimtab.errors import AdapterError
from trimtab.integrations.on_import import on_import
from trimtab.integrations.wrapping import wrap_methods
from trimtab.surgery.adapted import carriers
from trimtab.surgery.names import known_adapter
from trimtab.surgery.wrappers import unwrapped

# A tensor of an adapter, by its name among those of the model.
_OF_AN_ADAPTER = re.compile(r"\.adapter(_[^.]+)?\.")


def teach_when_imported() -> None:
    """Teach the ``Trainer``, now or when it is imported: to import it takes more than a second, and most models are
    attached for something else."""
    on_import("transformers.trainer", lambda module: teach(module.Trainer))


def teach(trainer: Any) -> None:
    """Wrap the methods of the class ``trainer``, unless they are."""
    wrappers = {
        "_save": _saving,
        "_load_from_checkpoint": _loading_a_checkpoint,
        "_load_best_model": _loading_the_best,
        "create_optimizer": _creating_the_optimizer,
        "_push_from_checkpoint": _pushing_a_checkpoint,
    }
    wrap_methods(trainer, wrappers, mark="trimtab_wraps")


def _adapted(model: Any) -> nn.Module | None:
    """``model`` without its wrappers if it carries adapters of ours; else None."""
    if not isinstance(model, nn.Module):
        return None
    bare = unwrapped(model)
    return bare if next(carriers(bare), None) is not None else None


def _saving(method: Callable[..., None]) -> Callable[..., None]:
    def _save(self: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
        model = _adapted(self.model)
        if model is None or hasattr(model, "save_pretrained"):
            return method(self, output_dir, state_dict)
        # Transformers knows nothing to do with such a model but to write all its tensors into one file.
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        method(self, str(folder), state_dict={})
        if self.args.should_save:
            (folder / "model.safetensors").unlink(missing_ok=True)
            save_adapter(model, folder, state_dict=state_dict)

    return _save


def _loading_a_checkpoint(method: Callable[..., None]) -> Callable[..., None]:
    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        adapted = _adapted(self.model if model is None else model)
        if adapted is not None and holds_adapter(resume_from_checkpoint):
            load_adapter(adapted, resume_from_checkpoint, known_adapter(adapted, None, "resume_from_checkpoint"))
            return
        if adapted is not None:
            _refuse_bare(Path(resume_from_checkpoint))
        method(self, resume_from_checkpoint, model)

    return _load_from_checkpoint


def _refuse_bare(checkpoint: Path) -> None:
    """Raise AdapterError if ``checkpoint`` holds a model without adapters: transformers would leave out, without an
    error, whatever has another name in an adapted model."""
    weights = checkpoint / "model.safetensors"
    if weights.is_file():
        with safe_open(weights, framework="pt") as file:
            if not any(_OF_AN_ADAPTER.search(name) for name in file.keys()):  # noqa: SIM118 (not a mapping)
                raise AdapterError(
                    f"{checkpoint}: this checkpoint is of a model without adapters, and the model to be trained has "
                    "some. Load it with from_pretrained, attach, and train from the start"
                )


def _loading_the_best(method: Callable[..., None]) -> Callable[..., None]:
    def _load_best_model(self: Any) -> None:
        adapted, folder = _adapted(self.model), self.state.best_model_checkpoint
        if adapted is None or not holds_adapter(folder):
            return method(self)
        load_adapter(adapted, folder, known_adapter(adapted, None, "load_best_model_at_end"))

    return _load_best_model


def _creating_the_optimizer(method: Callable[..., Any]) -> Callable[..., Any]:
    def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = _adapted(self.model)
        if model is not None:
            require_savable(model)
            if getattr(model, "is_quantized", False):
                _restore_magnitudes(model)
        return method(self, *args, **kwargs)

    return create_optimizer


def _pushing_a_checkpoint(method: Callable[..., None]) -> Callable[..., None]:
    def _push_from_checkpoint(self: Any, checkpoint_folder: str) -> None:
        # What is pushed is the output folder, into which transformers copies the files that it knows.
        for name in file_names():
            if self.is_world_process_zero() and (path := Path(checkpoint_folder) / name).is_file():
                shutil.copy(path, Path(self.args.output_dir) / name)
        return method(self, checkpoint_folder)

    return _push_from_checkpoint


@torch.no_grad()
def _restore_magnitudes(model: nn.Module) -> None:
    """Give magnitudes their own dtype again.

    TRL casts whatever trains on a quantised base to bfloat16, PEFT's magnitudes excepted, which it knows by their name:
    a magnitude's steps are often smaller than bfloat16 can hold, and it would never move. One that has only been
    rounded from where it starts goes back there.
    """
    for entry in (entry for module in carriers(model) for entry in module.every_entry()):
        adapter: Any = entry.adapter
        magnitude = adapter._parameters.get("magnitude")
        if magnitude is not None and magnitude.dtype != adapter.dtype:
            start = adapter.square_norms(entry.handle).sqrt().to(adapter.dtype)
            rounded_only = start.to(magnitude.dtype) == magnitude
            magnitude.data = torch.where(rounded_only, start, magnitude.to(adapter.dtype))
