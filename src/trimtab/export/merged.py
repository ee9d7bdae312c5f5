"""A Hugging Face model folder: what ``trimtab merge`` writes, and what any program of the ecosystem loads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from trimtab.errors import RunError
from trimtab.evaluation.generation import end_tokens
from trimtab.export._card import ASKED
from trimtab.export._carried import carry
from trimtab.export._export_format import ExportFormat, Written
from trimtab.export._older_names import save_tokenizer, use_older_names
from trimtab.export._subject import Subject
from trimtab.models.chat_template import turn_end
from trimtab.models.languages import first_of_targets
from trimtab.models.locate import Source
from trimtab.surgery.merge import merge


class MergedModel(ExportFormat):
    """Weights, tokenizer, both configurations and the base's other files in one folder."""

    summary = "a Hugging Face model folder: config.json, *.safetensors and the tokenizer"
    takes = frozenset({"dtype", "onto"})
    marks = ("config.json",)
    compared = "merged against unmerged"
    library = "transformers"
    relation = "finetune"

    def check(self, subject: Subject) -> None:
        if subject.wishes.onto == "requantised" and subject.config.quantisation == "none":
            raise RunError(
                f"{subject.folder.path}: this run is not quantised, so there is nothing to quantise again; leave out "
                "--onto"
            )

    def prepare(self, subject: Subject) -> None:
        if subject.wishes.onto == "original" and subject.config.quantisation != "none":
            subject.load_anew(quantised=False)

    def fill(self, subject: Subject, folder: Path) -> Written:
        onto, quantisation = subject.wishes.onto, subject.config.quantisation
        report = merge(subject.model, "requantised" if onto == "requantised" else "dequantised")
        told = save(subject.model, subject.tokenizer, folder, base=subject.source, chat=subject.chat)
        done = [f"merged {len(report.modules)} modules"]
        stored = str(subject.model.dtype).removeprefix("torch.")
        if quantisation != "none":
            done.append(f"the run is quantised ({quantisation}); merged onto the {onto} weights")
            stored = quantisation if onto == "requantised" else stored
        done.append(f"largest rounding of a merged weight to {stored}: {report.rounding:.1e} of its norm")
        untied = [f"{name} was tied to another module and has a weight of its own now" for name in report.untied]
        use = _PIPELINE if subject.head.problem else _USE
        return Written(done, untied + told, use.format(**_classes(subject)))


_USE = """
```python
from transformers import {model}, {reader}

{name} = {reader}.from_pretrained("THIS_FOLDER")
model = {model}.from_pretrained("THIS_FOLDER")
```

Any program that reads Hugging Face folders loads it; trimtab is not needed.
"""


_PIPELINE = """
```python
from transformers import pipeline

answer = pipeline("{asked}", "THIS_FOLDER")
```

Any program that reads Hugging Face folders loads it; trimtab is not needed.
"""


def _classes(subject: Subject) -> dict[str, str]:
    """By what the folder is loaded, in the example of its card."""
    pictures = subject.head.model_class == "AutoModelForImageClassification"
    reader, name = ("AutoImageProcessor", "processor") if pictures else ("AutoTokenizer", "tokenizer")
    asked = ASKED.get(subject.head.model_class, "")
    return {"model": subject.head.model_class, "reader": reader, "name": name, "asked": asked}


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    base: Source | None = None,
    chat: bool = False,
) -> list[str]:
    """Write into ``folder`` what transformers loads without trimtab: weights, tokenizer and both configurations, and
    what else ``base`` has besides weights (`_carried.py`). Gives what the user should know, a sentence each.

    Every token that ends an answer stands in ``generation_config.json``. After ``chat`` the chat template's end of a
    turn is also the end token of tokenizer and model, as in models that were tuned for chat.
    """
    turn = turn_end(tokenizer) if chat and model.can_generate() else None
    with _ending(model, tokenizer, turn.token if turn is not None else None):
        model.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
        if base is not None:
            use_older_names(model.config, folder, base)
        return carry(base, tokenizer, folder) if base is not None else []


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
    """While open, ``model`` generates up to any token that ends an answer, if it generates at all, and the token
    ``turn``, if there is one, ends texts."""
    if not model.can_generate():
        yield
        return
    ends = end_tokens(model, tokenizer)
    kept, texts = model.generation_config, model.config.get_text_config()
    config = _valid(kept)
    config.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)
    if (mark := first_of_targets(tokenizer)) is not None:
        config.forced_bos_token_id = mark
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
