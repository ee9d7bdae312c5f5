"""Which language a text is in, for the tokenizers that mark texts with it (mBART, M2M100, NLLB, PLBart)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from trimtab.errors import ConfigError, did_you_mean


def mark(tokenizer: Any, source: str, target: str) -> None:
    """Let ``tokenizer`` mark sources as ``source`` and targets as ``target``, in its files, too.

    Raises ConfigError where it marks no languages, or does not know one of these.
    """
    if not hasattr(tokenizer, "src_lang"):
        raise ConfigError(
            "model.source_language: this tokenizer marks no languages (those of mBART, M2M100, NLLB and PLBart do); "
            "leave it and target_language out"
        )
    for key, language in (("source_language", source), ("target_language", target)):
        if _token(tokenizer, language) is None:
            near = did_you_mean(language, _languages(tokenizer))
            raise ConfigError(f"model.{key}: the tokenizer has no language '{language}'.{near}")
    tokenizer.tgt_lang, tokenizer.src_lang = target, source
    tokenizer.init_kwargs.update(src_lang=source, tgt_lang=target)  # what is saved of it


def first_of_targets(tokenizer: Any) -> int | None:
    """The token that marks the language of a target, where the target language is known and the mark stands first."""
    language = getattr(tokenizer, "tgt_lang", None)
    if language is None:
        return None
    token = _token(tokenizer, language)
    return token if tokenizer(text_target="a")["input_ids"][0] == token else None


def _token(tokenizer: Any, language: str) -> int | None:
    named = getattr(tokenizer, "lang_code_to_token", None)
    found: int | None = tokenizer.get_vocab().get(language if named is None else named.get(language))
    return found


def _languages(tokenizer: Any) -> Collection[str]:
    for name in ("lang_code_to_token", "lang_code_to_id"):
        if known := getattr(tokenizer, name, None):
            return list(known)
    return [word for word in tokenizer.all_special_tokens if "_" in word]
