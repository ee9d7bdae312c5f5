"""Scores of a closed set of answers, against one sequence at a time with full logits in float64."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

from evaluation_cases import example, gpt2, llama, markov_chain
from sampling import sample
from trimtab.data.choices import check_choices, infer_choices
from trimtab.data.rows import Example
from trimtab.errors import DataError, ModelError
from trimtab.evaluation import choice as module
from trimtab.evaluation.choice import Beginning, ChoiceScores, TokenSequence
from trimtab.surgery.contexts import evaluating
from trimtab.tasks import Head

Make = Callable[..., list[Example]]


def score_choices(head: Head, *inputs: Any, **settings: Any) -> ChoiceScores:
    """As `evaluate` calls it."""
    with evaluating(head.model):
        return module.score_choices(head, *inputs, **settings)


def gemma2() -> Any:
    """A model whose logits need its own tail."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Gemma2Config(
        vocab_size=360, num_hidden_layers=2, head_dim=8, initializer_range=0.5, max_position_embeddings=128, **sizes
    )
    torch.manual_seed(1)
    return Gemma2ForCausalLM(config).eval()


def slowly(
    model: Any, tokenizer: Any, row: Example, choice: str, *, end: bool, start: int | None = None
) -> tuple[float, int]:
    """One choice's log-likelihood, the plain way, and the index of its first token."""
    text = tokenizer(row.prompt + choice, return_offsets_mapping=True, add_special_tokens=False)
    boundary = len(row.prompt.rstrip(" "))
    first = next(at for at, (_, last) in enumerate(text["offset_mapping"]) if last > boundary)
    ids = text["input_ids"] + ([tokenizer.eos_token_id] if end else [])
    with torch.no_grad():
        nats = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    begin = first if start is None else start
    return sum(float(nats[at - 1, ids[at]]) for at in range(begin, len(ids))), first


def check(
    found: ChoiceScores, model: Any, tokenizer: Any, rows: list[Example], choices: list[str], *, end: bool
) -> None:
    exact = copy.deepcopy(model).double()
    loss, predicted = 0.0, []
    for row, scores in zip(rows, found.scores, strict=True):
        expected = [slowly(exact, tokenizer, row, choice, end=end)[0] for choice in choices]
        # float32 in two blocks, with logits up to 20: some 1e-6 each, a handful of tokens.
        assert scores == pytest.approx(expected, abs=2e-4)
        predicted.append(expected.index(max(expected)))
        loss -= expected[choices.index(str(row.answer))]
    assert found.best == predicted
    assert len(set(predicted)) > 1, "a test that one answer always wins shows nothing"
    assert found.loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("make", [llama, gpt2, gemma2])
@pytest.mark.parametrize("choices", [["good", "bad", "plain"], ["good firm", "bad firm", "a shop is closed"]])
def test_scores_equal_a_plain_loop(make: Any, choices: list[str], tokenizer: Any, questions: Make) -> None:
    """Answers of one token and of several, of different lengths."""
    model, rows = make(), questions(choices)
    found = score_choices(Head(model), tokenizer, rows, choices)
    check(found, model, tokenizer, rows, choices, end=False)


@pytest.mark.parametrize("choices", [["answer1", "answer2", "answer10"], ["good", "good news", "bad"]])
def test_where_one_answer_begins_another_the_end_decides(choices: list[str], tokenizer: Any, questions: Make) -> None:
    model, rows = llama(), questions(choices)
    found = score_choices(Head(model), tokenizer, rows, choices)
    check(found, model, tokenizer, rows, choices, end=True)
    assert found.best.count(choices.index(choices[-1])) < len(rows)


def test_the_longer_answer_can_win(tokenizer: Any, questions: Make) -> None:
    """Without its end token answer1 has at least the likelihood of answer10, always."""
    choices = ["answer1", "answer10"]
    one, zero = (tokenizer(digit)["input_ids"][0] for digit in "10")
    rows, end = questions(choices, 4), tokenizer.eos_token_id
    longer = markov_chain(tokenizer, {one: zero, zero: end})
    shorter = markov_chain(tokenizer, {one: end})
    assert score_choices(Head(longer), tokenizer, rows, choices).best == [1] * 4
    assert score_choices(Head(shorter), tokenizer, rows, choices).best == [0] * 4


OWN = [("good", "bad firm"), ("the shop", "good", "a third of sales"), ("good news", "good", "plain", "Monday")]


def with_own_choices(questions: Make, count: int = 24) -> list[Example]:
    """Rows whose choices differ in number and in length; in every third, one answer begins another."""
    return [
        replace(row, choices=OWN[at % 3])
        for at, row in enumerate(questions(["bad firm", "the shop", "good", "good", "good", "plain"], count))
    ]


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_choices_of_their_own_equal_a_plain_loop(make: Any, batch_size: int, tokenizer: Any, questions: Make) -> None:
    model, rows = make(), with_own_choices(questions)
    found = score_choices(Head(model), tokenizer, rows, None, batch_size=batch_size)
    exact = copy.deepcopy(model).double()
    best, by_length = [], []
    for row, scores in zip(rows, found.scores, strict=True):
        # Only there the end decides; in the other rows it is left out, as it would be if they were alone.
        end = row.choices == OWN[2]
        expected = [slowly(exact, tokenizer, row, choice, end=end)[0] for choice in row.choices]
        assert scores == pytest.approx(expected, abs=2e-4)
        best.append(expected.index(max(expected)))
        each = [score / len(choice) for score, choice in zip(expected, row.choices, strict=True)]
        by_length.append(each.index(max(each)))
    assert found.best == best
    assert found.best_by_length == by_length
    assert best != by_length, "the test needs rows where length decides"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_batch_size_changes_nothing(make: Any, dtype: torch.dtype, tokenizer: Any, questions: Make) -> None:
    choices = ["a good one", "bad", "plain"]
    head, rows = Head(make().to(dtype)), questions(choices, 40)
    alone, three, sixteen = (score_choices(head, tokenizer, rows, choices, batch_size=size) for size in (1, 3, 16))
    assert alone.best == three.best == sixteen.best
    step = torch.finfo(dtype).eps
    for one, other in zip(alone.scores, sixteen.scores, strict=True):
        assert one == pytest.approx(other, abs=max(1e-4, 80 * step))


class Noisy(Head):
    """Scores in a batch are off by up to 0.3 nats, as rounding in bfloat16 makes them; alone they are right."""

    def log_probabilities(self, input_ids: Tensor, positions: Tensor, tokens: Tensor, past: Any = None) -> Tensor:
        found = super().log_probabilities(input_ids, positions, tokens, past)
        if input_ids.shape[0] == 1:
            return found
        noise = torch.Generator().manual_seed(input_ids.shape[0])
        return found + 0.6 * torch.rand(found.shape, generator=noise) - 0.3


def test_near_ties_are_decided_alone(monkeypatch: pytest.MonkeyPatch, tokenizer: Any, questions: Make) -> None:
    choices = ["good", "bad", "plain"]
    model, rows = llama(initializer_range=0.07), questions(choices, 60)
    exact = score_choices(Head(model), tokenizer, rows, choices, batch_size=1)
    margins = sorted(sorted(scores)[-1] - sorted(scores)[-2] for scores in exact.scores)
    assert margins[5] < 0.3 < margins[-5], "the test needs rows that noise would decide, and rows that it would not"
    monkeypatch.setattr(Head, "tie_margin", 0.0)
    noisy = score_choices(Noisy(model), tokenizer, rows, choices, batch_size=16)
    assert noisy.best != exact.best
    monkeypatch.setattr(Head, "tie_margin", 0.625)
    settled = score_choices(Noisy(model), tokenizer, rows, choices, batch_size=16)
    assert settled.best == exact.best
    for found, batch, alone in zip(settled.scores, noisy.scores, exact.scores, strict=True):
        best, second = sorted(batch)[:-3:-1]
        assert found == (alone if best - second < 0.625 else batch)


def test_near_ties_per_character_are_decided_alone(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any, questions: Make
) -> None:
    model, rows = llama(initializer_range=0.07), with_own_choices(questions, 60)
    exact = score_choices(Head(model), tokenizer, rows, None, batch_size=1)
    monkeypatch.setattr(Head, "tie_margin", 0.0)
    noisy = score_choices(Noisy(model), tokenizer, rows, None, batch_size=16)
    assert noisy.best_by_length != exact.best_by_length
    monkeypatch.setattr(Head, "tie_margin", 0.625)
    settled = score_choices(Noisy(model), tokenizer, rows, None, batch_size=16)
    assert settled.best == exact.best
    assert settled.best_by_length == exact.best_by_length


# Each model and each size.
MAKES_AND_BATCHES = sample(list(itertools.product([llama, gpt2, gemma2], [1, 5, 64])), 2)
TAGS = [f"{who} {what}" for who in ("profit", "sales", "shop", "firm") for what in ("of a third", "rose", "fell")]


@pytest.mark.parametrize(("make", "batch_size"), MAKES_AND_BATCHES)
def test_many_choices_share_one_pass_of_the_prompt(make: Any, batch_size: int, tokenizer: Any, questions: Make) -> None:
    model, rows = make(), questions(TAGS, 5)
    found = score_choices(Head(model), tokenizer, rows, TAGS, batch_size=batch_size)
    check(found, model, tokenizer, rows, TAGS, end=False)


def tokens_read(model: Any) -> list[int]:
    """How many tokens ``model`` reads from here on, pass by pass."""
    seen: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].numel()))
    return seen


def test_the_prompt_is_run_once_for_many_choices(tokenizer: Any, questions: Make) -> None:
    model, row = llama(), questions(TAGS, 1)
    head, seen = Head(model), tokens_read(model)
    score_choices(head, tokenizer, row, TAGS, batch_size=64)
    prompt = len(tokenizer(row[0].prompt)["input_ids"])
    answers = [len(tokenizer(" " + tag)["input_ids"]) for tag in TAGS]
    # Each answer is run on with the prompt's last token, and padded to the longest.
    assert sum(seen) <= prompt + len(TAGS) * (1 + max(answers))


INSTRUCTION = "Answer what the news is for the profit of the firm, and answer with one word. "


def instructed(rows: list[Example]) -> list[Example]:
    return [example(INSTRUCTION + row.prompt, str(row.answer)) for row in rows]


@pytest.mark.parametrize(("make", "batch_size"), MAKES_AND_BATCHES)
def test_rows_share_one_pass_of_the_instruction(make: Any, batch_size: int, tokenizer: Any, questions: Make) -> None:
    choices = ["good firm", "bad firm", "a shop is closed"]
    model, rows = make(), instructed(questions(choices))
    found = score_choices(Head(model), tokenizer, rows, choices, batch_size=batch_size)
    check(found, model, tokenizer, rows, choices, end=False)


def test_the_instruction_is_run_once_for_all_rows(tokenizer: Any, questions: Make) -> None:
    choices = ["good", "bad", "plain"]
    model, rows = llama(), questions(choices, 8)
    head, seen = Head(model), tokens_read(model)
    score_choices(head, tokenizer, instructed(rows), choices, batch_size=1)
    with_it = sum(seen)
    seen.clear()
    score_choices(head, tokenizer, rows, choices, batch_size=1)
    assert with_it <= sum(seen) + len(tokenizer(INSTRUCTION)["input_ids"])


@pytest.mark.parametrize("choices", [TAGS, ["good firm", "bad firm", "a shop is closed"]])
def test_a_model_without_keys_and_values_reads_rows_whole(
    choices: list[str], monkeypatch: pytest.MonkeyPatch, tokenizer: Any, questions: Make
) -> None:
    monkeypatch.setattr(Head, "remember", lambda self, ids: None)
    model, rows = llama(), instructed(questions(choices, 9))
    check(score_choices(Head(model), tokenizer, rows, choices), model, tokenizer, rows, choices, end=False)


def test_rows_in_blocks_are_scored_as_all_at_once(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any, questions: Make
) -> None:
    choices, steps = ["a good one", "bad", "plain"], []
    head, rows = Head(llama()), questions(choices, 20)
    whole = score_choices(head, tokenizer, rows, choices)
    monkeypatch.setattr(module, "BLOCK", 600)
    found = score_choices(head, tokenizer, rows, choices, progress=lambda done, of: steps.append((done, of)))
    assert len(steps) > 5
    assert steps == sorted(steps)
    assert steps[-1] == (20, 20)
    assert found.best == whole.best
    assert (found.loss, found.tokens) == (pytest.approx(whole.loss, rel=1e-5), whole.tokens)
    for one, other in zip(found.scores, whole.scores, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_equal_scores_go_to_the_first(tokenizer: Any) -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    rows = [example("News: it is\nAnswer: ", "bad")]
    assert score_choices(Head(model), tokenizer, rows, ["plain", "bad"]).best == [0]


def test_one_token_answers_need_one_pass_of_the_prompt(tokenizer: Any, questions: Make) -> None:
    """The head and the decoder see each row once for three answers, and the head one position of it."""
    model, rows = llama(), questions(["good", "bad", "plain"], 8)
    head = Head(model)
    seen: list[int] = []
    read: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].shape[0]))
    model.lm_head.register_forward_hook(lambda _, inputs, output: read.append(inputs[0].shape[0]))
    score_choices(head, tokenizer, rows, ["good", "bad", "plain"])
    assert (seen, read) == ([8], [8])


def test_a_space_is_scored_for_all_or_none(tokenizer: Any) -> None:
    """After "Answer: ", the space is part of " good" but a token of its own before "7": the space is the answer's."""
    model = llama()
    row = example("News: the profit rose\nAnswer: ", "7")
    ids = {choice: tokenizer(row.prompt + choice)["input_ids"] for choice in ("good", "7")}
    assert len(ids["7"]) == len(ids["good"]) + 1, "the tokenizer no longer merges as this test needs"
    found = score_choices(Head(model), tokenizer, [row], ["good", "7"])
    start = len(ids["good"]) - 1
    exact = copy.deepcopy(model).double()
    expected = [slowly(exact, tokenizer, row, choice, end=False, start=start)[0] for choice in ("good", "7")]
    assert found.scores[0] == pytest.approx(expected, abs=2e-4)
    assert found.tokens == 2


def test_answers_that_merge_with_the_prompt_are_scored_from_the_same_token(tokenizer: Any) -> None:
    """Together, "sal" and "es" make one token, which predicts the end of the prompt as well; "sal" and "x" do not."""
    model = llama()
    row = example("News: sal", "x")
    merged, apart = (tokenizer(row.prompt + choice)["input_ids"] for choice in ("es", "x"))
    shared = len(merged) - 1
    assert merged[:shared] == apart[:shared]
    assert len(apart) > len(merged), "the tokenizer no longer merges as this test needs"
    found = score_choices(Head(model), tokenizer, [row], ["es", "x"])
    exact = copy.deepcopy(model).double()
    expected = [slowly(exact, tokenizer, row, choice, end=False, start=shared)[0] for choice in ("es", "x")]
    assert found.scores[0] == pytest.approx(expected, abs=2e-4)
    own, first = slowly(exact, tokenizer, row, "x", end=False)
    assert first > shared
    assert (found.loss, found.tokens) == (pytest.approx(-own, abs=2e-4), len(apart) - first)


def test_the_perplexity_counts_the_answers_own_tokens(tokenizer: Any, questions: Make) -> None:
    choices = ["answer1", "answer2", "answer3"]
    rows = questions(choices)
    found = score_choices(Head(llama()), tokenizer, rows, choices)
    own = [len(tokenizer(row.prompt + str(row.answer))["input_ids"]) for row in rows]
    bare = [len(tokenizer(row.prompt.rstrip(" "))["input_ids"]) for row in rows]
    assert found.tokens == sum(own) - sum(bare)


def test_a_pass_after_a_common_beginning_keeps_no_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept for all layers they would stand between the tensors of a moment, and memory would grow with each pass."""
    head, common = Head(llama()), list(range(5, 25))
    sequences = [TokenSequence([*common, *rest]) for rest in ([30, 31, 32], [40, 41], [50, 51, 52])]
    for sequence in sequences:
        sequence.ask(len(common), 7)
    lengths = []
    plain = Head.log_probabilities

    def spy(self: Head, ids: Tensor, positions: Tensor, tokens: Tensor, past: Any = None) -> Tensor:
        values = plain(self, ids, positions, tokens, past)
        lengths.append([layer.keys.shape for layer in past.layers])
        return values

    monkeypatch.setattr(Head, "log_probabilities", spy)
    beginning = Beginning(head, sequences)
    for _ in range(2):
        beginning.run(sequences)
    assert {shape[-2] for shapes in lengths for shape in shapes} == {len(common)}
    assert len(lengths) == 2


def test_long_prompts_lose_their_beginning_equally(tokenizer: Any) -> None:
    model = llama()
    row = example("News: " + "the profit rose and the firm fell " * 9 + "\nAnswer: ", "good")
    choices = ["good", "no idea, sorry"]
    longest = max(len(tokenizer(row.prompt + choice)["input_ids"]) for choice in choices)
    found = score_choices(Head(model), tokenizer, [row], choices, max_length=40)
    exact = copy.deepcopy(model).double()
    for choice, score in zip(choices, found.scores[0], strict=True):
        ids = tokenizer(row.prompt + choice)["input_ids"][longest - 40 :]
        with torch.no_grad():
            nats = exact(torch.tensor([ids])).logits[0].log_softmax(-1)
        answer = len(tokenizer(row.prompt.rstrip(" "))["input_ids"]) - (longest - 40)
        expected = sum(float(nats[at - 1, ids[at]]) for at in range(answer, len(ids)))
        assert score == pytest.approx(expected, abs=2e-4)


def test_progress_ends_with_all_rows(tokenizer: Any, questions: Make) -> None:
    steps: list[tuple[int, int]] = []
    choices = ["a good one", "no idea"]
    score_choices(
        Head(llama()),
        tokenizer,
        questions(choices, 10),
        choices,
        batch_size=4,
        progress=lambda done, of: steps.append((done, of)),
    )
    assert steps[-1] == (10, 10)
    assert steps == sorted(steps)
    assert len(steps) == math.ceil(20 / 4)


def test_unknown_answers_and_bad_choices_are_errors(questions: Make) -> None:
    rows = questions(["good", "bad"], 4)
    with pytest.raises(DataError, match=r"rows\.jsonl, row 2: has the answer 'bad'.*good, plain"):
        check_choices(["good", "plain"], rows)
    with pytest.raises(DataError, match=r"row 7: has no answer"):
        check_choices(["good", "bad"], [*rows, example("", None, 7, "a text")])
    with pytest.raises(DataError, match="'good' is named 2 times"):
        check_choices(["good", "bad", " good"], rows)
    for few in (["good"], [], ["good", " "]):
        with pytest.raises(DataError, match="at least two"):
            check_choices(few, rows)
    assert check_choices([" bad", "good\n"], rows) == ["bad", "good"]


def test_rows_without_a_prompt_or_room_are_errors(tokenizer: Any) -> None:
    head = Head(llama())
    for prompt in ("", " "):
        with pytest.raises(DataError, match=r"rows\.jsonl, row 3: no token comes before"):
            score_choices(head, tokenizer, [example(prompt, "good", 3)], ["good", "bad"])
    with pytest.raises(DataError, match=r"row 3: in 4 tokens"):
        score_choices(
            head, tokenizer, [example("News: x\nAnswer: ", "bad", 3)], ["no idea at all", "bad"], max_length=4
        )


def test_choices_of_the_same_tokens_are_an_error(tokenizer: Any) -> None:
    from tokenizers.normalizers import Lowercase

    lower = copy.deepcopy(tokenizer)
    lower.backend_tokenizer.normalizer = Lowercase()
    with pytest.raises(DataError, match=r"row 1: the choices 'Bad' and 'bad' are the same tokens"):
        score_choices(Head(llama()), lower, [example("News: x\nAnswer: ", "bad")], ["Bad", "bad", "good"])


def test_scores_that_are_not_numbers_are_an_error(tokenizer: Any, questions: Make) -> None:
    model = llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(ModelError, match=r"row 1: .* nan, not a number"):
        score_choices(Head(model), tokenizer, questions(["good", "bad"], 3), ["good", "bad"])


def test_a_closed_set_is_recognised(questions: Make) -> None:
    assert infer_choices(questions(["plain", "good", "bad"], 15)) == ["bad", "good", "plain"]
    assert infer_choices(questions(["plain", "good", "bad"], 14)) is None, "repeated less than five times"
    assert infer_choices(questions(["good"], 15)) is None, "one answer is no choice"
    assert infer_choices(questions([f"a{n}" for n in range(21)], 210)) is None, "too many"
    assert infer_choices(questions(["one two three four five six", "b"], 20)) is None, "too long"
    assert infer_choices([*questions(["good", "bad"], 20), example("", None, 7, "a text")]) is None
    assert infer_choices([]) is None
