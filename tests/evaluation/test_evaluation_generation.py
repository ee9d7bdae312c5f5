"""Greedy answers: a chain whose every step is known, and random models against a plain loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from evaluation_cases import example, gpt2, llama, markov_chain
from trimtab.data.rows import Example
from trimtab.errors import DataError, ModelError
from trimtab.evaluation import generation
from trimtab.evaluation.generation import Generated, same_answer
from trimtab.surgery.contexts import evaluating
from trimtab.tasks import Head

Make = Callable[..., list[Example]]


def generate_answers(head: Head, *inputs: Any, **settings: Any) -> list[Generated]:
    """As `evaluate` calls it."""
    with evaluating(head.model):
        return generation.generate_answers(head, *inputs, **settings)


def token(tokenizer: Any, text: str) -> int:
    (found,) = tokenizer(text)["input_ids"]
    return int(found)


def test_stops_at_an_end_token_and_tells_what_is_unusable(tokenizer: Any) -> None:
    """A row that ends, one that says nothing, one that goes on for ever, one that the chat's own token ends."""
    t = {text: token(tokenizer, text) for text in (":", "?", "!", ".", " good", " bad", " plain", "\n")}
    end, stop = tokenizer.eos_token_id, token(tokenizer, "<|stop|>")
    chain = {
        t[":"]: t[" good"],
        t[" good"]: t["\n"],
        t["\n"]: end,
        t["?"]: end,
        t["!"]: t[" bad"],
        t[" bad"]: t[" bad"],
        t["."]: t[" plain"],
        t[" plain"]: stop,
    }
    model = markov_chain(tokenizer, chain)
    model.generation_config.eos_token_id = [stop]
    prompts = ["the first one:", "the second and the longest?", "third!", "four."]
    rows = [example(prompt + " ", "good", number + 1) for number, prompt in enumerate(prompts)]
    found = generate_answers(Head(model), tokenizer, rows, max_new_tokens=4)
    assert found == [
        Generated("good", True),
        Generated("", False),
        Generated("bad bad bad bad", False),
        Generated("plain", True),
    ]
    # An answer whose end token is the last one allowed has come to its end.
    assert generate_answers(Head(model), tokenizer, rows[:1], max_new_tokens=3) == [Generated("good", True)]
    assert generate_answers(Head(model), tokenizer, rows[:1], max_new_tokens=2) == [Generated("good", False)]


def test_the_models_own_sampling_and_penalties_are_put_aside(tokenizer: Any) -> None:
    good, bad, colon = (token(tokenizer, text) for text in (" good", " bad", ":"))
    model = markov_chain(tokenizer, {colon: good, good: good})
    with torch.no_grad():  # the second best, which a penalty on what was said would make the best
        model.lm_head.weight[bad, good] = 0.5
    own = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, min_new_tokens=9, eos_token_id=0, num_beams=3
    )
    model.generation_config = own
    rows = [example("so: ", "good")]
    assert generate_answers(Head(model), tokenizer, rows, max_new_tokens=3)[0].text == "good good good"
    assert model.generation_config is own


def slowly(model: Any, tokenizer: Any, row: Example, limit: int) -> str:
    """Greedy decoding without cache or padding."""
    ids = tokenizer(row.prompt.rstrip(" "))["input_ids"]
    written: list[int] = []
    with torch.no_grad():
        while len(written) < limit:
            best = int(model(torch.tensor([ids + written])).logits[0, -1].argmax())
            if best == tokenizer.eos_token_id:
                break
            written.append(best)
    return str(tokenizer.decode(written, skip_special_tokens=True)).strip()


@pytest.mark.parametrize("make", [llama, gpt2])
def test_equals_a_plain_loop_at_any_batch_size(
    monkeypatch: pytest.MonkeyPatch, make: Any, tokenizer: Any, questions: Make
) -> None:
    """Also with ties left alone: padding on the left, its mask and the positions must be right by themselves."""
    monkeypatch.setattr(Head, "tie_margin", 0.0)
    model, rows = make(), questions(["good"], 9)
    exact = copy.deepcopy(model).double()
    expected = [slowly(exact, tokenizer, row, 8) for row in rows]
    assert len(set(expected)) > 5, "a test where all rows say the same shows nothing"
    for size in (1, 3, 16):
        found = generate_answers(Head(model), tokenizer, rows, max_new_tokens=8, batch_size=size)
        assert [answer.text for answer in found] == expected


def test_near_ties_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch, tokenizer: Any, questions: Make) -> None:
    """A head that is off by up to 0.3 in a batch, as in bfloat16, must not change a single answer."""
    model, rows = llama(initializer_range=0.07), questions(["good"], 12)
    exact = [slowly(model, tokenizer, row, 8) for row in rows]

    def disturb(_: Any, inputs: Any, output: Tensor) -> Tensor | None:
        if output.dim() != 3 or inputs[0].shape[0] == 1:
            return None
        return output + 0.6 * torch.rand(output.shape, generator=torch.Generator().manual_seed(output.shape[0])) - 0.3

    model.lm_head.register_forward_hook(disturb)
    head = Head(model)
    assert head.sparse
    monkeypatch.setattr(Head, "tie_margin", 0.0)
    assert [answer.text for answer in generate_answers(head, tokenizer, rows, max_new_tokens=8)] != exact
    monkeypatch.setattr(Head, "tie_margin", 0.625)
    for size in (3, 16):
        found = generate_answers(head, tokenizer, rows, max_new_tokens=8, batch_size=size)
        assert [answer.text for answer in found] == exact


def test_bfloat16_is_the_same_at_any_batch_size(tokenizer: Any, questions: Make) -> None:
    head, rows = Head(llama().bfloat16()), questions(["good"], 12)
    alone, three, sixteen = (
        generate_answers(head, tokenizer, rows, max_new_tokens=8, batch_size=size) for size in (1, 3, 16)
    )
    assert alone == three == sixteen


class Largest(TorchDispatchMode):
    """Notes how many elements the largest copy has."""

    def __init__(self) -> None:
        super().__init__()
        self.copied = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.clone.default):
            self.copied = max(self.copied, max(one.numel() for one in (found, *args) if isinstance(one, Tensor)))
        return found


def test_a_frozen_head_is_not_copied_for_every_row(tokenizer: Any, questions: Make) -> None:
    model = llama().requires_grad_(False)
    with Largest() as largest:
        generate_answers(Head(model), tokenizer, questions(["good"], rows=8), max_new_tokens=2, batch_size=8)
    assert 0 < largest.copied < 8 * model.lm_head.weight.numel()
    assert not model.lm_head._forward_pre_hooks


def test_long_prompts_lose_their_beginning(tokenizer: Any) -> None:
    model = llama()
    row = example("News: " + "the profit rose and the firm fell " * 9 + "\nAnswer: ", "good")
    kept = tokenizer(row.prompt.rstrip(" "))["input_ids"][-22:]
    cut = tokenizer.decode(kept)
    assert tokenizer(cut)["input_ids"] == kept
    found = generate_answers(Head(model), tokenizer, [row], max_new_tokens=8, max_length=30)
    assert found[0].text == slowly(model, tokenizer, example(cut, "good"), 8)
    with pytest.raises(DataError, match=r"row 1: 30 new tokens leave no room"):
        generate_answers(Head(model), tokenizer, [row], max_new_tokens=30, max_length=30)


def test_an_empty_prompt_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl, row 4: the prompt is empty"):
        generate_answers(Head(llama()), tokenizer, [example("", "good", 4)])


def test_progress_counts_rows(tokenizer: Any, questions: Make) -> None:
    steps: list[tuple[int, int]] = []
    generate_answers(
        Head(llama()),
        tokenizer,
        questions(["good"], 7),
        max_new_tokens=2,
        batch_size=4,
        progress=lambda done, of: steps.append((done, of)),
    )
    assert steps == [(4, 7), (7, 7)]


def test_a_match_is_exact_but_for_space_and_case() -> None:
    assert same_answer(" The  answer\n is 4 ", "the answer is 4")
    assert same_answer("STRASSE", "Straße")
    assert not same_answer("the answer is 4.", "the answer is 4")
    assert not same_answer("theanswer", "the answer")
    assert not same_answer("", "4")


TURNS = "{% for m in messages %}{{ m.role + ': ' + m.content + END + '\n' }}{% endfor %}"


def test_the_end_of_a_turn_in_the_template_stops_an_answer_and_is_no_part_of_it(tokenizer: Any) -> None:
    """Layout of a base model: tokenizer and model end a text otherwise than the template ends a turn."""
    colon, good, stop = (token(tokenizer, text) for text in (":", " good", "<|stop|>"))
    model = markov_chain(tokenizer, {colon: good, good: stop, stop: good})
    chat = copy.deepcopy(tokenizer)
    rows = [example("the first one: ", "good")]
    assert not generate_answers(Head(model), chat, rows, max_new_tokens=4)[0].usable
    chat.chat_template = TURNS.replace("END", "'<|stop|>'")
    assert generate_answers(Head(model), chat, rows, max_new_tokens=4) == [Generated("good", True)]
    assert generation.end_tokens(model, chat) == sorted({chat.eos_token_id, stop})


def test_an_end_that_the_template_spells_in_letters_is_no_part_of_the_answer(tokenizer: Any) -> None:
    colon, good, bad = (token(tokenizer, text) for text in (":", " good", " bad"))
    model = markov_chain(tokenizer, {colon: good, good: bad, bad: tokenizer.eos_token_id})
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = TURNS.replace("END", "' bad'")
    assert generate_answers(Head(model), chat, [example("one: ", "good")]) == [Generated("good", True)]


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_static_cache_changes_no_answer(make: Callable[..., Any], tokenizer: Any) -> None:
    head = Head(make(len(tokenizer)))
    rows = [
        example(text + " ", "good", number + 1) for number, text in enumerate(["one:", "the second row:", "third!"])
    ]
    wanted = generate_answers(head, tokenizer, rows, max_new_tokens=6)
    asked = []
    plain = head.model.generate

    def seen(**said: Any) -> Any:
        asked.append((said["input_ids"].shape[1], said["generation_config"].cache_implementation))
        return plain(**said)

    head.model.generate = seen
    assert generate_answers(head, tokenizer, rows, max_new_tokens=6, static_cache=True) == wanted
    assert asked == [(generation.STATIC_WIDTH, "static")]  # of one width, so that the step is compiled once


def test_a_model_without_a_static_cache_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    head = Head(llama(len(tokenizer)))
    monkeypatch.setattr(type(head.model), "_can_compile_fullgraph", False)
    with pytest.raises(ModelError, match=r"evaluation.static_cache: a LlamaForCausalLM has no static cache"):
        generate_answers(head, tokenizer, [example("one: ", "good")], max_new_tokens=2, static_cache=True)
