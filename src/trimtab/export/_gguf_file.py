"""A GGUF file as llama.cpp lays it out: which tensor is which parameter of transformers' model, in which order its rows
stand, and how a copy with other tensors is written.

Names come from gguf's own tables. The order of rows does not: llama.cpp's converters know it, one for each
architecture. Where there is a file, it is found by holding the model's weights against the file's in every order that
the converters use (github.com/ggml-org/llama.cpp, ``conversion/``); the right one agrees, and all others are far off.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind, GGUFReader, GGUFValueType, GGUFWriter
from numpy.typing import NDArray
from torch import Tensor, nn

from trimtab.errors import ModelError
from trimtab.reading import panics
from trimtab.surgery.adapted import bare, bare_modules

Array = NDArray[Any]

KINDS = {
    one.name.lower(): one
    for one in (Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q5_1, Kind.Q5_0, Kind.Q4_1, Kind.Q4_0)
}
"""The types that ``--type`` may name: those for which gguf has a quantiser."""

_WRITABLE = {*KINDS.values(), Kind.TQ1_0, Kind.TQ2_0, Kind.MXFP4}
_FILE_TYPES = {
    **{"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32},
}
_EXACT, _SAME = 1e-3, 0.5
"""How far two forms of one weight may be apart, of their norm: the values that a file was dequantised to, and another
form of the model, such as its quantised one. Rows in a wrong order are off by about 1.4."""


@dataclass(frozen=True)
class Order:
    """How llama.cpp lays out a tensor that transformers has in another way.

    Attributes:
        kind: ``plain``; ``rope``: neighbouring rows of a head are rotated together, and not the head's two halves;
            ``fused``: queries, keys and values one after another, and not head by head; ``transposed``; ``squeezed``;
            ``offset``: one is added, as to the norms of Gemma.
        heads: of a ``rope`` tensor; key heads of a ``fused`` one.
        queries: query heads to a key head of a ``fused`` one.
    """

    kind: str = "plain"
    heads: int = 0
    queries: int = 1

    def there(self, ours: Array) -> Array:
        """The tensor as llama.cpp has it. Raises ValueError if its shape does not allow that."""
        rows, rest = ours.shape[0], ours.shape[1:]
        if self.kind == "rope":
            paired = ours.reshape(self.heads, 2, rows // self.heads // 2, *rest).swapaxes(1, 2)
            return paired.reshape(ours.shape)
        if self.kind == "fused":
            width = self.queries + 2
            heads = ours.reshape(self.heads, width, rows // self.heads // width, *rest)
            parts = (heads[:, :-2], heads[:, -2:-1], heads[:, -1:])
            return np.concatenate([part.reshape(-1, *rest) for part in parts])
        if self.kind == "transposed":
            return ours.T
        if self.kind == "squeezed":
            return ours.squeeze(1)
        return ours + 1 if self.kind == "offset" else ours

    def back(self, theirs: Array) -> Array:
        """The tensor as transformers has it."""
        rows, rest = theirs.shape[0], theirs.shape[1:]
        if self.kind == "rope":
            halves = theirs.reshape(self.heads, rows // self.heads // 2, 2, *rest).swapaxes(1, 2)
            return halves.reshape(theirs.shape)
        if self.kind == "fused":
            head = rows // (self.heads * (self.queries + 2))
            ends = np.cumsum([self.heads * self.queries * head, self.heads * head])
            parts = np.split(theirs, ends)
            heads = [part.reshape(self.heads, -1, head, *rest) for part in parts]
            return np.concatenate(heads, axis=1).reshape(theirs.shape)
        if self.kind == "transposed":
            return theirs.T
        if self.kind == "squeezed":
            return np.expand_dims(theirs, 1)
        return theirs - 1 if self.kind == "offset" else theirs

    @property
    def moves_rows(self) -> bool:
        """Whether it is no more than an order of rows, which the factor B of an update can have, too."""
        return self.kind in ("plain", "rope", "fused")


def orders(config: Any) -> list[Order]:
    """Every order that the converters use for a model of ``config``."""
    text = config.get_text_config()
    heads = int(getattr(text, "num_attention_heads", None) or 0)
    keys = int(getattr(text, "num_key_value_heads", None) or heads)
    known = [Order(), Order("transposed"), Order("squeezed"), Order("offset")]
    if heads:
        known += [Order("rope", one) for one in dict.fromkeys((heads, keys))]
        known += [Order("fused", one, heads // one) for one in dict.fromkeys((heads, keys, 1)) if heads % one == 0]
    return known


@dataclass(frozen=True)
class Place:
    """Where a parameter of the model stands in a file."""

    tensor: str
    order: Order


class GgufFile:
    """A GGUF file, read tensor by tensor. Raises ModelError if it is damaged, in pieces, or of an unknown kind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with panics():
                self.reader = GGUFReader(path)
                self.architecture = str(self.field("general.architecture"))
                blocks = int(self.field(f"{self.architecture}.block_count") or 0)
        except Exception as error:  # the reader fails in ways of its own
            raise ModelError(f"{path}: cannot be read as a GGUF file ({type(error).__name__}: {error})") from error
        if int(self.field("split.count") or 1) > 1:
            raise ModelError(f"{path}: one piece of a model in several files; join them (llama-gguf-split --merge)")
        self.names = tensor_names(self.architecture, blocks, path)
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}

    def field(self, name: str) -> Any:
        """The value of a field of the head; None where there is none."""
        found = self.reader.get_field(name)
        return found.contents() if found is not None else None

    def tensor_of(self, parameter: str) -> str | None:
        """The name of the tensor that is ``parameter`` in transformers; None where the file has none."""
        name = self.names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if name == "output.weight" and name not in self.tensors:
            return None
        return name if name in self.tensors else None

    def values(self, tensor: str) -> Array:
        """The tensor in float32."""
        held = self.tensors[tensor]
        return np.asarray(gguf.dequantize(held.data, held.tensor_type), dtype=np.float32)

    def place(self, parameter: str, ours: Tensor, config: Any, *, exact: bool) -> Place:
        """Where ``parameter`` with the base's values ``ours`` stands in the file. ``exact``: the model was read from
        this very file. More rows than the file has (new tokens) are left out of the comparison.

        Raises ModelError if the file has no such tensor, or none with these values.
        """
        tensor = self.tensor_of(parameter)
        if tensor is None:
            raise ModelError(f"{self.path}: {parameter} has no tensor in this file that it can be written to")
        theirs, values = self.values(tensor), as_array(ours)
        if values.ndim == theirs.ndim and values.shape[0] > theirs.shape[0] and values.shape[1:] == theirs.shape[1:]:
            values = values[: theirs.shape[0]]
        size = float(np.linalg.norm(theirs)) or 1.0
        best, order = np.inf, Order()
        for distance, tried in _distances(values, theirs, orders(config)):
            if distance / size < best:
                best, order = distance / size, tried
            if exact and best <= _EXACT:  # no other is nearer, and a large matrix takes a second for each
                break
        if best == np.inf:
            shapes = " x ".join(map(str, theirs.shape)), " x ".join(map(str, values.shape))
            raise ModelError(
                f"{self.path}: {tensor} has {shapes[0]} numbers, and {parameter} of the run's base {shapes[1]}. Name "
                "the GGUF file that was made of the same model"
            )
        if best > (_EXACT if exact else _SAME):
            raise ModelError(
                f"{self.path}: {tensor} is not {parameter} of the run's base in any known order of rows (the nearest "
                f"is off by {best:.0%}). Name the GGUF file that was made of the same model"
            )
        return Place(tensor, order)


def _distances(ours: Array, theirs: Array, known: Sequence[Order]) -> Iterator[tuple[float, Order]]:
    for order in known:
        try:
            moved = order.there(ours)
        except ValueError:  # no such heads in this shape
            continue
        if moved.shape == theirs.shape:
            yield float(np.linalg.norm(moved - theirs)), order


def as_array(tensor: Tensor) -> Array:
    """``tensor`` in float32, on the processor."""
    return tensor.detach().to("cpu", torch.float32).numpy()


def tensor_names(architecture: str, blocks: int, place: object) -> gguf.TensorNameMap:
    """gguf's table of names for one architecture. Raises ModelError for one that it does not know."""
    known = {name: one for one, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise ModelError(f"{place}: gguf {_version()} has no table of names for the architecture '{architecture}'")
    return gguf.get_tensor_name_map(known[architecture], blocks)


def _version() -> str:
    from importlib import metadata

    return metadata.version("gguf")


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter of ``model`` by all of its names, without those of adapters: a tied one has several."""
    return {
        f"{name}.{key}" if name else key: tensor
        for name, module in bare_modules(model)
        for key, tensor in bare(module)._parameters.items()
        if tensor is not None
    }


def kind_called(name: str | None, known: Sequence[str] = tuple(KINDS)) -> Kind | None:
    """The type that ``--type`` names. Raises ModelError for one that gguf cannot write."""
    if name is None:
        return None
    if name.lower() not in known:
        raise ModelError(
            f"--type: expected one of {', '.join(known)}, got {name}. For others write f16, and then use llama.cpp's "
            "own llama-quantize"
        )
    return KINDS[name.lower()]


def kind_for(held: Kind, wanted: Kind | None, shape: Sequence[int]) -> Kind:
    """In which type a tensor of ``shape`` is written that the file has in ``held``: vectors as they are, matrices in
    the one that is wanted, if their rows can be cut into its blocks; the nearest finer one where gguf cannot write it.
    """
    kind = held if wanted is None or len(shape) < 2 else wanted
    kind = kind if kind in _WRITABLE else Kind.Q8_0
    block = gguf.GGML_QUANT_SIZES[kind][0]
    return kind if shape[-1] % block == 0 else Kind.F16


def encoded(values: Array, kind: Kind, name: str) -> Array:
    """``values`` in the bytes of ``kind``, by gguf's own quantiser. Raises ModelError if they do not fit into it."""
    with np.errstate(over="ignore"):
        data = gguf.quantize(np.ascontiguousarray(values, dtype=np.float32), kind)
    if not np.isfinite(gguf.dequantize(data, kind)).all():
        raise ModelError(
            f"{name}: its values do not fit into {kind.name}; choose another --type (bf16 or f32 hold all)"
        )
    return data


def write_copy(
    file: GgufFile, out: Path, tensors: Mapping[str, tuple[Array, Kind]], fields: Mapping[str, Any], kind: str | None
) -> None:
    """Write to ``out`` what ``file`` holds, with other ``tensors`` (new ones come last) and other values of ``fields``.
    ``kind``: the type of its matrices, where it is one for all."""
    reader = file.reader
    writer = GGUFWriter(out, file.architecture, endianess=reader.endianess)
    writer.data_alignment = reader.alignment
    said = dict(fields)
    if kind is not None:
        said |= {"general.file_type": _FILE_TYPES[kind], "general.quantization_version": gguf.GGML_QUANT_VERSION}
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kinds = field.types
        value = said.pop(name, None)
        writer.add_key_value(
            name,
            field.contents() if value is None else value,
            kinds[0],
            sub_type=kinds[-1] if kinds[0] is GGUFValueType.ARRAY else None,
        )
    for name, value in said.items():
        writer.add_key_value(name, value, GGUFValueType.STRING if isinstance(value, str) else GGUFValueType.UINT32)
    held = {tensor.name: (tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    everything = held | dict(tensors)
    for name, (data, raw) in everything.items():
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for data, _ in everything.values():
        writer.write_tensor_data(data)
    writer.close()
    require_whole(out)


def require_whole(file: Path) -> None:
    """Raise OSError where not all of ``file`` is there: a disk that is full makes numpy write less without a word."""
    try:
        GGUFReader(file)
    except ValueError:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file)) from None
