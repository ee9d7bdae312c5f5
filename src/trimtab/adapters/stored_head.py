"""What a model answers with, kept with its adapter: the class of transformers that has the head, and the head's labels.

PEFT says the class by ``task_type``, and no labels. Ours stand in the header of the tensors, which PEFT ignores, as
``"trimtab_head": {"model_class": ..., "problem": ..., "labels": [...]}``.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from trimtab.adapters.safe_read import damage_in, parse_description, read_description
from trimtab.errors import AdapterError, machine_refusal
from trimtab.reading import check_safetensors, panics
from trimtab.surgery.wrappers import without_wrappers

_KEY = "trimtab_head"
# By how the names of a model's classes go on: what PEFT calls the task, and the class of transformers. PEFT has no name
# for the classification of images.
_TASKS: dict[str, tuple[str | None, str]] = {
    "ForSequenceClassification": ("SEQ_CLS", "AutoModelForSequenceClassification"),
    "ForTokenClassification": ("TOKEN_CLS", "AutoModelForTokenClassification"),
    "ForQuestionAnswering": ("QUESTION_ANS", "AutoModelForQuestionAnswering"),
    "ForImageClassification": (None, "AutoModelForImageClassification"),
    "ForCausalLM": ("CAUSAL_LM", "AutoModelForCausalLM"),
    "LMHeadModel": ("CAUSAL_LM", "AutoModelForCausalLM"),
}
_HEADS = {
    **dict.fromkeys(("SEQ_CLS", "TOKEN_CLS"), ("classifier", "score")),
    "QUESTION_ANS": ("qa_outputs",),
}
_WRITES_ANEW = ("SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM")


class StoredHead(NamedTuple):
    """What an adapter says of the model that it is for.

    Attributes:
        model_class: of transformers, such as ``AutoModelForSequenceClassification``.
        problem: as transformers names it; empty where nothing is said.
        labels: of the head, in its order; empty where nothing is said, or for a regression.
    """

    model_class: str
    problem: str = ""
    labels: tuple[str, ...] = ()


def task_type(model: Any, saved: Collection[str]) -> str | None:
    """What PEFT calls the task of ``model``, of which the modules ``saved`` are kept whole. Its class decides, since
    the configuration of a bare LlamaModel also names a causal model ("architectures").

    Where PEFT hears of a classification it expects every module called as heads are to be among those that are saved;
    an adapter without them is of no task.
    """
    kind = _task_of(model)[0]
    names = (without_wrappers(model, name) for name, _ in model.named_modules())
    expected = (name for name in names if name.rpartition(".")[2] in _HEADS.get(kind or "", ()))
    return kind if all(any(name == one or name.endswith(f".{one}") for one in saved) for name in expected) else None


def head_header(model: Any) -> dict[str, str]:
    """What the header of the tensors says of a model that was read for labels of its own; nothing for another."""
    config: Any = getattr(model, "config", None)
    problem, model_class = getattr(config, "problem_type", None), _task_of(model)[1]
    if not problem or model_class is None:
        return {}
    named = config.id2label if problem != "regression" else {}
    labels = [str(named[number]) for number in sorted(named)]
    return {_KEY: json.dumps({"model_class": model_class, "problem": problem, "labels": labels}, ensure_ascii=False)}


def read_head(description: Path, tensors: Path) -> StoredHead | None:
    """What the adapter of these two files says of the model that it is for; None if it says nothing.

    Raises AdapterError for a damaged file.
    """
    try:
        check_safetensors(tensors)
        with panics(), safe_open(tensors, framework="pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        message = machine_refusal(error, tensors) or f"{tensors}: a damaged safetensors file ({error})"
        raise AdapterError(message) from None
    if _KEY in header:
        with damage_in(tensors, "header"):
            said = parse_description(header[_KEY])
            return StoredHead(str(said["model_class"]), str(said["problem"]), tuple(map(str, said["labels"])))
    kind = read_description(description).get("task_type")
    known = dict([*_TASKS.values(), _WRITES_ANEW])
    return StoredHead(known[kind]) if isinstance(kind, str) and kind in known else None


def _task_of(model: Any) -> tuple[str | None, str | None]:
    name = type(model).__name__
    writes = "ForConditionalGeneration" in name or name.endswith("MTModel")  # Marian's is called so
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and writes:
        return _WRITES_ANEW
    return next((task for end, task in _TASKS.items() if name.endswith(end)), (None, None))
