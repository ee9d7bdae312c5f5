"""An adapter for llama.cpp, which is put beside the base's GGUF file: ``--lora adapter.gguf``.

For each matrix ``NAME.weight`` it holds ``NAME.weight.lora_a`` ``[rank, in]`` and ``NAME.weight.lora_b``
``[out, rank]``, in llama.cpp's order of rows, and one ``adapter.lora.alpha``. The update is ``alpha / rank * lora_b @
lora_a``, with each matrix's own rank (llama.cpp: ``llama-adapter.cpp``, ``convert_lora_to_gguf.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGUFReader, GGUFWriter

from trimtab.errors import ModelError, SurgeryError
from trimtab.export import _gguf_file as files
from trimtab.export._export_format import ExportFormat, Written
from trimtab.export._gguf_file import GgufFile, Order, Place
from trimtab.export._modelfile import modelfile
from trimtab.export._plain_lora import Factors, make_plain, plain_factors
from trimtab.export._subject import Subject
from trimtab.files import write_text
from trimtab.surgery.adapted import bare

NAME = "adapter.gguf"
_TYPES = ("f32", "f16", "bf16")

# By the model_type of transformers: what llama.cpp calls the architecture, and whether its converter turns the rows of
# queries and keys (``conversion/``: LlamaModel.permute and its heirs). Each is held against llama.cpp by
# tests/export/test_llama_cpp_architectures.py; others need the file itself.
_ARCHITECTURES = {
    **{"llama": ("llama", "rope"), "mistral": ("llama", "rope"), "mixtral": ("llama", "rope")},
    **{"smollm3": ("smollm3", "rope"), "granite": ("granite", "rope")},
    **{"qwen2": ("qwen2", "plain"), "qwen3": ("qwen3", "plain"), "phi3": ("phi3", "plain")},
    **{"gemma": ("gemma", "plain"), "gemma2": ("gemma2", "plain"), "gemma3_text": ("gemma3", "plain")},
    **{"gpt2": ("gpt2", "plain"), "starcoder2": ("starcoder2", "plain"), "olmo2": ("olmo2", "plain")},
}


class GgufLora(ExportFormat):
    """``adapter.gguf`` and a Modelfile that puts it onto the base's file."""

    summary = "a LoRA adapter for llama.cpp and Ollama, to be loaded beside the base's GGUF file"
    takes = frozenset({"type", "rank", "gguf", "system"})
    marks = (NAME,)
    library = None
    relation = "adapter"

    def check(self, subject: Subject) -> None:
        subject.require_causal("llama.cpp")
        files.kind_called(subject.wishes.type, _TYPES)
        if subject.wishes.gguf is not None and not subject.wishes.gguf.is_file():
            raise ModelError(f"{subject.wishes.gguf}: no such file; --gguf names the GGUF file of the run's base")
        if _file(subject) is None:
            _architecture(subject.model.config)

    def prepare(self, subject: Subject) -> None:
        if subject.source.kind == "gguf":
            subject.load_anew(dtype="float32")  # the values of the file, and not what the run's dtype makes of them

    def fill(self, subject: Subject, folder: Path) -> Written:
        plain, model, path = make_plain(subject), subject.model, _file(subject)
        factors, notes = plain_factors(model, "an adapter of llama.cpp"), plain.notes
        if path is not None:
            file = GgufFile(path)
            architecture, places = file.architecture, _places(file, factors, model, exact=subject.wishes.gguf is None)
            if subject.wishes.gguf is not None:
                notes.append("compared on the run's own base: what the GGUF file's types round comes on top")
        else:
            architecture, places = _by_table(factors, model)
            notes.append(
                "the order of rows is that of llama.cpp's converter for this architecture; --gguf FILE holds it "
                "against the file that the adapter is for"
            )
        kind = files.kind_called(subject.wishes.type) or files.KINDS["f32"]
        _write(folder / NAME, architecture, factors, places, kind)
        _read_back(folder / NAME, factors, places)
        base = path.name if path is not None else "base.gguf"
        text, told = modelfile(subject.tokenizer, model, f"./{base}", adapter=f"./{NAME}", system=subject.wishes.system)
        write_text(folder / "Modelfile", f"# Put the base's GGUF file beside this one, as {base}.\n{text}")
        done = [*plain.done, f"wrote {len(factors)} pairs of matrices in {kind.name}"]
        return Written(done, [*notes, *told], _USE.replace("BASE", base))


_USE = f"""
```text
llama-cli -m BASE --lora {NAME}
ollama create tuned -f Modelfile      # with BASE in this folder
```
"""


def _file(subject: Subject) -> Path | None:
    """The GGUF file that the adapter is for, if one is at hand."""
    if subject.wishes.gguf is not None:
        return subject.wishes.gguf
    return Path(subject.source.location) if subject.source.kind == "gguf" else None


def _architecture(config: Any) -> tuple[str, str]:
    kind = config.get_text_config().model_type
    if kind not in _ARCHITECTURES:
        raise ModelError(
            f"{kind}: in which order llama.cpp keeps the rows of this architecture is not known here. Name the GGUF "
            f"file that the adapter is for, by which it is found: --gguf FILE. (Known: {', '.join(_ARCHITECTURES)})"
        )
    return _ARCHITECTURES[kind]


def _places(file: GgufFile, factors: list[Factors], model: Any, *, exact: bool) -> dict[str, Place]:
    """Where each module's weight stands in ``file``, found by its values."""
    found = {}
    for one in factors:
        _require_called(one, model)
        place = file.place(f"{one.module}.weight", one.handle.weight(), model.config, exact=exact)
        if not place.order.moves_rows:
            raise SurgeryError(
                f"{one.module}: {place.tensor} has another form in {file.path.name} than a LoRA can have"
            )
        found[one.module] = place
    return found


def _by_table(factors: list[Factors], model: Any) -> tuple[str, dict[str, Place]]:
    """The same for a model whose GGUF file is not at hand."""
    architecture, _ = _architecture(model.config)
    config, found = model.config.get_text_config(), {}
    names = files.tensor_names(architecture, int(config.num_hidden_layers), architecture)
    for one in factors:
        _require_called(one, model)
        tensor = names.get_name(f"{one.module}.weight", try_suffixes=(".weight",))
        if tensor is None:
            raise SurgeryError(f"{one.module}: llama.cpp's {architecture} has no matrix of this name")
        found[one.module] = Place(tensor, order_of(tensor, model.config))
    return architecture, found


def order_of(tensor: str, config: Any) -> Order:
    """In which order llama.cpp's converter puts the rows of ``tensor`` of a model of ``config``."""
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    keys = int(getattr(text, "num_key_value_heads", None) or heads)
    count = {"attn_q": heads, "attn_k": keys}.get(tensor.split(".")[-2])
    return Order("rope", count) if _architecture(config)[1] == "rope" and count is not None else Order()


def _require_called(one: Factors, model: Any) -> None:
    """Raise SurgeryError for an adapter on the embedding, or on a head that is one with it: llama.cpp would put it on
    both, or find no matrix for it."""
    tied = model.get_input_embeddings(), model.get_output_embeddings()
    inner = bare(model.get_submodule(one.module))
    shared = tied[1] is not None and bare(tied[0]).weight is bare(tied[1]).weight
    if inner is bare(tied[0]) or (shared and tied[1] is not None and inner is bare(tied[1])):
        raise SurgeryError(
            f"{one.module}: an adapter on the embedding, or on an output head that is one with it, is not loaded by "
            "llama.cpp as it was trained; `trimtab export RUN OUT --to gguf` folds it in"
        )


def _write(path: Path, architecture: str, factors: list[Factors], places: dict[str, Place], kind: Any) -> None:
    alphas = {one.scale * one.rank for one in factors}
    alpha = alphas.pop() if len(alphas) == 1 else 1.0
    writer = GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for one in factors:
        place = places[one.module]
        more = one.scale * one.rank / alpha  # 1 where all matrices have one alpha
        tensors = {"lora_a": files.as_array(one.A), "lora_b": place.order.there(files.as_array(one.B) * more)}
        for key, values in tensors.items():
            name = f"{place.tensor}.{key}"
            writer.add_tensor(name, files.encoded(values, kind, name), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files.require_whole(path)


@torch.no_grad()
def _read_back(path: Path, factors: list[Factors], places: dict[str, Place]) -> None:
    """Put what the file says into the adapters, so that it is what is compared with the run."""
    reader = GGUFReader(path)
    field = reader.get_field(gguf.Keys.Adapter.LORA_ALPHA)
    assert field is not None
    alpha = float(field.contents())
    held = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    for one in factors:
        place = places[one.module]
        a, b = (torch.from_numpy(held[f"{place.tensor}.{key}"].astype("float32")) for key in ("lora_a", "lora_b"))
        back = torch.from_numpy(place.order.back(b.numpy()).copy())
        one.adapter.A.copy_(a)
        one.adapter.B.copy_(back * (alpha / one.rank / one.scale))
