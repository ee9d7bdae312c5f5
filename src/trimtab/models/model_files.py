"""A model's files: found, fetched, looked at before transformers reads them, and read once.

Weights are read from safetensors only, so nothing is unpickled. A GGUF file is first converted into a folder.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Collection, Iterator, Sequence
from copy import copy, deepcopy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from trimtab.errors import ModelError, machine_refusal
from trimtab.models import languages
from trimtab.models.chat_template import checked_template
from trimtab.models.gguf import dequantised_folder, gguf_config
from trimtab.models.heads import Family, family
from trimtab.models.locate import ModelHead, Source
from trimtab.models.untrusted import check_config, check_tokenizer, check_weights
from trimtab.reading import check_safetensors, panics

_AT_ONCE = 1000  # texts
# The heads of these read the last position of a batch, whatever stands there: padding comes before a text.
_READ_AT_THE_END = ("xlnet",)
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


class ModelFiles:
    """The files of the model of ``source``. What is read of them is kept, so that a run reads each once; each may raise
    ModelError where it is read, for what cannot be fetched, is damaged, or asks for more than any model does."""

    def __init__(self, source: Source) -> None:
        self.source = source

    @classmethod
    def of(cls, source: Source | ModelFiles) -> ModelFiles:
        """Those of ``source``, which may be these already."""
        return source if isinstance(source, ModelFiles) else cls(source)

    def read_for(self, head: ModelHead) -> ModelFiles:
        """The same files, of a model that is read for ``head``."""
        other = copy(self)
        other.source = replace(self.source, head=head)
        return other

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration, as its files say it; not to be changed. Raises ModelError too if transformers does
        not know the architecture."""
        source = self.source
        with loading(source, "configuration"):
            if source.kind == "gguf":
                return gguf_config(Path(source.location))
            if folder := self._fetched("config.json", required=True):
                check_config(folder)
            config: PretrainedConfig = AutoConfig.from_pretrained(source.location, **self.options)
            return config

    @property
    def family(self) -> Family:
        """What kind of model it is."""
        return family(self.config)

    @property
    def reads_no_text(self) -> bool:
        """Whether the model writes, and its encoder reads something else than texts (Whisper)."""
        return bool(getattr(self.config, "is_encoder_decoder", False)) and self.family == "decoder"

    @property
    def config_with_head(self) -> PretrainedConfig:
        """The configuration for a model with the labels that it is read for."""
        config, head = deepcopy(self.config), self.source.head
        if head.problem:
            config.id2label = dict(enumerate(head.names))
            config.label2id = {name: number for number, name in enumerate(head.names)}
            config.problem_type = head.problem  # type: ignore[assignment]
            # By its padding a decoder's head finds where a text ends, so it has to be what the tokenizer pads with.
            decodes = "SequenceClassification" in head.model_class and self.family == "decoder"
            if decodes or getattr(config, "pad_token_id", 0) is None:
                config.pad_token_id = self._padding(config.get_text_config().vocab_size)
        return config

    def _padding(self, rows: int) -> int | None:
        """What the tokenizer pads with, if the embedding has ``rows`` for it; None for an added token, which has no row
        yet. Raises ModelError for any other that it has no row for."""
        if self.tokenizer.pad_token_id < rows:
            return int(self.tokenizer.pad_token_id)
        if not self.source.add_tokens:
            require_rows(self.source.name, self.tokenizer, (), rows)
        return None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with the tokens and the chat template that a run gives it. It pads on the right; if it has no
        padding token, it pads with its end-of-sequence token.

        The model may have to learn to write that token, so labels must be made from the lengths of rows, and never by
        leaving out the padding token.

        Raises ModelError too if it has no token to pad with; ConfigError for a template that is no Jinja.
        """
        source = self.source
        if source.kind == "folder" and not any((Path(source.location) / name).is_file() for name in _TOKENIZER_FILES):
            expected = ", ".join(_TOKENIZER_FILES)
            other = ""
            if any((Path(source.location) / name).is_file() for name in _PROCESSOR_FILES):
                other = (
                    f" A {self.config.model_type} reads pictures or sounds, and of such models a run takes those that "
                    "transformers has a classifier of pictures of."
                )
            raise ModelError(f"{source.location}: no tokenizer: expected one of {expected} beside config.json.{other}")
        with loading(source, "tokenizer"):
            if folder := self._fetched("tokenizer.json"):
                check_tokenizer(folder)
            tokenizer = AutoTokenizer.from_pretrained(self.place, **self.options)
            tokenizer("a", verbose=False)  # what is wrong in its settings often shows only now
        tokenizer.add_tokens(list(source.add_tokens))
        if source.chat_template:
            tokenizer.chat_template = checked_template(source.chat_template, tokenizer)
        if source.languages is not None:
            languages.mark(tokenizer, *source.languages)
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise ModelError(
                f"{source.name}: the tokenizer has no pad, eos or unk token, so rows cannot be padded, and "
                'an answer has no end. Name one of its tokens in tokenizer_config.json, such as "eos_token": "</s>"'
            )
        return tokenizer

    @property
    def reader(self) -> Any:
        """What makes tensors of rows: the tokenizer, or the image processor of a model that sees."""
        kind = self.source.head.model_class
        if "ImageClassification" in kind:
            return self._image_processor
        if "SequenceClassification" in kind and self.config.model_type in _READ_AT_THE_END:
            self.tokenizer.padding_side = "left"
        return self.tokenizer

    @cached_property
    def _image_processor(self) -> Any:
        from transformers import AutoImageProcessor

        with loading(self.source, "image processor"):
            return AutoImageProcessor.from_pretrained(self.place, **self.options)

    @cached_property
    def place(self) -> str:
        """The folder or hub id that transformers reads. A GGUF file is first dequantised into a folder."""
        source = self.source
        return str(dequantised_folder(Path(source.location))) if source.kind == "gguf" else source.location

    @property
    def options(self) -> dict[str, Any]:
        """What every loader of transformers is told."""
        options: dict[str, Any] = {"trust_remote_code": self.source.trust_remote_code}
        if self.source.kind == "hub" and self.source.revision is not None:
            options["revision"] = self.source.revision
        return options

    @cached_property
    def weights(self) -> Weights:
        """The tensors of its ``*.safetensors``. A hub model is fetched for it."""
        source = self.source
        with loading(source, "weights"):
            if source.kind == "hub":
                from huggingface_hub import snapshot_download

                patterns = ["*.safetensors", "*.json"]
                folder = Path(snapshot_download(source.location, revision=source.revision, allow_patterns=patterns))
            else:
                folder = Path(self.place)
        check_weights(folder, all_are_here=True)
        return Weights(folder)

    def check_weights(self) -> None:
        """Look at the weights that are here: all of a folder's, and of a hub model's what has been fetched so far."""
        if folder := self._fetched("model.safetensors.index.json") or self._fetched("config.json"):
            check_weights(folder, all_are_here=self.source.kind == "folder")

    def _fetched(self, name: str, *, required: bool = False) -> Path | None:
        """The folder with the file ``name`` of the model, which is fetched for it. None where there is none to be
        looked at: transformers says why. Raises ModelError for a ``required`` one where the hub cannot be reached:
        transformers would try as long again."""
        if self.source.kind == "folder":
            return Path(self.source.location)
        if self.source.kind == "hub":
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import LocalEntryNotFoundError

            try:
                return Path(hf_hub_download(self.source.location, name, revision=self.source.revision)).parent
            except LocalEntryNotFoundError as error:
                if required:
                    raise ModelError(
                        f"{self.source.name}: the hub cannot be reached, and {self.source.location} has not been "
                        f"fetched before. {self.source.advice}".rstrip()
                    ) from error
            except Exception:
                return None
        return None


def load_config_only(source: Source) -> PretrainedConfig:
    """The model's configuration. Its weights are not read. Raises ModelError as `ModelFiles` does."""
    return ModelFiles(source).config


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer of the model, as `ModelFiles.tokenizer` has it, which says what it raises."""
    return ModelFiles(source).tokenizer


def require_rows(name: str, tokenizer: Any, texts: Sequence[str], rows: int, used: Collection[int] = ()) -> None:
    """Raise ModelError, which says how to make them, if the model ``name``, whose embedding has so many ``rows``, has
    none for a token of ``texts``, for one of ``used``, or for those that pad a batch and end a text."""
    special = {tokenizer.pad_token_id, tokenizer.eos_token_id} - {None}
    if max(len(tokenizer), *special, *used) <= rows - 1:
        return
    found = {*special, *used}
    for start in range(0, len(texts), _AT_ONCE):
        found.update(*tokenizer(list(texts[start : start + _AT_ONCE]), add_special_tokens=False).input_ids)
    missing = sorted(token for token in found if token >= rows)
    if not missing:
        return
    named = [str(tokenizer.convert_ids_to_tokens(token)) for token in missing]
    shown = ", ".join(f"{one} (token {token})" for one, token in zip(named[:5], missing, strict=False))
    more = f" and {len(named) - 5} more" if len(named) > 5 else ""
    asked = ", ".join(f'"{one}"' for one in named[:5])
    raise ModelError(
        f"{name}: the tokenizer has tokens that the model has no row for: {shown}{more}; its embedding has {rows:,} "
        f"rows. To make rows for them, which are then trained beside the plan, say model.add_tokens: [{asked}]; or "
        "take the tokenizer that belongs to the model"
    )


class Weights:
    """The tensors in the ``*.safetensors`` of ``folder``, by name. Reading one maps its file and copies nothing else.

    Raises ModelError if there are none, or if a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with _open(file) as reader:
                self._files |= dict.fromkeys(reader.keys(), file)
        if not self._files:
            raise ModelError(f"{folder}: no weights here; expected *.safetensors.")

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __getitem__(self, name: str) -> Tensor:
        with _open(self._files[name]) as reader:
            tensor: Tensor = reader.get_tensor(name)
            return tensor


@contextlib.contextmanager
def _open(file: Path) -> Iterator[safe_open]:
    try:
        check_safetensors(file)
        with panics(), safe_open(file, framework="pt") as reader:
            yield reader
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(machine_refusal(error, file) or f"{file}: a damaged file ({error}).") from None


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
def loading(source: Source, what: str) -> Iterator[None]:
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
        elif (refused := machine_refusal(error)) is not None:
            text = refused
        elif source.kind == "hub" and isinstance(error, OSError):
            text = f"{str(error).splitlines()[0]} {source.advice}"
        else:
            unknown = re.search(r"Unrecognized configuration class .*?(\w+)'> for this kind of AutoModel: (\w+)", text)
            text = f"{type(error).__name__}: {text[:600]}"
            if unknown:
                text = (
                    f"transformers has no {unknown[2]} of the kind {unknown[1].removesuffix('Config')}, so it "
                    "cannot have this task. Adapt it in Python (trimtab.attach), with transformers' Trainer"
                )
        origin = "" if source.location == source.name else f" from {source.location}"
        raise ModelError(f"{source.name}: the {what} cannot be loaded{origin}. {text}".rstrip()) from error
