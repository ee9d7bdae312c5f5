"""The engine gives every request what it would get alone, whoever is in the batch, comes, or goes."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from tiny_engines import METHODS, alone, asked, engine_of, pieces, said_by, saved_adapters, text_of
from tiny_runs import tiny_model
from trimtab.asking import Drawing
from trimtab.data.tokens import encode_prompt
from trimtab.errors import AdapterError
from trimtab.serving.requests import (
    BadRequest,
    EngineClosed,
    OutOfTime,
    QueueFull,
    Request,
    RequestFailed,
    TooLong,
    UnknownModel,
)
from trimtab.serving.writing import Row

PROMPTS = ("is berth seven free ?", "fog", "the pilot asks for a tug , and for two more at noon", "no wind")
GREEDY = Drawing(max_new_tokens=12)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(1)
    return tiny_model(400, max_position_embeddings=96)


@pytest.fixture(scope="module")
def folders(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return saved_adapters(model, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def expected(model: Any, folders: dict[str, Path]) -> dict[tuple[str, str], str]:
    """What each adapter answers to each prompt alone."""
    names: dict[str, Path | None] = {"base": None, **folders}
    return {
        (name, prompt): alone(model, folder, prompt, GREEDY) for name, folder in names.items() for prompt in PROMPTS
    }


def test_adapters_answer_differently(expected: dict[tuple[str, str], str]) -> None:
    assert len({expected[name, PROMPTS[0]] for name in ("base", *METHODS)}) == 1 + len(METHODS)


def test_mixed_rows_of_many_lengths_answer_as_alone(
    model: Any, folders: dict[str, Path], expected: dict[tuple[str, str], str]
) -> None:
    with engine_of(model, folders, rows=6) as engine:
        tickets = {key: engine.submit(asked(engine, *key, max_new_tokens=12)) for key in expected}
        assert {key: text_of(ticket) for key, ticket in tickets.items()} == expected
    stats = engine.stats()
    assert stats.finished["length"] + stats.finished.get("stop", 0) == len(expected)
    assert stats.steps < len(expected) * 12 / 2, "they shared batches"


def test_rows_join_and_leave_in_the_middle(
    model: Any, folders: dict[str, Path], expected: dict[tuple[str, str], str]
) -> None:
    with engine_of(model, folders) as engine:
        long = engine.submit(asked(engine, "dora", PROMPTS[1], max_new_tokens=60))
        left = engine.submit(asked(engine, "lora", PROMPTS[2], max_new_tokens=60))
        said = [next(iter(long)) for _ in range(3)]
        for key, whole in expected.items():
            assert said_by(engine, *key, max_new_tokens=12) == whole
            left.cancel()
        said += pieces(long)
        assert pieces(left)[-1].finish_reason == "cancelled"
    whole = alone(model, folders["dora"], PROMPTS[1], Drawing(max_new_tokens=60))
    assert "".join(one.text for one in said) == whole


def test_a_window_and_a_state_that_sums_up_answer_as_alone(tmp_path: Path) -> None:
    torch.manual_seed(2)
    sizes: dict[str, Any] = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    window = MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=6, max_position_embeddings=96))
    state = MambaForCausalLM(MambaConfig(**sizes, state_size=4, num_heads=4))
    for model, one_by_one in ((window.eval(), False), (state.eval(), True)):
        names = {"lora": {"method": "lora", "rank": 2}}
        folders = saved_adapters(model, tmp_path / type(model).__name__, names)
        with engine_of(model, folders) as engine:
            tickets = [
                (name, prompt, engine.submit(asked(engine, name, prompt, max_new_tokens=16)))
                for prompt in PROMPTS
                for name in ("base", "lora")
            ]
            for name, prompt, ticket in tickets:
                assert text_of(ticket) == alone(model, folders.get(name), prompt, Drawing(max_new_tokens=16))
            assert bool(engine.stats().notes) == one_by_one


def test_a_seed_gives_the_same_beside_others_and_again(model: Any, folders: dict[str, Path]) -> None:
    drawn = {"max_new_tokens": 20, "temperature": 1.5, "top_p": 0.95, "top_k": 50}
    with engine_of(model, folders) as engine:
        alone_said = said_by(engine, "dora", PROMPTS[0], seed=7, **drawn)
        tickets = [
            engine.submit(asked(engine, name, prompt, seed=seed, **drawn))
            for seed in (7, 8)
            for name in ("dora", "lora", "base")
            for prompt in PROMPTS
        ]
        said = [text_of(ticket) for ticket in tickets]
        assert said[0] == alone_said
        assert said[12] != alone_said
        likeliest = said_by(engine, "dora", PROMPTS[0], max_new_tokens=20, temperature=2.0, top_k=1)
        assert likeliest == said_by(engine, "dora", PROMPTS[0], max_new_tokens=20)


def test_stop_strings_end_before_them_wherever_tokens_break(model: Any, expected: dict[tuple[str, str], str]) -> None:
    whole = expected["base", PROMPTS[1]]
    with engine_of(model) as engine:
        for start in range(1, len(whole) - 3):
            stop = whole[start : start + 3]
            ticket = engine.submit(asked(engine, "base", PROMPTS[1], max_new_tokens=12, stop=("never", stop)))
            said = pieces(ticket)
            assert "".join(one.text for one in said) == whole[: whole.find(stop)]
            assert said[-1].finish_reason == "stop"


def test_log_probabilities_are_the_models(model: Any) -> None:
    with engine_of(model) as engine:
        request = asked(engine, "base", PROMPTS[0], max_new_tokens=6, logprobs=3, ignore_end=True)
        said = pieces(engine.submit(request))
    chosen = [one for piece in said for one in piece.chosen]
    ids = [*request.prompt, *(one.token for one in chosen)]
    with torch.no_grad():
        every = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert len(chosen) == 6 == said[-1].completion_tokens
    for place, one in enumerate(chosen, len(request.prompt) - 1):
        assert one.logprob == pytest.approx(float(every[place, one.token]), abs=1e-4)
        assert [top.token for top in one.top] == every[place].topk(3).indices.tolist()
        assert one.top[0].token == one.token
    assert b"".join(one.raw for one in chosen).decode(errors="replace") == "".join(piece.text for piece in said)


def test_an_answer_ends_with_the_models_positions(model: Any) -> None:
    with engine_of(model) as engine:
        long = tuple([5] * 90)
        said = pieces(engine.submit(Request("base", long, max_new_tokens=50, ignore_end=True)))
        assert (said[-1].finish_reason, said[-1].completion_tokens) == ("length", 6)
        with pytest.raises(TooLong, match="the prompt has 96 tokens, and 96 are the most"):
            engine.submit(Request("base", tuple([5] * 96)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ()}, "no tokens"),
        ({"prompt": (400,)}, "from 0 to 399"),
        ({"max_new_tokens": 0}, "at least 1, got 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"stop": ("",)}, "stop"),
        ({"logprobs": -1}, "logprobs"),
        ({"seconds": 0.0}, "seconds"),
    ],
)
def test_what_cannot_be_is_refused(shared: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        shared.submit(Request(**{"model": "base", "prompt": (5, 6), **options}))


@pytest.fixture(scope="module")
def shared(model: Any) -> Any:
    with engine_of(model) as engine:
        yield engine


def test_an_unknown_model_is_refused_by_a_near_name(shared: Any) -> None:
    with pytest.raises(UnknownModel, match="Did you mean 'base'"):
        shared.submit(Request("bass", (5,)))
    assert shared.stats().refused["UnknownModel"] == 1


def test_a_full_queue_refuses_and_a_late_request_ends(model: Any) -> None:
    with engine_of(model, rows=1, queue=2) as engine:
        long = engine.submit(Request("base", (5, 6), max_new_tokens=90, ignore_end=True))
        next(iter(long))
        late = engine.submit(Request("base", (5, 6), seconds=0.001))
        waits = engine.submit(Request("base", (5, 6), max_new_tokens=1))
        with pytest.raises(QueueFull):
            engine.submit(Request("base", (5, 6)))
        with pytest.raises(OutOfTime):
            pieces(late)
        cut = pieces(long)
        assert cut[-1].completion_tokens == 90
        assert pieces(waits)[-1].completion_tokens == 1
        slow = engine.submit(Request("base", (5, 6), max_new_tokens=90, ignore_end=True, seconds=0.05))
        assert pieces(slow)[-1].finish_reason == "time"


def test_a_failing_pass_ends_its_rows_and_no_others(
    model: Any, expected: dict[tuple[str, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine_of(model) as engine:
        forward = engine._model.forward

        @wraps(forward)
        def failing(*args: Any, **kwargs: Any) -> Any:
            if 399 in kwargs["input_ids"]:
                raise RuntimeError("a fault in the model")
            return forward(*args, **kwargs)

        long = engine.submit(Request("base", (5, 6), max_new_tokens=60, ignore_end=True))
        next(iter(long))
        monkeypatch.setattr(engine._model, "forward", failing)
        for _ in range(5):
            with pytest.raises(RequestFailed, match="a fault in the model"):
                pieces(engine.submit(Request("base", (399,))))
        assert pieces(long)[-1].completion_tokens == 60
        assert said_by(engine, "base", PROMPTS[0], max_new_tokens=12) == expected["base", PROMPTS[0]]
        for _ in range(6):  # nothing else runs, and still it is the requests that are wrong, not the model
            with pytest.raises(RequestFailed, match="a fault in the model"):
                pieces(engine.submit(Request("base", (399,))))
        assert said_by(engine, "base", PROMPTS[0], max_new_tokens=12) == expected["base", PROMPTS[0]]
        monkeypatch.setattr(engine._model, "forward", lambda **_: 1 / 0)
        for _ in range(3):
            with pytest.raises(RequestFailed, match="division"):
                pieces(engine.submit(Request("base", (5,))))
        engine._thread.join(10)
        assert engine.stats().state == "broken"
        assert "one after the other" in engine.stats().notes[-1]
        with pytest.raises(EngineClosed, match="broken"):
            engine.submit(Request("base", (5,)))


def test_numbers_that_are_none_end_one_row(model: Any) -> None:
    with engine_of(model) as engine:
        with torch.no_grad():
            engine._model.lm_head.weight = torch.nn.Parameter(engine._model.lm_head.weight.clone())
            engine._model.model.embed_tokens.weight[399] = float("nan")
        good = engine.submit(Request("base", (5, 6), max_new_tokens=30, ignore_end=True))
        with pytest.raises(RequestFailed, match="NaN"):
            pieces(engine.submit(Request("base", (5, 399))))
        again = engine.submit(Request("base", (5, 6), max_new_tokens=30, ignore_end=True))
        assert text_of(good) == text_of(again)


def test_a_tokenizer_that_fails_at_a_token_ends_one_row(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_of(model) as engine:
        good = engine.submit(Request("base", (5, 6), max_new_tokens=8, ignore_end=True))
        monkeypatch.setattr(Row, "_likely", lambda *_: 1 / 0)
        with pytest.raises(RequestFailed, match=r"cannot be told.*division"):
            pieces(engine.submit(Request("base", (5,), logprobs=2)))
        assert pieces(good)[-1].completion_tokens == 8
        assert engine.stats().state == "ready"


def test_closing_refuses_what_waits_and_lets_the_rest_finish(model: Any) -> None:
    engine = engine_of(model, rows=1)
    running = engine.submit(Request("base", (5, 6), max_new_tokens=60, ignore_end=True))
    next(iter(running))
    waiting = engine.submit(Request("base", (5, 6)))
    engine.close()
    assert pieces(running)[-1].completion_tokens == 60
    with pytest.raises(EngineClosed):
        pieces(waiting)
    with pytest.raises(EngineClosed):
        engine.submit(Request("base", (5, 6)))
    with pytest.raises(EngineClosed):
        engine.add_adapter("late", Path("nowhere"))
    cut = engine_of(model)
    running = cut.submit(Request("base", (5, 6), max_new_tokens=90, ignore_end=True))
    next(iter(running))
    cut.close(0)
    assert pieces(running)[-1].finish_reason == "cancelled"


def test_adapters_come_go_and_leave_memory(
    model: Any, folders: dict[str, Path], expected: dict[tuple[str, str], str], tmp_path: Path
) -> None:
    with engine_of(model, folders, adapters=2) as engine:
        assert engine.stats().adapters_loaded == 2
        for _ in range(2):
            tickets = {key: engine.submit(asked(engine, *key, max_new_tokens=12)) for key in expected}
            assert {key: text_of(ticket) for key, ticket in tickets.items()} == expected
        assert engine.stats().adapter_evictions > 2
        kept = engine.submit(asked(engine, "dora", PROMPTS[1], max_new_tokens=12))
        engine.drop_adapter("dora")
        assert text_of(kept) == expected["dora", PROMPTS[1]]
        with pytest.raises(UnknownModel):
            engine.submit(Request("dora", (5,)))
        engine.add_adapter("dora", folders["lora"])  # the name means another one now
        assert said_by(engine, "dora", PROMPTS[1], max_new_tokens=12) == expected["lora", PROMPTS[1]]
        with pytest.raises(AdapterError):
            engine.add_adapter("none", tmp_path)
        assert [one.name for one in engine.models()] == ["base", "lora", "mora", "words", "dora"]
        assert engine.stats().adapters_loaded <= 2
    nbytes = next(one.nbytes for one in engine.models() if one.name == "lora")
    with engine_of(model, adapter_bytes=nbytes) as engine:
        engine.add_adapter("lora", folders["lora"])
        with pytest.raises(AdapterError, match="bytes"):
            engine.add_adapter("mora", folders["dora"])
        assert said_by(engine, "lora", PROMPTS[1], max_new_tokens=12) == expected["lora", PROMPTS[1]]


def test_an_adapter_that_is_gone_fails_its_own_requests(
    model: Any, folders: dict[str, Path], expected: dict[tuple[str, str], str], tmp_path: Path
) -> None:
    moved = folders["lora"].rename(tmp_path / "lora")
    try:
        with engine_of(model, {"gone": moved, "dora": folders["dora"]}, adapters=1) as engine:
            moved.rename(folders["lora"])
            fails = engine.submit(asked(engine, "gone", PROMPTS[1]))
            works = engine.submit(asked(engine, "dora", PROMPTS[1], max_new_tokens=12))
            with pytest.raises(RequestFailed, match="the adapter gone cannot be read"):
                pieces(fails)
            assert text_of(works) == expected["dora", PROMPTS[1]]
    finally:
        if moved.exists():
            moved.rename(folders["lora"])


def test_files_that_were_swapped_are_not_read_again(model: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    mine, elsewhere = tmp_path / "mine", tmp_path / "elsewhere"
    shutil.copytree(folders["lora"], mine)
    shutil.copytree(folders["lora"], elsewhere)
    with engine_of(model, {"mine": mine, "dora": folders["dora"]}, adapters=1) as engine:
        assert text_of(engine.submit(asked(engine, "mine", PROMPTS[1])))  # nothing happened to it
        assert text_of(engine.submit(asked(engine, "dora", PROMPTS[1])))
        shutil.rmtree(mine)
        mine.symlink_to(elsewhere)
        with pytest.raises(RequestFailed, match="not those that were added"):
            text_of(engine.submit(asked(engine, "mine", PROMPTS[1])))
        engine.drop_adapter("mine")
        engine.add_adapter("mine", elsewhere)
        assert text_of(engine.submit(asked(engine, "mine", PROMPTS[1])))


def test_a_long_prompt_is_read_in_parts_between_the_steps_of_others(folders: dict[str, Path]) -> None:
    torch.manual_seed(1)
    model = tiny_model(400, max_position_embeddings=4096)
    with patch("trimtab.serving.passes.READ_AT_ONCE", 16), patch("trimtab.serving.engine.READ_AT_ONCE", 16):
        whole = " ".join(PROMPTS * 8)
        with engine_of(model, folders, rows=4) as engine:
            streaming = engine.submit(asked(engine, "lora", PROMPTS[1], max_new_tokens=300, ignore_end=True))
            first = next(iter(streaming))
            before = engine.stats().steps
            long = [engine.submit(asked(engine, name, whole, max_new_tokens=12)) for name in ("dora", "base")]
            said = text_of(long[0])
            steps = engine.stats().steps - before
            assert steps > len(long[0].request.prompt) / 16, "nobody else went a step while it was read"
            assert said == alone(model, folders["dora"], whole, GREEDY)
            gone = engine.submit(asked(engine, "mora", whole))
            gone.cancel()
            assert text_of(long[1]) == alone(model, None, whole, GREEDY)
            assert pieces(gone)[-1].finish_reason == "cancelled"
            text = first.text + "".join(piece.text for piece in streaming)
        assert text.startswith(alone(model, folders["lora"], PROMPTS[1], Drawing(300)))


def test_a_text_that_is_far_too_long_is_not_read_to_its_end(model: Any) -> None:
    with engine_of(model) as engine, patch("trimtab.serving.admission.encode_prompt", wraps=encode_prompt) as read:
        with pytest.raises(TooLong, match="more than 96 tokens"):
            engine.encode("fog " * 500_000, "base")
        assert sum(len(call.args[0]) for call in read.call_args_list) < 10_000
        word = "fog " * 20
        assert engine.encode(word, "base") == encode_prompt(word, engine.reads("base").tokenizer)
        with pytest.raises(BadRequest, match="empty"):
            engine.encode("", "base")


def test_a_model_that_turns_positions_by_the_longest_row_answers_alone() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 48}
    model = tiny_model(400, max_position_embeddings=96, rope_parameters=rope)
    with engine_of(model) as engine:
        assert "48 tokens" in engine.stats().notes[0]
    with engine_of(model, tokens=48) as engine:
        assert engine.stats().notes == ()


def test_many_threads_and_a_loop_read_their_own(model: Any, folders: dict[str, Path]) -> None:
    with engine_of(model, folders, rows=4) as engine:
        request = asked(engine, "mora", PROMPTS[2], max_new_tokens=12)
        whole, said = text_of(engine.submit(request)), []
        threads = [threading.Thread(target=lambda: said.append(text_of(engine.submit(request)))) for _ in range(12)]
        for thread in threads:
            thread.start()

        async def one() -> str:
            return "".join([piece.text async for piece in engine.submit(request)])

        async def several() -> list[str]:
            return list(await asyncio.gather(*(one() for _ in range(12))))

        said += asyncio.run(several())
        for thread in threads:
            thread.join()
    assert said == [whole] * 24


def test_memory_of_caches_is_bounded(model: Any) -> None:
    with engine_of(model, batch_tokens=64) as engine:
        tickets = [engine.submit(Request("base", (5, 6), max_new_tokens=30, ignore_end=True)) for _ in range(4)]
        most = 0
        while engine.stats().finished.get("length", 0) < 4:
            most = max(most, engine.stats().running)
            time.sleep(0.002)
        assert most == 2
        assert [pieces(ticket)[-1].completion_tokens for ticket in tickets] == [30] * 4
