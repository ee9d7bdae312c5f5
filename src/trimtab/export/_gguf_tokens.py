"""What a GGUF file says of its tokens, where a run changed them: new tokens, another template, the end of a turn."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from trimtab.errors import ModelError
from trimtab.export._gguf_file import GgufFile
from trimtab.models.chat_template import turn_end

_CONTROL, _USER, _UNUSED = 3, 4, 5  # llama.cpp's types of token


def head_fields(file: GgufFile, tokenizer: Any, model: Any, *, chat: bool, new: Collection[str]) -> dict[str, Any]:
    """The fields of the file's head that differ after the run, which added the tokens ``new``. Raises ModelError if a
    token cannot be added."""
    fields: dict[str, Any] = {}
    template = tokenizer.chat_template
    if isinstance(template, str) and template != file.field("tokenizer.chat_template"):
        fields["tokenizer.chat_template"] = template
    turn = turn_end(tokenizer) if chat else None
    if turn is not None and turn.token is not None and turn.token != file.field("tokenizer.ggml.eos_token_id"):
        fields["tokenizer.ggml.eot_token_id"] = turn.token
    return fields | _grown(file, tokenizer, int(model.get_input_embeddings().weight.shape[0]), new)


def _grown(file: GgufFile, tokenizer: Any, rows: int, new: Collection[str]) -> dict[str, Any]:
    """The lists of tokens with those that are new, in rows that the embedding had to spare, or behind all others."""
    tokens = file.field("tokenizer.ggml.tokens")
    if tokens is None:
        return {}
    own = tokenizer.get_added_vocab()
    words = {token: word for word, token in own.items() if token >= len(tokens) or word in new}
    named = {token: words.get(token, f"[UNUSED{token}]") for token in {*words, *range(len(tokens), rows)}}
    named = {token: word for token, word in named.items() if [word] != tokens[token : token + 1]}
    if not named:
        return {}
    if clash := set(named.values()) & set(tokens):
        raise ModelError(f"{file.path}: the new token {sorted(clash)[0]} is in the file already")
    special = set(tokenizer.all_special_ids)
    kinds = {token: _UNUSED if token not in words else _CONTROL if token in special else _USER for token in named}
    found: dict[str, Any] = {"tokenizer.ggml.tokens": _with(tokens, named)}
    for name, values in (("token_type", kinds), ("scores", dict.fromkeys(named, -1000.0))):
        if (held := file.field(f"tokenizer.ggml.{name}")) is not None:
            found[f"tokenizer.ggml.{name}"] = _with(held, values)
    if rows > len(tokens) and file.field(f"{file.architecture}.vocab_size") is not None:
        found[f"{file.architecture}.vocab_size"] = rows
    return found


def _with(held: list[Any], values: dict[int, Any]) -> list[Any]:
    """``held`` with ``values`` at their places, of which those behind its end follow each other."""
    return [values.get(at, one) for at, one in enumerate(held)] + [
        value for at, value in sorted(values.items()) if at >= len(held)
    ]
