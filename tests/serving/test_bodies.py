"""Bodies of requests: whatever comes is read, or refused by an error that names a field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from sampling import everything
from trimtab.serving.bodies import IGNORED, AddAdapter, ChatAsking, CompletionAsking, FieldError, read_body

KINDS = (ChatAsking, CompletionAsking, AddAdapter)
NAMES = sorted({name for kind in KINDS for name in kind.model_fields} | IGNORED | {"echo", "logit_bias", "functions"})
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300 if everything else 50, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6), st.sampled_from(KINDS))
def test_any_json_is_read_or_refused(body: dict[str, Any], kind: type[Any]) -> None:
    whole = {"model": "m", "messages": [], "prompt": "x", "name": "n", "path": "p"}
    given_fields = {name: whole[name] for name in whole if name in kind.model_fields} | body
    try:
        asked = read_body(kind, json.dumps(given_fields).encode())
    except FieldError as error:
        said = str(error)
        assert ":" in said or "body" in said
        assert len(said) < 400
        return
    for name, value in body.items():
        if name in kind.model_fields and not isinstance(value, dict | list):
            read = getattr(asked, name)
            assert read == value, name
            assert type(read) in (type(value), float), name


@settings(max_examples=200 if everything else 50, deadline=None)
@given(st.binary(max_size=60), st.sampled_from(KINDS))
def test_any_bytes_are_refused(raw: bytes, kind: type[Any]) -> None:
    with pytest.raises(FieldError):
        read_body(kind, raw)


def test_either_name_of_the_longest_answer() -> None:
    chat = {"model": "m", "messages": []}
    assert read_body(ChatAsking, json.dumps({**chat, "max_tokens": 5}).encode()).wanted == 5
    both = {**chat, "max_tokens": 5, "max_completion_tokens": 3}
    assert read_body(ChatAsking, json.dumps(both).encode()).wanted == 3
    assert read_body(ChatAsking, json.dumps(chat).encode()).wanted is None


def test_seeds_stay_within_what_a_seed_can_be() -> None:
    body = json.dumps({"model": "m", "prompt": "x", "seed": -1, "n": 3}).encode()
    asked = read_body(CompletionAsking, body)
    assert [one.seed for one in asked.requests([[1]], None)] == [2**63 - 1, 0, 1]
