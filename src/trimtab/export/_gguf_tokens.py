"""What a GGUF file says of its tokens, where a run changed them: new tokens, another template, the end of a turn."""

from __future__ import annotations

from typing import Any

from trimtab.errors import ModelError
from trimtab.export._gguf_file import GgufFile
from trimtab.models.chat_template import turn_end

_CONTROL, _USER, _UNUSED = 3, 4, 5  # llama.cpp's types of token


def head_fields(file: GgufFile, tokenizer: Any, model: Any, *, chat: bool) -> dict[str, Any]:
    """The fields of the file's head that differ after the run. Raises ModelError if a token cannot be added."""
    fields: dict[str, Any] = {}
    template = tokenizer.chat_template
    if isinstance(template, str) and template != file.field("tokenizer.chat_template"):
        fields["tokenizer.chat_template"] = template
    turn = turn_end(tokenizer) if chat else None
    if turn is not None and turn.token is not None and turn.token != file.field("tokenizer.ggml.eos_token_id"):
        fields["tokenizer.ggml.eot_token_id"] = turn.token
    return fields | _grown(file, tokenizer, int(model.get_input_embeddings().weight.shape[0]))


def _grown(file: GgufFile, tokenizer: Any, rows: int) -> dict[str, Any]:
    """The lists of tokens with those that the embedding has more."""
    tokens = file.field("tokenizer.ggml.tokens")
    if tokens is None or rows <= len(tokens):
        return {}
    words = {token: word for word, token in tokenizer.get_added_vocab().items()}
    special = set(tokenizer.all_special_ids)
    types, added = [], []
    for token in range(len(tokens), rows):
        added.append(words.get(token, f"[UNUSED{token}]"))
        types.append(_UNUSED if token not in words else _CONTROL if token in special else _USER)
    if clash := set(added) & set(tokens):
        raise ModelError(f"{file.path}: the new token {sorted(clash)[0]} is in the file already")
    fields: dict[str, Any] = {"tokenizer.ggml.tokens": [*tokens, *added]}
    for name, more in (("token_type", types), ("scores", [-1000.0] * len(added))):
        if (held := file.field(f"tokenizer.ggml.{name}")) is not None:
            fields[f"tokenizer.ggml.{name}"] = [*held, *more]
    if file.field(f"{file.architecture}.vocab_size") is not None:
        fields[f"{file.architecture}.vocab_size"] = rows
    return fields
