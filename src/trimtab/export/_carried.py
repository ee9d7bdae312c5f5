"""What a model folder has besides its weights, carried from a base to the model that was made of it.

Converters, servers and processors look for files that transformers does not write again: ``tokenizer.model``,
``vocab.json``, a preprocessor's configuration, further chat templates, the license.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from trimtab.files import read_json, write_json
from trimtab.models.load import module_folder, side_files
from trimtab.models.locate import Source

_CODE = (".py", ".ipynb", ".sh", ".bat", ".js", ".so", ".dll", ".dylib", ".exe")
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite", ".npz"),
    *(".pkl", ".pickle", ".joblib", ".npy", ".index.json"),
)
# The base's card and its measures, how its weights were packed, adapters, and what trainers leave in their folders.
_OTHERS = ("readme.md", "quantize_config.json", "quant_config.json", "hf_quant_config.json", "trainer_state.json")
_LARGEST = 64 * 2**20
_FOLDERS = ("additional_chat_templates",)


def carry(base: Source, tokenizer: Any, folder: Path) -> list[str]:
    """Copy to ``folder``, which holds a model already, what the model's ``base`` has besides weights and is not there.

    Code is copied only if the base was loaded with its own code. Gives what the user should know, a sentence each.
    """
    origin, told = side_files(base), []
    if origin is None:
        told.append(
            f"{base.name}: its files besides weights and tokenizer cannot be reached, and are not carried along"
        )
        origin = folder
    code = []
    for file in sorted(path for path in origin.iterdir() if path.is_file() and not (folder / path.name).exists()):
        name = file.name.lower()
        if name.startswith((".", "adapter_", "trimtab")) or name.endswith(_WEIGHTS) or name in _OTHERS:
            continue
        if name == "chat_template.json" and base.chat_template:  # an older way to write the base's own template
            continue
        if name.endswith(_CODE):
            code.append(file.name)
            if not base.trust_remote_code:
                continue
        if file.stat().st_size > _LARGEST:
            told.append(f"{file.name} of the base is not carried along: it has {file.stat().st_size / 2**20:,.0f} MiB")
            continue
        shutil.copyfile(file, folder / file.name)
    told += _carry_modules(base, origin, folder)
    for name in _FOLDERS:
        if (origin / name).is_dir() and not (folder / name).exists():
            shutil.copytree(origin / name, folder / name)
    if code:
        which = "carried along, as model.trust_remote_code is on" if base.trust_remote_code else "not carried along"
        told.append(f"code of the base is {which}: {', '.join(code)}")
    _write_again(tokenizer, folder)
    if base.kind == "gguf":
        _write_vocabulary(tokenizer, folder)
    return told


def _carry_modules(base: Source, origin: Path, folder: Path) -> list[str]:
    """Copy what a model of sentence-transformers does with the encoder's output (``modules.json``): pooling, a dense
    layer. All of it is as true of a tuned encoder; without it the list of modules must not stay, either."""
    listed = folder / "modules.json"
    if not listed.is_file():
        return []
    try:
        named = {str(one["path"]) for one in read_json(listed)} - {""}
    except (ValueError, TypeError, KeyError, OSError):
        named = {".."}
    beside = {name for name in named if re.fullmatch(r"\w[\w.-]*", name)}
    if beside == named:
        places = {name: module_folder(base, origin, name) for name in sorted(named)}
        files = {name: [*place.glob("*.json"), *place.glob("*.safetensors")] for name, place in places.items() if place}
        if all(files.get(name) for name in named):
            for name in named - {one.name for one in folder.iterdir()}:
                (folder / name).mkdir()
                for file in files[name]:
                    shutil.copyfile(file, folder / name / file.name)
            return []
    for file in (listed, folder / "config_sentence_transformers.json", folder / "sentence_bert_config.json"):
        file.unlink(missing_ok=True)
    return [
        f"{base.name}: not all that its modules.json names is there as json and safetensors, so the files for "
        "sentence-transformers are not carried along"
    ]


def _write_again(tokenizer: Any, folder: Path) -> None:
    """Older tokenizer files, where the base has them, as this tokenizer would write them."""
    if (file := folder / "special_tokens_map.json").is_file():
        write_json(file, {**read_json(file), **_texts(tokenizer.special_tokens_map)})
    if (file := folder / "added_tokens.json").is_file():
        write_json(file, tokenizer.get_added_vocab())


def _texts(tokens: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [str(one) for one in token] if isinstance(token, list | tuple) else str(token)
        for name, token in tokens.items()
    }


def _write_vocabulary(tokenizer: Any, folder: Path) -> None:
    """``vocab.json`` and ``merges.txt``, for programs that do not read ``tokenizer.json``."""
    model = tokenizer.backend_tokenizer.model
    if type(model).__name__ == "BPE" and not (folder / "vocab.json").exists():
        model.save(str(folder))
