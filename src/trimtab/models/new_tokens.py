"""Tokens that a run adds to its model's vocabulary: to the tokenizer, and as rows of the embedding and the output head.

The new rows are drawn as transformers draws them (around the mean of the old ones), and the same ones at every load.
"""

from __future__ import annotations

import glob
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from trimtab.errors import ModelError
from trimtab.surgery.adapted import bare_modules

_SEED = 0
_AT_ONCE = 1000


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Teach ``tokenizer`` each of ``tokens`` as one token. Those that it has stay what they are."""
    tokenizer.add_tokens(list(tokens))


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


def make_room(model: Any, tokens: int) -> None:
    """Give the embedding and the output head of ``model`` rows for so many ``tokens``, if they have fewer."""
    weight = model.get_input_embeddings().weight
    if tokens <= len(weight):
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)
        model.resize_token_embeddings(tokens, mean_resizing=not weight.is_meta)


def rule_for(model: Any, tokenizer: Any, tokens: Sequence[str]) -> dict[str, Any]:
    """The rule of a plan by which the rows of ``tokens`` are trained, in the embedding, the output head and whatever
    else shares their weights."""
    tables = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    weights = {id(table.weight) for table in tables}
    names = [name for name, module in bare_modules(model) if _is_one_of(module, weights)]
    rows = tokenizer.convert_tokens_to_ids(list(tokens))
    return {"match": [glob.escape(name) for name in dict.fromkeys(names)], "method": "full", "rows": rows}


def _is_one_of(module: nn.Module, weights: set[int]) -> bool:
    return isinstance(module, (nn.Embedding, nn.Linear)) and id(module._parameters.get("weight")) in weights
