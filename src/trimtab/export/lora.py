"""A PEFT folder of plain LoRA, which PEFT, vLLM, SGLang, TGI and diffusers load beside the base."""

from __future__ import annotations

from pathlib import Path

from trimtab.adapters.formats import all_formats
from trimtab.adapters.store import format_of, load_adapter, save_adapter
from trimtab.errors import SurgeryError
from trimtab.export._card import base_of
from trimtab.export._export_format import ExportFormat, Written
from trimtab.export._plain_lora import make_plain
from trimtab.export._subject import Subject
from trimtab.files import read_json, write_json
from trimtab.models.locate import hub_id
from trimtab.surgery.attach import detach

REPORT = "conversion.json"
"""The file in such a folder that says of each module what its conversion lost."""


class PeftLora(ExportFormat):
    """``adapter_config.json``, ``adapter_model.safetensors`` and the tokenizer."""

    summary = "a PEFT folder of plain LoRA: adapter_config.json, adapter_model.safetensors and the tokenizer"
    takes = frozenset({"rank", "error"})
    marks = ("adapter_config.json",)
    library = "peft"
    relation = "adapter"

    def fill(self, subject: Subject, folder: Path) -> Written:
        plain = make_plain(subject)
        save_adapter(subject.model, folder)
        if format_of(folder).label != "PEFT":
            left = {} if plain.report is None else plain.report.kept
            raise SurgeryError(
                "PEFT has no configuration that says all of this adapter (scales of two kinds, a layer in two places "
                "or tied to another that is adapted, tensors that it does not save)"
                f"{''.join(f'; {name}: {why}' for name, why in left.items())}. `trimtab export RUN OUT --to merged` "
                "hands it over exactly"
            )
        name = hub_id(subject.source) or base_of(subject.source)
        config = folder / all_formats()[0].files[0]
        write_json(config, read_json(config) | {"base_model_name_or_path": name})
        subject.tokenizer.save_pretrained(folder)
        if plain.report is not None:
            write_json(folder / REPORT, plain.report.plain())
        detach(subject.model)
        load_adapter(subject.model, folder)  # what is compared with the run is what the files say
        done = [*plain.done, "wrote a LoRA that PEFT, vLLM and others load"]
        return Written(done, plain.notes, _USE.replace("BASE", name))


_USE = """
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
base = AutoModelForCausalLM.from_pretrained("BASE")
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
```

With vLLM: `vllm serve BASE --enable-lora --lora-modules tuned=THIS_FOLDER`.
"""
