"""A model's answer on the terminal, word by word as it comes."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase, TextStreamer

from trimtab.errors import printable


class AnswerStreamer(TextStreamer):
    """Prints the answer alone, without the prompt and the special tokens. What a model writes cannot drive the
    terminal."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(printable(text), stream_end)
