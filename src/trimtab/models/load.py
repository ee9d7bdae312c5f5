"""Reads Hugging Face model folders: ``config.json``, ``*.safetensors`` and a tokenizer.

    source = locate("smollm2-135m")
    tokenizer = load_tokenizer(source)
    model = load_model(source, torch.bfloat16)

A GGUF file is first converted into such a folder. Weights are read from safetensors only, so nothing is unpickled.
A missing weight is an error, since transformers would fill it with random values.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from trimtab.errors import ModelError
from trimtab.models.chat_template import checked_template
from trimtab.models.family import family
from trimtab.models.gguf import dequantised_folder, gguf_config
from trimtab.models.heads import POOLER, begin_around, draw, head_modules, is_known, poolers
from trimtab.models.locate import Source
from trimtab.models.new_tokens import add_tokens, make_room, require_rows
from trimtab.models.tensors import Weights
from trimtab.models.untrusted import check_config, check_tokenizer, check_weights
from trimtab.reading import panics, within

_SECONDS = 300.0  # for a model without weights; one of 47,000 layers takes ten
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def load_config_only(source: Source) -> PretrainedConfig:
    """The model's configuration. Its weights are not read.

    Raises ModelError if it cannot be fetched or read, or if transformers does not know the architecture.
    """
    with _loading(source, "configuration"):
        if source.kind == "gguf":
            return gguf_config(Path(source.location))
        if folder := _fetched(source, "config.json"):
            check_config(folder)
        config: PretrainedConfig = AutoConfig.from_pretrained(source.location, **_options(source))
        return config


def _config_with_head(source: Source) -> PretrainedConfig:
    """The configuration of the model with the labels that it is read for."""
    config, head = load_config_only(source), source.head
    if head.problem:
        config.id2label = dict(enumerate(head.names))
        config.label2id = {name: number for number, name in enumerate(head.names)}
        config.problem_type = head.problem  # type: ignore[assignment]
        # By its padding a decoder's head finds where a text ends, so it has to be what the tokenizer pads with.
        decodes = "SequenceClassification" in head.model_class and family(config) == "decoder"
        if decodes or getattr(config, "pad_token_id", 0) is None:
            config.pad_token_id = _padding(source, config.get_text_config().vocab_size)
    return config


def _padding(source: Source, rows: int) -> int | None:
    """What the tokenizer pads with, if the embedding has ``rows`` for it; None for an added token, which has no row
    yet. Raises ModelError for any other that it has no row for."""
    tokenizer = load_tokenizer(source)
    if tokenizer.pad_token_id < rows:
        return int(tokenizer.pad_token_id)
    if not source.add_tokens:
        require_rows(source.name, tokenizer, (), rows)
    return None


def _add_rows(model: Any, source: Source) -> None:
    """Make room in ``model`` for the tokens that are added to it, of which one may be what rows are padded with."""
    tokenizer = load_tokenizer(source)
    make_room(model, len(tokenizer))
    if source.head.problem and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer, with the tokens and the chat template that a run gives it. It pads on the right; if it has no
    padding token, it pads with its end-of-sequence token.

    The model may have to learn to write that token, so labels must be made from the lengths of rows, and never by
    leaving out the padding token.

    Raises ModelError if it cannot be fetched or read, or has no token to pad with; ConfigError for a template that is
    no Jinja.
    """
    if source.kind == "folder" and not any((Path(source.location) / name).is_file() for name in _TOKENIZER_FILES):
        expected = ", ".join(_TOKENIZER_FILES)
        raise ModelError(f"{source.location}: no tokenizer: expected one of {expected} beside config.json.")
    options = _options(source)
    with _loading(source, "tokenizer"):
        if folder := _fetched(source, "tokenizer.json"):
            check_tokenizer(folder)
        tokenizer = AutoTokenizer.from_pretrained(_location(source), **options)
        tokenizer("a", verbose=False)  # what is wrong in its settings often shows only now
    add_tokens(tokenizer, source.add_tokens)
    if source.chat_template:
        tokenizer.chat_template = checked_template(source.chat_template, tokenizer)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ModelError(f"{source.name}: the tokenizer has no pad, eos or unk token, so rows cannot be padded.")
    return tokenizer


def load_reader(source: Source) -> Any:
    """What makes tensors of rows for the model of ``source``: its tokenizer, or the image processor of one that sees.

    Raises ModelError as ``load_tokenizer`` does.
    """
    if "ImageClassification" not in source.head.model_class:
        return load_tokenizer(source)
    from transformers import AutoImageProcessor

    with _loading(source, "image processor"):
        return AutoImageProcessor.from_pretrained(_location(source), **_options(source))


def load_model(
    source: Source,
    dtype: torch.dtype = torch.float32,
    attention: str = "auto",
    quantisation: str = "none",
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """The model in ``dtype``, in eval mode, on ``device``.

    Args:
        source: from ``locate``; its ``head`` says what the model is read for.
        dtype: the floating point type of the weights.
        attention: ``sdpa`` or ``eager``. All else is what transformers prefers: what takes a GPU, a run sets once the
            model is there.
        quantisation: ``none``, or the quantised base that its linear layers are packed as while they are read; on
            ``device``, which makes short work of it.
        device: where it is put.

    Raises:
        ModelError: it cannot be fetched or read, has no safetensors, lacks weights, is no model of the class that is
            asked for, or cannot be quantised.
    """
    if source.kind == "folder":
        _check_weights(Path(source.location))
    elif folder := _fetched(source, "model.safetensors.index.json"):
        check_weights(folder)
    options = _options(source) | _attention(attention)
    with _loading(source, "model"):
        if source.head.problem:
            options |= {"config": _config_with_head(source), "ignore_mismatched_sizes": True}
        loaded: Any = getattr(transformers, source.head.model_class).from_pretrained(
            _location(source),
            # In the dtype of the files, weights are only mapped, and are read one by one while they are quantised.
            dtype=dtype if quantisation == "none" else "auto",
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    model: PreTrainedModel
    model, report = loaded
    if source.kind == "hub" and (folder := _fetched(source, "config.json")):
        check_weights(folder)  # what has been fetched only now
    drawn = _draw_head(model, source, {*report["missing_keys"], *(one[0] for one in report["mismatched_keys"])})
    if missing := sorted({*report["missing_keys"], *(one[0] for one in report["mismatched_keys"])} - drawn):
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ModelError(
            f"{source.name}: {len(missing)} weights of a {type(model).__name__} are not in its files ({shown}). "
            f"The files are incomplete, or belong to another kind of model."
        )
    if quantisation != "none":
        from trimtab.models.quantise import quantise_model

        folder = weights_folder(source)
        with _loading(source, "model"):
            quantise_model(model, quantisation, dtype, Weights(folder), source.name, device=device)
    if source.add_tokens:
        with _loading(source, "model"):
            _add_rows(model, source)
    model.eval().to(device)
    return model


def trained_beside(source: Source, model: Any) -> list[str]:
    """The modules of ``model`` that are trained whole beside an adapter: its head, and what its files lack below it."""
    if not source.head.problem:
        return []
    below = poolers(model)
    if below and not (source.kind == "hub" and model.device.type == "meta"):
        stored = list(Weights(weights_folder(source)))
        below = [name for name in below if not any(key.endswith(_end_of(name)) for key in stored)]
    return [*head_modules(model), *below]


def drawn_modules(source: Source, model: Any) -> list[str]:
    """The modules of ``model`` that its files have no weights for, or none for the labels that it is read for: until
    something is trained or loaded into them, what they compute is by chance."""
    if not source.head.problem:
        return []
    known = is_known(load_config_only(source), source.head.names)
    stored = list(Weights(weights_folder(source)))
    heads = [
        name for name in head_modules(model) if not (known and any(key.endswith(f"{name}.weight") for key in stored))
    ]
    return [*heads, *(name for name in poolers(model) if not any(key.endswith(_end_of(name)) for key in stored))]


def _end_of(name: str) -> str:
    """By which the weight of a pooler is known in a file, whatever stands before."""
    return f"{name[name.index(POOLER) :]}.weight"


def _draw_head(model: Any, source: Source, missing: set[str]) -> set[str]:
    """Draw the head of ``model`` anew, unless it brings one for the very labels; gives those of the ``missing`` weights
    that are none any more."""
    if not source.head.problem:
        return set()
    heads, lacking = head_modules(model), {name.rpartition(".")[0] for name in missing}
    wanted = lacking & set(poolers(model))
    if lacking & set(heads) or not is_known(load_config_only(source), source.head.names):
        wanted |= set(heads)
    draw(model, sorted(wanted), source.head.seed)
    begin_around(model, wanted, source.head)
    return {name for name in missing if name.rpartition(".")[0] in wanted}


def empty_model(source: Source, dtype: torch.dtype = torch.float32, attention: str = "auto") -> PreTrainedModel:
    """The model on the meta device, made from its configuration: with every shape, and without weights.

    Raises ModelError as ``load_config_only`` does, or if it is no model of the class that is asked for.
    """
    config = _config_with_head(source)
    options = _attention(attention)
    if source.add_tokens:
        load_tokenizer(source)  # a GGUF file is dequantised for it: not on meta
    building = within("making it from its configuration", seconds=_SECONDS)
    with _loading(source, "model"), building, torch.device("meta"):
        model: PreTrainedModel = getattr(transformers, source.head.model_class).from_config(
            config, dtype=dtype, trust_remote_code=source.trust_remote_code, **options
        )
        if source.add_tokens:
            _add_rows(model, source)
        return model


def weights_folder(source: Source) -> Path:
    """The folder with the model's ``*.safetensors``. A hub model is fetched for it, and a GGUF file is dequantised.

    Raises ModelError if it cannot be fetched, or has no weights in safetensors.
    """
    with _loading(source, "weights"):
        if source.kind == "hub":
            from huggingface_hub import snapshot_download

            patterns = ["*.safetensors", "*.json"]
            folder = Path(snapshot_download(source.location, revision=source.revision, allow_patterns=patterns))
        else:
            folder = Path(_location(source))
    _check_weights(folder)
    return folder


def side_files(source: Source) -> Path | None:
    """The folder with what the model has besides weights. That of a hub model is fetched, as far as it is small files;
    None if it cannot be."""
    if source.kind != "hub":
        return Path(_location(source))
    from huggingface_hub import snapshot_download

    weights = ["*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.ckpt", "*/*"]
    try:
        return Path(snapshot_download(source.location, revision=source.revision, ignore_patterns=weights))
    except Exception:  # offline, taken down, not allowed: nothing of that spoils the model that was loaded already
        return None


def module_folder(source: Source, origin: Path, name: str) -> Path | None:
    """The folder ``name`` of a model of sentence-transformers, whose other files lie in ``origin``; that of a hub model
    is fetched. None if there is none."""
    if source.kind == "hub":
        from huggingface_hub import snapshot_download

        patterns = [f"{name}/*.json", f"{name}/*.safetensors"]
        with contextlib.suppress(Exception):  # as for other side files
            origin = Path(snapshot_download(source.location, revision=source.revision, allow_patterns=patterns))
    return origin / name if (origin / name).is_dir() else None


def _location(source: Source) -> str:
    """The folder or hub id to read from. A GGUF file is first dequantised into a folder."""
    return str(dequantised_folder(Path(source.location))) if source.kind == "gguf" else source.location


def _attention(said: str) -> dict[str, Any]:
    return {"attn_implementation": said} if said in ("sdpa", "eager") else {}


def _options(source: Source) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": source.trust_remote_code}
    if source.kind == "hub" and source.revision is not None:
        options["revision"] = source.revision
    return options


def _fetched(source: Source, name: str) -> Path | None:
    """The folder with the file ``name`` of the model, which is fetched for it. None where there is none to be looked
    at: transformers says why."""
    if source.kind == "folder":
        return Path(source.location)
    if source.kind == "hub":
        from huggingface_hub import hf_hub_download

        with contextlib.suppress(Exception):
            return Path(hf_hub_download(source.location, name, revision=source.revision)).parent
    return None


def _check_weights(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        check_weights(folder)
        return
    if pickled := sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]):
        raise ModelError(
            f"{folder}: its weights are pickled ({pickled[0].name}), and unpickling can run any code, so only "
            f"*.safetensors are read. If you trust the file, convert it once with transformers: "
            f"AutoModelForCausalLM.from_pretrained(FOLDER, use_safetensors=False).save_pretrained(NEW_FOLDER)"
        )
    raise ModelError(f"{folder}: a configuration without weights: expected *.safetensors beside config.json.")


def quiet_libraries() -> None:
    """Keep the libraries' own chatter out of a run's output from here on; their errors stay."""
    for name in ("transformers", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and notices off the terminal. Errors still raise."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _loading(source: Source, what: str) -> Iterator[None]:
    """Turn whatever transformers raises about ``source`` into a ModelError that says what to do."""
    try:
        with quiet_transformers(), panics():
            yield
    except ModelError:
        raise
    except Exception as error:  # OSError, ValueError, KeyError, ImportError and more have no other common base
        text = " ".join(str(error).split())
        if "trust_remote_code" in text and not source.trust_remote_code:
            text = "It needs its own Python code to run. If you have read and trust it: model.trust_remote_code=true"
        elif source.kind == "hub" and isinstance(error, OSError):
            text = f"{str(error).splitlines()[0]} {source.advice}"
        else:
            text = f"{type(error).__name__}: {text[:600]}"
        origin = "" if source.location == source.name else f" from {source.location}"
        raise ModelError(f"{source.name}: the {what} cannot be loaded{origin}. {text}".rstrip()) from error
