"""A model's cache is handed over and taken back by the name that the model has for it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache

from tiny_runs import tiny_model
from trimtab.models.earlier_tokens import cache_argument, cache_of, with_cache


class OfToday(nn.Module):
    def forward(self, input_ids: Any, cache: Any = None) -> None: ...


class OfBefore(nn.Module):
    def forward(self, input_ids: Any, past_key_values: Any = None) -> None: ...


class OfNone(nn.Module):
    def forward(self, input_ids: Any) -> None: ...


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class Given(NamedTuple):
    past_key_values: Any


def test_the_argument_has_the_models_own_name() -> None:
    assert cache_argument(OfToday()) == "cache"
    assert cache_argument(OfBefore()) == "past_key_values"
    assert cache_argument(OfNone()) is None
    kept = DynamicCache()
    assert with_cache(OfToday(), kept) == {"cache": kept}
    assert with_cache(OfBefore(), kept) == {"past_key_values": kept}
    assert with_cache(OfToday(), None) == {}
    assert cache_of(Given(kept)) is kept
    assert cache_of(object()) is None


def test_a_model_goes_on_from_what_it_gave_back() -> None:
    model = tiny_model(64).eval()
    ids = torch.tensor([[3, 5, 7, 11]])
    for called in (model, Wrapped(model)):
        earlier = cache_of(model(input_ids=ids[:, :3], use_cache=True))
        last = called(input_ids=ids[:, 3:], use_cache=True, **with_cache(called, earlier)).logits
        torch.testing.assert_close(last[:, 0], model(input_ids=ids).logits[:, 3], atol=1e-5, rtol=1e-5)
