"""Reads GGUF files. Each is dequantised once, into a cache of ordinary Hugging Face model folders.

The environment variable TRIMTAB_CACHE names the cache; the default is ``trimtab`` in the user's cache folder. All of it
can be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from gguf import GGUFReader
from tokenizers import Regex, decoders, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from trimtab.errors import ModelError, TrimtabWarning
from trimtab.files import read_json, write_folder, write_json
from trimtab.machine import GIB, check_fits
from trimtab.models.gguf_positions import scale_positions
from trimtab.models.untrusted import check_settings
from trimtab.reading import panics

# A dequantised value is a 4 to 8 bit number times a 16 bit scale, plus an offset. float32 holds that exactly for every
# type of block, and takes 540 MB of disk for SmolLM2-135M. bfloat16 would round its Q4_1 file by 0.14 % of the weights'
# norm (float16: 0.02 %); loading can still cast it.
DTYPE = torch.float32

# Part of each cached folder's name. Raise it when the conversion changes.
_VERSION = 3

# How a vocabulary splits text stands in its "tokenizer.ggml.pre". transformers (5.23) knows some and takes GPT-2's way
# for all others. These split numbers into single digits first, which gives other tokens where spaces come before one.
_DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_AS_QWEN2 = ("stablelm2", "hunyuan")
_AS_GPT2 = ("gpt-2", "mpt", "olmo", "phi-2", "jina-v2-code", "trillion", "gigachat")

_GEMMA_27B = (46, 62)
"""Layers of Gemma 2 27B and Gemma 3 27B."""

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """The folder of dequantised models."""
    if own := os.environ.get("TRIMTAB_CACHE"):
        return Path(own).expanduser() / "models"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "trimtab" / "models"


def dequantised_folder(file: Path) -> Path:
    """The model folder that was made from ``file``; it is made now if it is not in the cache.

    Several processes may call this at once, but not several threads, since transformers is not thread-safe here.

    Raises ModelError if the file cannot be read, if transformers does not read its architecture, or if there is too
    little memory or disk.
    """
    target = _cached(file)
    if not _is_complete(target):
        _log.info("Dequantising %s, once, into %s", file.name, target)
        with _reading(file):
            gguf_config(file)  # a million layers are not begun with
            reader = GGUFReader(file)
            model = _dequantised(file, reader)
            tokenizer = _tokenizer(file, reader)

        def fill(folder: Path) -> None:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            _as_it_is(folder / "tokenizer_config.json")

        try:
            damaged = target.exists() and not _is_complete(target)
            write_folder(target, fill, replace=damaged)
        except OSError as error:
            raise ModelError(
                f"{target}: cannot be written ({error}). Set TRIMTAB_CACHE to a folder with enough room."
            ) from error
    return target


def is_dequantised(file: Path) -> bool:
    """Whether the model folder of ``file`` is in the cache."""
    return _is_complete(_cached(file))


def gguf_config(file: Path) -> PretrainedConfig:
    """The model's configuration, from the head of the file. The weights are not read."""
    config: PretrainedConfig
    if _is_complete(target := _cached(file)):
        config = AutoConfig.from_pretrained(target)
    else:
        with _reading(file):
            config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
            check_settings(config.to_dict(), file)
            _complete(config, GGUFReader(file), file)
    return config


def _cached(file: Path) -> Path:
    state = file.stat()
    identity = f"{_VERSION} {file.resolve()} {state.st_size} {state.st_mtime_ns}"
    return cache_folder() / f"{file.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"


def _is_complete(folder: Path) -> bool:
    """Whether no file is missing; a tool that removes old files from caches may have taken some."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json")
    return all((folder / name).is_file() for name in names) and any(folder.glob("*.safetensors"))


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        with panics():
            yield
    except ModelError:
        raise
    except Exception as error:  # three libraries read the file, and each fails in ways of its own
        raise ModelError(
            f"{file}: cannot be read as a GGUF model ({type(error).__name__}: {str(error).strip()[:300]}). It may be "
            f"incomplete, or of an architecture that transformers {transformers.__version__} does not read."
        ) from error


def _dequantised(file: Path, reader: GGUFReader) -> Any:
    size = sum(int(tensor.n_elements) for tensor in reader.tensors) * DTYPE.itemsize
    check_fits(f"Dequantising {file.name}", size)
    free = shutil.disk_usage(next(parent for parent in _cached(file).parents if parent.exists())).free
    if size > free:
        raise ModelError(
            f"Dequantising {file.name} needs {size / GIB:.1f} GiB of disk in {cache_folder()}, which has "
            f"{free / GIB:.1f} GiB. Set TRIMTAB_CACHE to a folder with enough room."
        )
    options: dict[str, Any] = {"dtype": DTYPE}
    # Unless told otherwise, transformers leaves blocks packed if it has a kernel that multiplies by them.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # Its progress bar cannot be switched off, and belongs on a terminal but not in a log.
    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, output_loading_info=True, **options
        )
    read, found = loaded
    _require_all(file, reader, read, found["missing_keys"])
    # transformers refuses to save a model that it read from GGUF, so its values move into a new model.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    _complete(config, reader, file)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    return model


def _complete(config: PretrainedConfig, reader: GGUFReader, file: Path) -> None:
    """Put into ``config`` what transformers leaves out. Raises ModelError as `scale_positions` does."""
    scale_positions(config, reader, file)
    text = config.get_text_config()
    if hasattr(text, "query_pre_attn_scalar"):  # of Gemma; no file says it, and llama.cpp knows the 27B by its layers
        large = text.num_hidden_layers in _GEMMA_27B
        text.query_pre_attn_scalar = text.hidden_size // text.num_attention_heads if large else text.head_dim


def _require_all(file: Path, reader: GGUFReader, model: Any, missing: Collection[str]) -> None:
    """Raise ModelError where transformers found no tensor for a parameter, which is random then, or left biases out."""
    architecture = reader.get_field("general.architecture")
    name = architecture.contents() if architecture is not None else "?"
    elsewhere = "Take the model as a folder (its hub id, or what `trimtab merge` and others write)"
    if missing:
        raise ModelError(
            f"{file}: transformers {transformers.__version__} finds no tensor for {len(missing)} parameters of a "
            f"{type(model).__name__}, such as {sorted(missing)[0]}, so it does not read this kind of '{name}' "
            f"(with experts, for instance). {elsewhere}"
        )
    known = {one: kind for kind, one in gguf.MODEL_ARCH_NAMES.items()}
    if name not in known:
        return
    table = gguf.get_tensor_name_map(known[name], model.config.get_text_config().num_hidden_layers)
    read = {table.get_name(parameter, (".weight", ".bias")) for parameter in model.state_dict()}
    left = [one.name for one in reader.tensors if one.name.endswith(".bias") and one.name not in read]
    if left := [one for one in left if one.removesuffix("bias") + "weight" in read]:
        raise ModelError(
            f"{file}: transformers {transformers.__version__} leaves out {len(left)} biases of this '{name}', such as "
            f"{left[0]}, so it would compute something else. {elsewhere}"
        )


def _as_it_is(file: Path) -> None:
    """Have tokenizer.json read as it is; a class of its own, such as GPT2Tokenizer, would make a part of it anew."""
    write_json(file, {**read_json(file), "tokenizer_class": "PreTrainedTokenizerFast"})


def _tokenizer(file: Path, reader: GGUFReader) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    backend = tokenizer.backend_tokenizer
    field = reader.get_field("tokenizer.ggml.pre")
    pre = (
        field.contents() if field is not None and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) else None
    )
    if pre in _DIGITS_APART:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif pre in _AS_QWEN2:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS["qwen2"]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    elif pre is not None and pre not in _AS_GPT2:
        warnings.warn(
            f"{file}: how its vocabulary splits text ('{pre}') is not known here, and GPT-2's way is taken, so that "
            "numbers, spaces and signs may become other tokens than in llama.cpp. The model's folder has its own",
            TrimtabWarning,
            stacklevel=2,
        )
    if (kind := reader.get_field("tokenizer.ggml.model")) is not None and kind.contents() == "llama":
        prefix = reader.get_field("tokenizer.ggml.add_space_prefix")
        _as_sentencepiece(backend, prefix=prefix is None or bool(prefix.contents()))
    return tokenizer


def _as_sentencepiece(backend: Any, *, prefix: bool) -> None:
    """Let ``backend`` treat spaces as the model was trained to, and as llama.cpp does: one is put in front of every
    text and of what follows a special token, if ``prefix``. transformers (5.23) does that whatever the file says, not
    after special tokens, and not where there is a space already."""
    spaces = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if prefix else spaces
    backend.pre_tokenizer = None
    told = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*told, decoders.Strip(" ", 1, 0)] if prefix else told)
