"""Every model class that the auto mappings of transformers name, once, with the mappings that name it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

from transformers.models.auto import modeling_auto

# Lists of what other lists have, under another head; the base model alone counts where nothing else has its kind.
_HEADS = {
    f"MODEL_FOR_{kind}"
    for kind in ("TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "MULTIPLE_CHOICE", "NEXT_SENTENCE_PREDICTION")
}
"""Not looked at: one more linear layer on bodies that other mappings have."""
_TWICE = {"MODEL_FOR_PRETRAINING", "MODEL_FOR_BACKBONE", "MODEL_FOR_TEXT_ENCODING", "MODEL_FOR_IMAGE", "MODEL"}


@dataclass
class Listed:
    """A class of models: its name, the ``model_type`` of its configuration, and the mappings it is in."""

    name: str
    model_type: str
    mappings: list[str] = field(default_factory=list)


@cache
def architectures() -> dict[str, Listed]:
    """By the name of the class, in the order of the mappings."""
    tables = {
        name.removesuffix("_MAPPING_NAMES"): name for name in dir(modeling_auto) if name.endswith("_MAPPING_NAMES")
    }
    tables = {short: name for short, name in tables.items() if short.startswith("MODEL") and short not in _HEADS}
    listed: dict[str, Listed] = {}
    kinds: set[str] = set()
    for short in sorted(tables, key=lambda short: (short in _TWICE, short == "MODEL", short)):
        for model_type, names in getattr(modeling_auto, tables[short]).items():
            if short in _TWICE and model_type in kinds:
                continue
            for name in [names] if isinstance(names, str) else names:
                one = listed.setdefault(name, Listed(name, model_type))
                title = short.removeprefix("MODEL_").removeprefix("FOR_").lower().replace("_", " ")
                if title not in one.mappings:
                    one.mappings.append("base model" if title == "model" else title)
        if short != "MODEL":
            kinds |= set(getattr(modeling_auto, tables[short]))
    return listed
