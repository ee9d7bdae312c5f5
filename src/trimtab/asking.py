"""A model is asked, and its answer comes token by token: once, or in a conversation that is kept.

    conversation = Conversation(Asked(model, tokenizer), Drawing(max_new_tokens=200), system="You are a clerk.")
    conversation.ask("Is berth seven free?", say=lambda text: print(text, end="", flush=True))

Prompts are those of the training rows: the same template, the same tokens. What the model computed for earlier turns is
kept, so that a turn costs its own tokens and not those of the whole conversation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.generation.streamers import BaseStreamer

from trimtab.data.detokenizer import Detokenizer, before_stops
from trimtab.data.tokens import encode_prompt
from trimtab.errors import DataError
from trimtab.evaluation.generation import end_tokens
from trimtab.models.chat_template import spelled_end
from trimtab.models.earlier_tokens import cache_argument, with_cache
from trimtab.models.positions import positions_of
from trimtab.questions import Message, rendered, system_message
from trimtab.surgery.contexts import for_inference

Say = Callable[[str], None]


@dataclass(frozen=True)
class Drawing:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: the longest answer.
        temperature: 0 takes the likeliest token, always; higher is freer.
        top_p: above temperature 0, only the likeliest tokens that have this share together are drawn from.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0

    def settings(self, ends: list[int], pad: int | None, room: int) -> GenerationConfig:
        """In transformers' words; what came with the model (penalties, limits) has no part in it."""
        drawn = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=min(self.max_new_tokens, room),
            num_beams=1,
            use_cache=True,
            eos_token_id=ends or None,
            pad_token_id=pad if pad is not None else (ends[0] if ends else 0),
            **(drawn if self.temperature > 0 else {"do_sample": False}),
        )


@dataclass(frozen=True)
class Answer:
    """What the model wrote.

    Attributes:
        text: without special tokens.
        tokens: how many it wrote, an end token among them.
        ended: whether it came to its end by itself, before the limit of tokens.
        stopped: whether the user stopped it.
        full: whether it used up the model's positions.
        read: tokens that were computed before the first new one; those that were kept from before are not among them.
    """

    text: str
    tokens: int
    ended: bool
    stopped: bool
    full: bool
    read: int


class Asked:
    """A model that writes. It keeps what it computed for its last text, and goes on from the part that comes again."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.ends, self._spelled = end_tokens(model, tokenizer), spelled_end(tokenizer)
        self.positions = positions_of(model).limit() or sys.maxsize
        self._cache: DynamicCache | None = None
        self._seen: list[int] = []

    def encode(self, prompt: str) -> list[int]:
        """The tokens of ``prompt``. Raises DataError if there is none, or if no position is left for an answer."""
        ids = encode_prompt(prompt, self.tokenizer)
        if not ids:
            raise DataError("the prompt is empty: there is nothing to go on from")
        if len(ids) >= self.positions:
            raise DataError(
                f"the prompt has {len(ids)} tokens, and the model has {self.positions} positions; shorten it"
            )
        return ids

    def write(self, prompt: str, drawing: Drawing, say: Say) -> Answer:
        """Go on from ``prompt``. ``say`` is given the text as it comes, never half a character.

        A KeyboardInterrupt ends the answer there, and what was said so far is the answer.

        Raises DataError as ``encode`` does.
        """
        ids = self.encode(prompt)
        room = self.positions - len(ids)
        kept = self._keep(ids)
        speaking = _Speaking(self.tokenizer, self.ends, say, self._spelled)
        batch = torch.tensor([ids], device=self.model.device)
        stopped, whole_passes = False, False
        try:
            with torch.inference_mode(), for_inference(self.model), self._set_to(drawing, room) as settings:
                self.model.generate(
                    batch,
                    attention_mask=torch.ones_like(batch),
                    generation_config=settings,
                    streamer=speaking,
                    stopping_criteria=StoppingCriteriaList([_Over(speaking)]),
                    **with_cache(self.model, self._cache),
                )
            whole_passes = True
        except KeyboardInterrupt:
            stopped = True
            speaking.finish()
        finally:
            # The last token was written and not read; before the first, only what was kept is whole.
            whole = len(ids) + len(speaking.ids) - 1 if speaking.ids else kept
            self._seen = [*ids, *speaking.ids][:whole]
            self._trim(whole, torn=not whole_passes)
        ended = speaking.over or (bool(speaking.ids) and speaking.ids[-1] in self.ends)
        written = len(speaking.ids)
        return Answer(speaking.text, written, ended, stopped, full=written == room, read=len(ids) - kept)

    def _keep(self, ids: list[int]) -> int:
        """Make the cache hold the beginning of ``ids`` and nothing else; gives how many tokens it holds."""
        pairs = zip(self._seen, ids[:-1], strict=False)
        same = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(self._seen), len(ids) - 1))
        if not self._trim(same):
            self._cache, same = None, 0
        if self._cache is None:
            self._cache = self._new_cache()
        self._seen = self._seen[:same]
        return same if self._cache is not None else 0

    def _new_cache(self) -> DynamicCache | None:
        """A cache that knows how many tokens it holds; None for a model whose own generate() has to make it, such as
        MiniMax's, and for one whose layers all sum up what they have seen, as Mamba's."""
        if cache_argument(self.model) is None or not self.model._supports_default_dynamic_cache():
            return None
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        return cache if any(isinstance(layer, CacheLayerMixin) for layer in cache.layers) else None

    def _trim(self, length: int, *, torn: bool = False) -> bool:
        """Shorten the cache to ``length`` tokens; whether that could be done. States that sum up all they have seen,
        and windows that have moved on, cannot go back; ``torn``: a pass was interrupted, so that some of its layers may
        have moved on and others not."""
        if self._cache is None:
            return not length
        layers = [layer for layer in self._cache.layers if type(layer) is DynamicLayer]
        if len(layers) < len(self._cache.layers):
            if not torn and self._cache.get_seq_length() == length:
                return True
            self._cache, self._seen = None, []
            return False
        for layer in layers:  # an interrupt may have come between two layers, so each is cut by itself
            if layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]
        return True

    @contextmanager
    def _set_to(self, drawing: Drawing, room: int) -> Iterator[GenerationConfig]:
        settings = drawing.settings(self.ends, self.tokenizer.pad_token_id, room)
        # generate() would take everything that this leaves open, such as penalties, from the model's own settings.
        kept, self.model.generation_config = self.model.generation_config, settings
        try:
            yield settings
        finally:
            self.model.generation_config = kept


class _Speaking(BaseStreamer):
    """Says the text of tokens as they come, up to the text ``end``, if that is not empty."""

    def __init__(self, tokenizer: Any, ends: list[int], say: Say, end: str = "") -> None:
        self.text, self.over = "", False
        self._spelled, self._say, self._stops = Detokenizer(tokenizer, ends), say, (end,) if end else ()
        self._held = ""  # what may be the beginning of the end
        self._prompted = False

    @property
    def ids(self) -> list[int]:
        """All tokens so far."""
        return self._spelled.ids

    def put(self, value: torch.Tensor) -> None:
        if self._prompted:  # the first that comes is the prompt
            self._tell(self._spelled.add(*value.flatten().tolist()))
        self._prompted = True

    def end(self) -> None:
        self.finish()

    def finish(self) -> None:
        """Say what was held back, too."""
        self._tell(self._spelled.finish(), last=True)

    def _tell(self, text: str, *, last: bool = False) -> None:
        if self.over:
            return
        self._held += text
        sure, self.over = before_stops(self._held, self._stops, last=last)
        told, self._held = self._held[:sure], self._held[sure:]
        if told:
            self.text += told
            self._say(told)


class _Over(StoppingCriteria):
    """Stops where what is said has come to its end."""

    def __init__(self, speaking: _Speaking) -> None:
        self._speaking = speaking

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        return torch.full((input_ids.shape[0],), self._speaking.over, device=input_ids.device, dtype=torch.bool)


class Conversation:
    """Turns of a user and a model.

    Attributes:
        messages: what was said, without the system message.
        system: the system message; None for none.
        left_out: how many of the earliest messages the model no longer reads, because all together have no room.
    """

    def __init__(self, asked: Asked, drawing: Drawing, system: str | None = None) -> None:
        self._asked = asked
        self._drawing = drawing
        self.system = system
        self.messages: list[Message] = []
        self.left_out = 0

    def ask(self, text: str, say: Say) -> Answer:
        """The user says ``text``; the answer is said as it comes, and both are kept unless it is empty.

        Where all turns together have no room in the model's positions, the earliest are left out of what it reads.

        Raises DataError if even this turn alone has no room, or if the template refuses it; nothing is kept then.
        """
        asking: Message = {"role": "user", "content": text}
        prompt, self.left_out = self._fitting([*self.messages, asking])
        answer = self._asked.write(prompt, self._drawing, say)
        answer = replace(answer, text=answer.text.strip())
        if answer.text:
            self.messages += [asking, {"role": "assistant", "content": answer.text}]
        return answer

    def undo(self) -> bool:
        """Take the last turn back, what was asked and the answer; whether there was one."""
        there = bool(self.messages)
        del self.messages[-2:]
        self.left_out = min(self.left_out, len(self.messages))
        return there

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.messages.clear()
        self.left_out = 0

    def row(self) -> dict[str, list[Message]]:
        """The conversation as a row to train on."""
        return {"messages": [*system_message(self.system), *self.messages]}

    def _fitting(self, messages: list[Message]) -> tuple[str, int]:
        """The prompt of as many of the latest turns as fit, and how many messages are left out of it."""
        positions, tokenizer = self._asked.positions, self._asked.tokenizer
        room = positions - min(self._drawing.max_new_tokens, positions // 4)
        last = len(messages) - 1
        for start in range(self.left_out, last + 1, 2):
            prompt = rendered(messages[start:], tokenizer, self.system)
            tokens = len(encode_prompt(prompt, tokenizer))
            # What is left has to be computed anew; a quarter is made free at once, so that it is not so at every turn.
            if tokens <= (room if start == self.left_out else room * 3 // 4) or (start == last and tokens < positions):
                return prompt, start
        raise DataError(
            f"this turn has {tokens:,} tokens{' with the system message' if self.system else ''}, and the model has "
            f"{positions:,} positions; say it in fewer words"
        )
