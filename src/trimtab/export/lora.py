"""A PEFT folder of plain LoRA, which PEFT, vLLM, SGLang, TGI and diffusers load beside the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.adapters.formats import all_formats
from trimtab.adapters.placing import format_of
from trimtab.adapters.store import load_adapter, save_adapter
from trimtab.errors import SurgeryError
from trimtab.evaluation.agreement import Passages
from trimtab.evaluation.in_peft import in_peft
from trimtab.export._card import base_of, loaded_as
from trimtab.export._export_format import ExportFormat, Written
from trimtab.export._older_names import save_tokenizer
from trimtab.export._plain_lora import make_plain, plain_factors
from trimtab.export._subject import Subject
from trimtab.files import read_json, write_json
from trimtab.notes import Notes
from trimtab.surgery.adapted import bare
from trimtab.surgery.attach import detach

REPORT = "conversion.json"
"""The file in such a folder that says of each module what its conversion lost."""


_VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` of vLLM can be, from its default on."""


class PeftLora(ExportFormat):
    """``adapter_config.json``, ``adapter_model.safetensors`` and the tokenizer."""

    summary = "a PEFT folder of plain LoRA: adapter_config.json, adapter_model.safetensors and the tokenizer"
    takes = frozenset({"rank", "error"})
    marks = ("adapter_model.*",)  # mlx-lm's folders have an adapter_config.json, too
    library = "peft"
    relation = "adapter"

    def fill(self, subject: Subject, folder: Path) -> Written:
        plain = make_plain(subject, one_scale=True)  # vLLM passes over PEFT's alpha_pattern
        served = _served(subject.model)
        save_adapter(subject.model, folder)
        if format_of(folder).label != "PEFT":
            left = {} if plain.report is None else plain.report.kept
            raise SurgeryError(
                "PEFT has no configuration that says all of this adapter (scales of two kinds, a layer in two places "
                "or tied to another that is adapted, tensors that it does not save)"
                f"{''.join(f'; {name}: {why}' for name, why in left.items())}. `trimtab export RUN OUT --to merged` "
                "hands it over exactly"
            )
        name = base_of(subject.source)
        config = folder / all_formats()[0].files[0]
        write_json(config, read_json(config) | {"base_model_name_or_path": name})
        save_tokenizer(subject.tokenizer, folder)
        if plain.report is not None:
            write_json(folder / REPORT, plain.report.plain())
        detach(subject.model)
        load_adapter(subject.model, folder)  # what is compared with the run is what the files say
        loads = "that PEFT, vLLM and others load" if served and subject.is_causal else "that PEFT loads"
        if problem := _problem_in_peft(subject, folder):
            loads = "in PEFT's format"
        done = [*plain.done, f"wrote a LoRA {loads}"]
        return Written(done, [*plain.notes, *filter(None, [problem])], _use(subject, loaded_as(subject.source), served))


def _problem_in_peft(subject: Subject, folder: Path) -> str:
    """What PEFT does with ``folder`` but compute what was trained; empty for nothing. It leaves PEFT's layers in
    ``subject.model``, whose outputs are then those that PEFT's users get."""
    model = subject.model
    told = Passages.random(model).comparison if subject.is_causal else subject.comparison(Notes())
    if told is None or subject.config.quantisation != "none":
        return ""
    found = in_peft(model, folder, told)
    if found.problem and not found.loads:
        subject.load_anew()
        detach(subject.model)
        load_adapter(subject.model, folder)
    return found.problem


def _served(model: Any) -> str:
    """The command by which vLLM serves the folder beside BASE; empty where it has something that vLLM does not read."""
    try:
        parts = plain_factors(model, "vLLM")
    except SurgeryError:
        return ""
    highest = max(one.rank for one in parts)
    room = next((one for one in _VLLM_RANKS if highest <= one), None)
    if room is None or any(isinstance(bare(model.get_submodule(one.module)), nn.Embedding) for one in parts):
        return ""
    wider = f" --max-lora-rank {room}" if room > _VLLM_RANKS[0] else ""
    return f"With vLLM: `vllm serve BASE --enable-lora{wider} --lora-modules tuned=THIS_FOLDER`.\n"


def _use(subject: Subject, base: str, served: str) -> str:
    """The code that loads the folder. A head is made with as many labels as it has, and then filled."""
    head, options = subject.head, ""
    if head.problem:
        named = ", ".join(f"{number}: {json.dumps(name)}" for number, name in enumerate(head.names))
        options = f", num_labels={len(head.names)}, id2label={{{named}}}, ignore_mismatched_sizes=True"
    rows = 0 if not subject.config.model.add_tokens else subject.model.get_input_embeddings().weight.shape[0]
    room = "\nbase.resize_token_embeddings(len(tokenizer))" if rows and rows == len(subject.tokenizer) else ""
    pictures = head.model_class == "AutoModelForImageClassification"
    reader, name = ("AutoImageProcessor", "processor") if pictures else ("AutoTokenizer", "tokenizer")
    code = f"""
```python
from peft import PeftModel
from transformers import {head.model_class}, {reader}

{name} = {reader}.from_pretrained("THIS_FOLDER")
base = {head.model_class}.from_pretrained("BASE"{options}){room}
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
```
"""
    return (code if not subject.is_causal else f"{code}\n{served}").replace("BASE", base)
