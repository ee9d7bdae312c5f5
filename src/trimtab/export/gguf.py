"""The base's GGUF file with the adapter folded in, for llama.cpp, Ollama and their kin.

Weights that came from a type of few bits lie on its steps. An update that is smaller than half a step is rounded back
to where it began, in every weight alike, so a merged file in the base's own type can lose all that was trained. How
much of it is left is computed, and told.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from trimtab.errors import ModelError
from trimtab.export import _gguf_file as files
from trimtab.export._export_format import ExportFormat, Written
from trimtab.export._gguf_file import GgufFile, Place
from trimtab.export._gguf_tokens import head_fields
from trimtab.export._modelfile import modelfile
from trimtab.export._subject import Subject
from trimtab.files import write_text
from trimtab.surgery.adapted import adapted_modules
from trimtab.surgery.merge import merge
from trimtab.surgery.merged_parts import merged_parts

NAME = "model.gguf"
_MUCH = 0.9
"""Of what was trained: so much of it has to be left after rounding."""


class MergedGguf(ExportFormat):
    """The file that the base came from, with other values in the tensors that were trained, and a Modelfile."""

    summary = "the base's GGUF file with the adapter folded in, for llama.cpp and Ollama"
    takes = frozenset({"type", "gguf", "system"})
    marks = (NAME,)
    compared = "the file's weights against the run's"
    library = None
    relation = "quantized"

    def check(self, subject: Subject) -> None:
        subject.require_causal("llama.cpp")
        files.kind_called(subject.wishes.type)
        GgufFile(base_file(subject, "convert_hf_to_gguf.py of llama.cpp makes one of `trimtab export --to merged`"))

    def prepare(self, subject: Subject) -> None:
        subject.load_anew(dtype="float32")  # the values of the file, and not what the run's dtype makes of them

    def fill(self, subject: Subject, folder: Path) -> Written:
        path, model = base_file(subject, ""), subject.model
        file, own, wanted = GgufFile(path), path == _own(subject), files.kind_called(subject.wishes.type)
        places = _places(file, model, exact=own)
        report = merge(model)
        held = files.parameters(model)
        for name in report.untied:  # what was one with another module has values of its own now
            places |= _untied(name, places, held, file)
        copy = _Copy(file, held, wanted)
        for name, place in places.items():
            copy.replace(name, place)
        copy.rest(model.config, everything=not own)
        new = subject.source.add_tokens
        fields = head_fields(file, subject.tokenizer, model, chat=subject.chat, new=new)
        kind = wanted.name.lower() if wanted is not None else None
        files.write_copy(file, folder / NAME, tensors=copy.tensors, fields=fields, kind=kind)
        text, told = modelfile(subject.tokenizer, model, f"./{NAME}", system=subject.wishes.system)
        write_text(folder / "Modelfile", text)
        kinds = ", ".join(f"{count} in {kind}" for kind, count in copy.kinds.most_common())
        done = [f"merged {len(report.modules)} modules", f"merged tensors: {kinds}"]
        if (quantisation := subject.config.quantisation) != "none":
            told.append(f"the run is quantised ({quantisation}); its adapter was folded into the file's own weights")
        return Written(done, [*copy.told(), *told], _USE)


_USE = f"""
```text
llama-cli -m {NAME}
ollama create tuned -f Modelfile
```
"""


def _own(subject: Subject) -> Path | None:
    return Path(subject.source.location) if subject.source.kind == "gguf" else None


def base_file(subject: Subject, otherwise: str) -> Path:
    """The GGUF file of the run's base. Raises ModelError if there is none; ``otherwise``: how one is come by."""
    own = _own(subject)
    if subject.wishes.gguf is not None:
        if not subject.wishes.gguf.is_file():
            raise ModelError(f"{subject.wishes.gguf}: no such file; --gguf names the GGUF file of the run's base")
        return subject.wishes.gguf.absolute()
    if own is None:
        raise ModelError(
            f"{subject.source.name}: the run's base did not come from a GGUF file. Name one of the same model by "
            f"--gguf FILE; {otherwise}"
        )
    return own


def _places(file: GgufFile, model: Any, *, exact: bool) -> dict[str, Place]:
    """Where each parameter stands that an adapter of ``model`` changes. Raises ModelError if one cannot be placed."""
    names: dict[int, list[str]] = {}
    held = files.parameters(model)
    for name, tensor in held.items():
        names.setdefault(id(tensor), []).append(name)
    found: dict[str, Place] = {}
    biases: list[str] = []
    for module, adapted in adapted_modules(model):
        for part in merged_parts(adapted):
            stored = part.stored()
            known = names.get(id(stored), [])
            name = next((one for one in known if file.tensor_of(one) is not None), "")
            if not name:
                raise ModelError(f"{module}: what was trained of it has no tensor of its own in {file.path.name}")
            if name.endswith(".bias"):
                biases.append(name)
            else:
                found[name] = file.place(name, stored, model.config, exact=exact)
    for name in biases:  # its rows stand as those of its weight do; alone it may be all zeros
        weight = name.removesuffix(".bias") + ".weight"
        place = found.get(weight)
        if place is None and weight in held and file.tensor_of(weight) is not None:
            place = file.place(weight, held[weight], model.config, exact=exact)
        order = place.order if place is not None and place.order.moves_rows else files.Order()
        found[name] = Place(file.tensor_of(name) or "", order)
    return found


def _untied(module: str, places: dict[str, Place], held: dict[str, Tensor], file: GgufFile) -> dict[str, Place]:
    """The places after ``module`` got a weight of its own: an output head that was the embedding is a new tensor."""
    head, embedding = f"{module}.weight", "token_embd.weight"
    shared = [name for name, place in places.items() if place.tensor == embedding]
    other = [name for name, tensor in held.items() if name.endswith("lm_head.weight")]
    if not shared or not other:
        raise ModelError(f"{head}: was tied to another module, and has no tensor of its own in the file")
    if file.names.get_name(other[0], try_suffixes=(".weight",)) is None:
        raise ModelError(
            f"{head}: was tied to another module, and is not any more; llama.cpp has one matrix for the embedding and "
            f"the output head of every {file.architecture}. `trimtab export RUN OUT --to merged` hands over both"
        )
    return {other[0]: Place("output.weight", files.Order())}


class _Copy:
    """The tensors that are written in place of the file's; what they hold is put into the model, too."""

    def __init__(self, file: GgufFile, held: dict[str, Tensor], wanted: Kind | None) -> None:
        self.file, self.held, self.wanted = file, held, wanted
        self.tensors: dict[str, tuple[files.Array, Kind]] = {}
        self.kinds: Counter[str] = Counter()
        self._finer: Counter[str] = Counter()
        self._unmeasured: list[str] = []
        self._trained = self._left = 0.0

    def replace(self, name: str, place: Place) -> None:
        """Write what the model has in the parameter ``name``."""
        values = place.order.there(files.as_array(self.held[name]))
        near = self.file.tensors.get(place.tensor) or self.file.tensors["token_embd.weight"]
        kind = self._write(place.tensor, values, near.tensor_type)
        self.kinds[kind.name] += 1
        written = gguf.dequantize(self.tensors[place.tensor][0], kind)
        if (before := self.file.tensors.get(place.tensor)) is not None and list(before.shape[::-1]) == [*values.shape]:
            base = self.file.values(place.tensor)
            self._trained += float(((values - base) ** 2).sum(dtype=np.float64))
            self._left += float(((written - base) * (values - base)).sum(dtype=np.float64))
        self._put(name, place, written)

    def rest(self, config: Any, *, everything: bool) -> None:
        """Write what is not trained in the type that is wanted; ``everything``: the model came from other weights, and
        gets those of the file."""
        if self.wanted is None and not everything:
            return
        names = {tensor: name for name in self.held if (tensor := self.file.tensor_of(name)) is not None}
        for tensor, one in self.file.tensors.items():
            if tensor in self.tensors:
                continue
            kind, shape = one.tensor_type, [int(size) for size in one.shape[::-1]]
            if self.wanted is not None and files.kind_for(kind, self.wanted, shape) is not kind:
                kind = self._write(tensor, self.file.values(tensor), kind)
            elif not everything:
                continue
            if (name := names.get(tensor)) is None:
                continue
            try:
                place = self.file.place(name, self.held[name], config, exact=not everything)
            except ModelError:
                self._unmeasured.append(tensor)
                continue
            data = self.tensors[tensor][0] if tensor in self.tensors else one.data
            self._put(name, place, gguf.dequantize(data, kind))

    def _write(self, tensor: str, values: files.Array, held: Kind) -> Kind:
        kind = files.kind_for(held, self.wanted, values.shape)
        if kind is not held and (self.wanted is None or kind is not self.wanted):
            self._finer[f"{(self.wanted or held).name} -> {kind.name}"] += 1
        self.tensors[tensor] = (files.encoded(values, kind, tensor), kind)
        return kind

    @torch.no_grad()
    def _put(self, name: str, place: Place, values: files.Array) -> None:
        own = self.held[name]
        own.copy_(torch.from_numpy(place.order.back(values).copy()).to(own.dtype))

    def told(self) -> list[str]:
        """What the user should know, a sentence each."""
        told = [
            f"{count} tensors are written in another type, which their shape or gguf's quantiser asks for ({change})"
            for change, count in self._finer.items()
        ]
        left = self._left / self._trained if self._trained else 1.0
        if left < _MUCH:
            told.append(
                f"rounding to these types leaves {max(0.0, left):.0%} of what was trained: it is smaller than their "
                "steps. Choose --type q8_0 or f16, or --to gguf-lora, which keeps it beside the file"
            )
        if self._unmeasured:
            told.append(f"not measured: how {len(self._unmeasured)} tensors are rounded, such as {self._unmeasured[0]}")
        return told
