"""A Hugging Face model folder: what ``trimtab merge`` writes, and what any program of the ecosystem loads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from trimtab.errors import ModelError, machine_refusal
from trimtab.evaluation.generation import end_tokens
from trimtab.export._carried import carry
from trimtab.export._export_format import ExportFormat
from trimtab.files import write_folder
from trimtab.models.chat_template import turn_end
from trimtab.models.load import quiet_transformers
from trimtab.models.locate import Source


class MergedModel(ExportFormat):
    """Weights, tokenizer, both configurations and the base's other files in one folder."""

    summary = "a Hugging Face model folder: config.json, *.safetensors and the tokenizer"

    def check_target(self, out: Path | str, *, overwrite: bool = False) -> Path:
        """The absolute path of ``out``, if a model folder may be written there.

        Raises:
            ModelError: ``out`` is a file, or a folder that holds something and may not be replaced.
        """
        target = Path(out).absolute()
        if target.exists() and not target.is_dir():
            raise ModelError(f"{target}: expected a folder to write the model to, found a file.")
        if target.is_dir() and any(target.iterdir()):
            if not overwrite:
                raise ModelError(f"{target}: not empty. Name a new folder, or allow it to be replaced (--overwrite).")
            if not (target / "config.json").is_file():
                raise ModelError(f"{target}: holds something other than a model, so it is not overwritten.")
        return target

    def write(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        out: Path | str,
        *,
        overwrite: bool = False,
        base: Source | None = None,
        chat: bool = False,
    ) -> list[str]:
        """Write a folder that transformers loads without trimtab: weights, tokenizer and both configurations, and what
        else ``base`` has besides weights (`_carried.py`).

        Every token that ends an answer stands in ``generation_config.json``. After ``chat`` the chat template's end of
        a turn is also the end token of tokenizer and model, as in models that were tuned for chat.

        The folder appears whole or not at all. With ``overwrite`` it replaces a model folder, and nothing else.

        Raises:
            ModelError: ``out`` is a file, or a folder that holds something; or it cannot be written.
        """
        target = self.check_target(out, overwrite=overwrite)

        told: list[str] = []
        turn = turn_end(tokenizer) if chat else None

        def fill(folder: Path) -> None:
            with _ending(model, tokenizer, turn.token if turn is not None else None):
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
                told.extend(carry(base, tokenizer, folder) if base is not None else [])

        try:
            with quiet_transformers():
                write_folder(target, fill, replace=True)
        except (OSError, SafetensorError) as error:
            needed = sum(tensor.nbytes for tensor in model.state_dict().values())
            refusal = machine_refusal(error, target, needed=needed) or f"{target}: {error}"
            raise ModelError(f"the model cannot be written: {refusal}. Nothing was left behind") from error
        return told


def _valid(config: Any) -> Any:
    """A copy that transformers agrees to write. Many models come with a temperature and without ``do_sample``, which
    only sampling can have meant; where that is not all, nothing but the tokens is kept."""
    config = copy.deepcopy(config)
    for _ in range(2):
        try:
            config.validate(strict=True)
        except ValueError:
            config.do_sample = True
        else:
            return config
    return GenerationConfig(pad_token_id=config.pad_token_id, bos_token_id=config.bos_token_id)


@contextmanager
def _ending(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, turn: int | None) -> Iterator[None]:
    """While open, ``model`` generates up to any token that ends an answer, and the token ``turn``, if there is one,
    ends texts."""
    ends = end_tokens(model, tokenizer)
    kept, texts = model.generation_config, model.config.get_text_config()
    config = _valid(kept)
    config.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)
    config.update(_from_model_config=False)  # transformers 4 would make one of config.json again, with its one end
    before = tokenizer.eos_token, getattr(texts, "eos_token_id", None)
    model.generation_config = config
    try:
        if turn is not None:
            tokenizer.eos_token, texts.eos_token_id = tokenizer.convert_ids_to_tokens(turn), turn
        yield
    finally:
        model.generation_config = kept
        if turn is not None:
            tokenizer.eos_token, texts.eos_token_id = before
