"""A conversation costs a turn's own tokens, and says what it would say without anything kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import trimtab
from tiny_runs import tiny_model, tiny_tokenizer
from trimtab.asking import Answer, Asked, Conversation, Drawing, _Speaking
from trimtab.errors import DataError

TURNS = ("is berth seven free ?", "and the crane ?", "fog at noon , no wind", "the pilot asks for a tug")
GREEDY = Drawing(max_new_tokens=8)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def quiet(_: str) -> None:
    pass


def talked(model: Any, tokenizer: Any, turns: tuple[str, ...] = TURNS, drawing: Drawing = GREEDY) -> list[Answer]:
    """The answers of one conversation."""
    conversation = Conversation(Asked(model, tokenizer), drawing, "answer like a pilot")
    return [conversation.ask(turn, quiet) for turn in turns]


def without_keeping(model: Any, tokenizer: Any) -> list[str]:
    """The same answers, each from a model that has computed nothing before."""
    conversation, said = Conversation(Asked(model, tokenizer), GREEDY, "answer like a pilot"), []
    for turn in TURNS:
        conversation._asked = Asked(model, tokenizer)
        said.append(conversation.ask(turn, quiet).text)
    return said


def llama() -> Any:
    return tiny_model(400, max_position_embeddings=512)


def adapted() -> Any:
    model = llama()
    plan = trimtab.Plan([{"match": "all-linear", "method": "dora", "rank": 2}])
    trimtab.attach(model, plan)
    with torch.no_grad():
        for parameter in trimtab.trainable_parameters(model).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def windowed() -> Any:
    """Attention looks back at 12 tokens, so its cache cannot go back."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 12}
    torch.manual_seed(2)
    return MistralForCausalLM(MistralConfig(vocab_size=400, initializer_range=0.3, **sizes, **heads)).eval()


def mamba() -> Any:
    """States that sum up all they have seen."""
    torch.manual_seed(3)
    config = MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3)
    return MambaForCausalLM(config).eval()


def mixed() -> Any:
    """Layers of attention beside such that sum up what they have seen."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(5)
    config = Lfm2Config(vocab_size=400, initializer_range=0.3, layer_types=["conv", "full_attention"], **sizes, **heads)
    return Lfm2ForCausalLM(config).eval()


def minimax() -> Any:
    """A cache of its own kind."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    kinds: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"], "block_size": 8}
    torch.manual_seed(4)
    return MiniMaxForCausalLM(MiniMaxConfig(vocab_size=400, initializer_range=0.3, **sizes, **heads, **kinds)).eval()


@pytest.mark.parametrize("make", [llama, adapted, windowed, mamba, mixed, minimax])
def test_what_is_kept_changes_no_answer(make: Any, tokenizer: Any) -> None:
    model = make()
    assert [answer.text for answer in talked(model, tokenizer)] == without_keeping(model, tokenizer)


def test_a_turn_computes_its_own_tokens(tokenizer: Any) -> None:
    model: LlamaForCausalLM = llama()
    computed: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, __, given: computed.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    conversation = Conversation(Asked(model, tokenizer), GREEDY)
    for turn in TURNS * 2:
        computed.clear()
        answer = conversation.ask(turn, quiet)
        own = len(tokenizer(turn).input_ids) + len(tokenizer(answer.text).input_ids)
        # Beside the turn: what the template puts around it, and where an answer is not what its text is encoded to.
        assert computed == [answer.read, *[1] * (answer.tokens - 1)]
        assert answer.read < own + 40
    assert len(conversation.messages) == 4 * len(TURNS)


def test_an_answer_that_was_stopped_leaves_what_is_kept_whole(tokenizer: Any) -> None:
    model = llama()
    conversation = Conversation(Asked(model, tokenizer), GREEDY)
    conversation.ask(TURNS[0], quiet)
    said: list[str] = []

    def stop(text: str) -> None:
        said.append(text)
        if len(said) == 3:
            raise KeyboardInterrupt

    answer = conversation.ask(TURNS[1], stop)
    assert answer.stopped
    assert not answer.ended
    assert answer.tokens < GREEDY.max_new_tokens
    assert conversation.messages[-1] == {"role": "assistant", "content": answer.text}
    fresh = Conversation(Asked(model, tokenizer), GREEDY)
    fresh.messages = list(conversation.messages)
    assert conversation.ask(TURNS[2], quiet).text == fresh.ask(TURNS[2], quiet).text


def test_an_interrupt_between_two_layers(tokenizer: Any) -> None:
    model = llama()
    conversation = Conversation(Asked(model, tokenizer), GREEDY)
    conversation.ask(TURNS[0], quiet)
    passes = iter(range(100))

    def interrupt(*_: Any) -> None:
        if next(passes) == 4:
            raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    stopped = conversation.ask(TURNS[1], quiet)
    handle.remove()
    assert stopped.stopped
    fresh = Conversation(Asked(model, tokenizer), GREEDY)
    fresh.messages = list(conversation.messages)
    assert conversation.ask(TURNS[2], quiet).text == fresh.ask(TURNS[2], quiet).text


def test_a_prompt_that_was_read_by_half_is_read_again(tokenizer: Any) -> None:
    model = mixed()
    asked = Asked(model, tokenizer)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    assert asked.write(TURNS[0], GREEDY, quiet).stopped
    handle.remove()
    assert asked.write(TURNS[0], GREEDY, quiet).text == Asked(model, tokenizer).write(TURNS[0], GREEDY, quiet).text


def test_letters_of_several_tokens_are_said_whole(tokenizer: Any) -> None:
    text = "שלום 🚢 fog é 中文 👩‍🚀 at noon"
    ids = tokenizer(text).input_ids
    pieces: list[str] = []
    speaking = _Speaking(tokenizer, [0], pieces.append)
    speaking.put(torch.tensor([[5, 6]]))  # the prompt
    for token in [*ids, 0]:
        speaking.put(torch.tensor([token]))
    speaking.end()
    assert "".join(pieces) == speaking.text == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 10


def test_a_letter_that_never_became_whole_is_said_at_the_end(tokenizer: Any) -> None:
    pieces: list[str] = []
    speaking = _Speaking(tokenizer, [0], pieces.append)
    speaking.put(torch.tensor([[5]]))
    for token in tokenizer("fog 🚢").input_ids[:-1]:
        speaking.put(torch.tensor([token]))
    assert "".join(pieces) == "fog "
    speaking.end()
    assert "".join(pieces) == "fog \ufffd"


def test_the_earliest_turns_are_left_out_where_positions_run_out(tokenizer: Any) -> None:
    model = tiny_model(400, max_position_embeddings=160)
    conversation = Conversation(Asked(model, tokenizer), GREEDY, "be brief")
    left_out = []
    for turn in TURNS * 3:
        conversation.ask(turn, quiet)
        left_out.append(conversation.left_out)
    assert left_out[0] == 0
    assert left_out[-1] > 0
    assert all(count % 2 == 0 for count in left_out)
    # A part is made free at once: most turns go on with what is kept.
    assert len(set(left_out)) < len(left_out) // 2
    assert len(conversation.messages) == 2 * len(left_out)  # for /save, all of them
    with pytest.raises(DataError, match=r"this turn has \d+ tokens with the system message, and .* 160 positions"):
        conversation.ask("fog " * 200, quiet)
    assert len(conversation.messages) == 2 * len(left_out)


def test_undo_and_reset(tokenizer: Any) -> None:
    conversation = Conversation(Asked(llama(), tokenizer), GREEDY, "be brief")
    first = conversation.ask(TURNS[0], quiet).text
    conversation.ask(TURNS[1], quiet)
    assert conversation.undo()
    assert [message["content"] for message in conversation.row()["messages"]] == ["be brief", TURNS[0], first]
    conversation.reset()
    assert not conversation.undo()
    assert conversation.ask(TURNS[0], quiet).text == first


def test_drawing_is_by_the_seed_and_top_p_narrows_it(tokenizer: Any) -> None:
    model = llama()
    model.generation_config.repetition_penalty = 9.0  # the model's own settings have no part
    warm = Drawing(max_new_tokens=8, temperature=1.5)

    def drawn(seed: int, drawing: Drawing) -> str:
        torch.manual_seed(seed)
        return Asked(model, tokenizer).write("the fog", drawing, quiet).text

    assert drawn(1, warm) == drawn(1, warm)
    assert len({drawn(seed, warm) for seed in range(4)}) > 1
    narrow = Drawing(max_new_tokens=8, temperature=1.5, top_p=1e-6)
    assert {drawn(seed, narrow) for seed in range(3)} == {drawn(0, GREEDY)}
    assert model.generation_config.repetition_penalty == 9.0
