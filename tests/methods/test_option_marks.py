"""What the methods say of their own options and tensors, so that no other file has to name them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import trimtab
from trimtab import methods
from trimtab.methods._method import TRAINING_ONLY
from trimtab.surgery.adapted import adapted_modules

Make = Callable[..., Any]
# Another value for each option that is marked, and what it must be said with.
OTHERWISE: dict[str, dict[str, Any]] = {
    "dropout": {"dropout": 0.5},
    "dtype": {"dtype": "float64"},
    "detach_norm": {"detach_norm": False},
    "keep_product": {"keep_product": True},
    "init": {"init": "gaussian"},
    "init_std": {"init": "gaussian", "init_std": 0.5},
}
MARKED = [
    (method, option)
    for method in methods.names()
    for option, field in methods.options_class(method).model_fields.items()
    if TRAINING_ONLY in field.metadata and (method, option) != ("full", "dropout")  # which has one value only
]


def adapted(model: Any, method: str, **options: Any) -> Any:
    """``model`` with adapters of ``method``, each trained tensor with values drawn from one seed, in eval mode."""
    match = "*.mlp" if methods.method_class(method).sits_on == "block" else "*.q_proj"
    trimtab.attach(model, trimtab.Rule(match=match, method=method, **options))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trimtab.trainable_parameters(model).values():
            parameter.copy_(0.1 * torch.randn(parameter.shape) + 1)
    return model.eval()


@pytest.mark.parametrize(("method", "option"), MARKED)
@pytest.mark.parametrize("magnitude", [False, True])
def test_an_option_that_is_marked_changes_no_output(
    method: str, option: str, magnitude: bool, tiny_llama: Make
) -> None:
    torch.manual_seed(0)
    model = tiny_llama()
    twin = tiny_llama()
    twin.load_state_dict(model.state_dict())
    fields = methods.options_class(method).model_fields
    more: dict[str, Any] = {"magnitude": True} if magnitude and "magnitude" in fields else {}
    plain = adapted(model, method, **more)
    other = adapted(twin, method, **more, **OTHERWISE[option])
    for (_, one), (_, two) in zip(adapted_modules(plain), adapted_modules(other), strict=True):
        assert one.adapter.options != two.adapter.options
        assert one.adapter.options.computes() == two.adapter.options.computes()
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        # Norms and sums may be taken in another order or a wider type, in float32; logits are some 0.1.
        torch.testing.assert_close(other(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ({"rank": 4}, {"rank": 4, "alpha": 8}, True),  # twice the rank is the default
        ({"rank": 4, "alpha": 8}, {"rank": 4, "alpha": 4, "rank_stabilised": True}, True),
        ({"rank": 4, "alpha": 8}, {"rank": 4, "alpha": 9}, False),
        ({"rank": 4, "alpha": 8}, {"rank": 4, "alpha": 8, "rank_stabilised": True}, False),
        ({"rank": 4, "alpha": 8}, {"rank": 8, "alpha": 16}, False),
        ({"rank": 4}, {"rank": 4, "magnitude": True}, False),
    ],
)
def test_lora_computes_the_same_where_its_scale_is_the_same(
    one: dict[str, Any], two: dict[str, Any], same: bool
) -> None:
    kind = methods.options_class("lora")
    assert (kind(**one).computes() == kind(**two).computes()) == same


@pytest.mark.parametrize("method", methods.names())
def test_every_vector_that_is_trained_has_a_rate_group_of_its_own(method: str, tiny_llama: Make) -> None:
    """A vector that no method speaks of would decay towards zero, as a weight does."""
    more = {key: True for key in ("magnitude", "bias") if key in methods.options_class(method).model_fields}
    model = adapted(tiny_llama(attention_bias=True), method, **more)
    groups = methods.method_class(method).rate_groups
    for _, module in adapted_modules(model):
        tensors = dict(module.adapter.named_parameters())
        assert {key for key, value in tensors.items() if value.dim() == 1} <= groups.keys()
        assert groups.keys() <= tensors.keys()


@pytest.mark.parametrize("method", methods.names())
def test_what_was_said_sets_the_options_again(method: str) -> None:
    kind = methods.options_class(method)
    for options in (kind(), kind(dtype="bfloat16")):
        again = kind(**options.said())
        assert again == options
        assert again.said() == options.said()
    full = kind(**kind().model_dump())
    assert kind(**full.said()) == full


def test_one_method_trains_the_weight_itself() -> None:
    assert [name for name in methods.names() if methods.method_class(name).trains_base] == ["full"]
