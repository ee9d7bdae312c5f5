"""A Hugging Face model folder: what ``trimtab merge`` writes, and what any program of the ecosystem loads."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab.errors import ModelError, machine_refusal
from trimtab.export._export_format import ExportFormat
from trimtab.files import write_folder
from trimtab.models.load import quiet_transformers


class MergedModel(ExportFormat):
    """Weights, tokenizer, configuration and generation configuration in one folder."""

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
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path | str, *, overwrite: bool = False
    ) -> None:
        """Write a folder that transformers loads without trimtab: weights, tokenizer and both configurations.

        The folder appears whole or not at all. With ``overwrite`` it replaces a model folder, and nothing else.

        Raises:
            ModelError: ``out`` is a file, or a folder that holds something; or it cannot be written.
        """
        target = self.check_target(out, overwrite=overwrite)

        def fill(folder: Path) -> None:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

        try:
            with quiet_transformers():
                write_folder(target, fill, replace=True)
        except (OSError, SafetensorError) as error:
            needed = sum(tensor.nbytes for tensor in model.state_dict().values())
            refusal = machine_refusal(error, target, needed=needed) or f"{target}: {error}"
            raise ModelError(f"the model cannot be written: {refusal}. Nothing was left behind") from error
