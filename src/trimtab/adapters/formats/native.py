"""Our own adapter format, for everything that no other format can express.

    trimtab.json                    {"format": "trimtab adapter", "version": 1, "base": name of the model or null,
                                     "modules": {module: {"method": name, "options": {...}, "shape": [out, in],
                                     "tensors": {tensor: shape}}}}
    trimtab_adapter.safetensors     every trained tensor, under the name MODULE.TENSOR

The header of the tensors has, under "modules", the SHA-256 of the description's "modules" (as JSON with sorted keys and
no spaces), so that a description is never read with the tensors of another save.

The tensors of a module are those of its method, in the shapes given there: ``A`` and ``B`` of lora and dora, ``M`` of
mora, those of the module itself for full, each with a ``magnitude`` and a ``bias`` or without; ``down``, ``down_bias``,
``up`` and ``up_bias`` of serial and parallel, where ``out`` and ``in`` are the widths of a block's hidden states. All
options are written, so that an adapter keeps its meaning when a default changes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from trimtab import methods
from trimtab.adapters.formats._adapter_format import AdapterFormat
from trimtab.adapters.record import StoredAdapter
from trimtab.adapters.safe_read import damage_in, read_description, read_tensors, shown
from trimtab.adapters.stored_head import head_header
from trimtab.errors import AdapterError
from trimtab.files import write_json, write_tensors
from trimtab.surgery.adapted import Adapted

_FORMAT = "trimtab adapter"
_VERSION = 1
_HEADER = "modules"


class NativeFormat(AdapterFormat):
    """``trimtab.json`` and ``trimtab_adapter.safetensors``."""

    files = ("trimtab.json", "trimtab_adapter.safetensors")
    preference = 100  # for what no other format can express

    def can_express(self, model: nn.Module, adapted: dict[str, Adapted]) -> bool:
        return True

    def save(self, model: nn.Module, adapted: dict[str, Adapted], folder: Path) -> None:
        modules, tensors = {}, {}
        for name, module in adapted.items():
            mine = {key: value.detach().contiguous().clone() for key, value in module.adapter.stored_tensors().items()}
            modules[name] = {
                "method": module.method,
                "options": module.adapter.options.model_dump(),
                "shape": [module.adapter.out_features, module.adapter.in_features],
                "tensors": {key: list(value.shape) for key, value in mine.items()},
            }
            tensors.update({f"{name}.{key}": value for key, value in mine.items()})
        base = getattr(getattr(model, "config", None), "_name_or_path", None)
        header = {"format": "pt", _HEADER: _digest(modules), **head_header(model)}
        write_tensors(folder / self.files[1], tensors, header)
        description = {"format": _FORMAT, "version": _VERSION, "base": base or None, "modules": modules}
        write_json(folder / self.files[0], description)

    def load(self, folder: Path) -> dict[str, StoredAdapter]:

        one, two = self.files
        path = folder / one
        described = read_description(path)
        if described.get("format") != _FORMAT:
            raise AdapterError(f'{path}: expected "format": "{_FORMAT}"; this is not an adapter of ours')
        if described.get("version") != _VERSION:
            raise AdapterError(
                f"{path}: format version {shown(described.get('version'))}; this release reads version {_VERSION}. "
                "Update trimtab"
            )
        tensors, header = read_tensors(folder / two)
        modules: Any = described.get("modules")
        if header.get(_HEADER) != _digest(modules):
            raise AdapterError(
                f"{folder}: {one} and {two} do not belong together: a save was interrupted, or one of them was changed."
                " Save the adapter again"
            )
        stored: dict[str, StoredAdapter] = {}
        expected: dict[str, list[int]] = {}
        with damage_in(path, "description of an adapter"):
            for name, entry in modules.items():
                shapes = {key: list(shape) for key, shape in entry["tensors"].items()}
                options = methods.options_class(entry["method"]).read(entry["options"], shapes)
                expected |= {f"{name}.{key}": shape for key, shape in shapes.items()}
                mine = {key: tensors[f"{name}.{key}"] for key in shapes if f"{name}.{key}" in tensors}
                stored[name] = StoredAdapter(entry["method"], options, mine, tuple(entry["shape"]))
        got = {name: list(tensor.shape) for name, tensor in tensors.items()}
        odd = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
        if odd:
            raise AdapterError(
                f"{folder}: {one} and {two} differ at {len(odd)} tensors, such as {shown(odd[0])}: expected "
                f"{expected.get(odd[0], 'nothing')}, got {got.get(odd[0], 'nothing')}"
            )
        return stored


def _digest(modules: Any) -> str:
    text = json.dumps(modules, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
