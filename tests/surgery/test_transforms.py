"""Transforms of ``torch.func`` and ``torch.jit.trace`` on adapted models give what a plain pass gives, and what
differences of it say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import sampling
import trimtab

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, of torch.jit and of what vmap does one by one

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3)),
        lambda: torch.randn(5, 4, 8, dtype=torch.float64),
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(9, 8, padding_idx=0), nn.Linear(8, 3)),
        lambda: torch.randint(0, 9, (5, 4)),
    ),
    "convolution": (
        lambda: nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.Conv1d(6, 3, 2, padding="same", padding_mode="reflect")),
        lambda: torch.randn(5, 4, 9, dtype=torch.float64),
    ),
    "attention": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0),
        lambda: torch.randn(5, 4, 8, dtype=torch.float64),
    ),
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 2},
    "dora": {"method": "dora", "rank": 2},
    "exact dora": {"method": "dora", "rank": 2, "detach_norm": False},
    "dora of columns": {"method": "dora", "rank": 2, "magnitude_axis": "input"},
    "mora": {"method": "mora", "rank": 2},
    "full": {"method": "full"},
}
CASES = [(kind, method) for kind in MODELS for method in METHODS]


def adapted(kind: str, method: str) -> tuple[nn.Module, Tensor]:
    make, batch = MODELS[kind]
    model = make().double()
    trimtab.attach(model, trimtab.Rule(match="*", **METHODS[method]))
    with torch.no_grad():
        for name, parameter in trimtab.trainable_parameters(model).items():
            # (Of an embedding, A starts at zero, and its padding column stays there.)
            if not (kind == "embedding" and name == "0.adapter.A"):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model, batch()


@pytest.mark.parametrize(("kind", "method"), sampling.sample(CASES, 8))
def test_gradients_and_batches_are_those_of_plain_passes(kind: str, method: str) -> None:
    model, x = adapted(kind, method)
    aim = torch.randn(model(x).shape, dtype=torch.float64)
    tensors = {name: one.detach() for name, one in trimtab.trainable_parameters(model).items()}

    def loss(tensors: dict[str, Tensor], x: Tensor, aim: Tensor) -> Tensor:
        return (functional_call(model, tensors, (x,)) - aim).square().sum()

    loss(dict(trimtab.trainable_parameters(model)), x, aim).backward()
    expected = {name: one.grad for name, one in trimtab.trainable_parameters(model).items()}
    whole = grad(loss)(tensors, x, aim)
    each = vmap(grad(lambda *given: loss(given[0], given[1][None], given[2][None])), in_dims=(None, 0, 0))
    for name, got in each(tensors, x, aim).items():
        assert expected[name] is not None
        torch.testing.assert_close(whole[name], expected[name], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(got.sum(0), expected[name], rtol=1e-9, atol=1e-9)
    with torch.no_grad(), trimtab.for_inference(model):
        y = model(x)
        torch.testing.assert_close(vmap(lambda row: model(row[None])[0])(x), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["lora", "exact dora", "mora", "full"])
def test_second_derivatives_are_what_differences_say(method: str) -> None:
    model, x = adapted("linear", method)
    tensors = {name: one.detach() for name, one in trimtab.trainable_parameters(model).items()}
    along = {name: torch.randn_like(one) for name, one in tensors.items()}

    def slope(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return grad(lambda these: functional_call(model, these, (x,)).pow(3).sum())(tensors)

    def moved(by: float) -> dict[str, Tensor]:
        return slope({name: one + by * along[name] for name, one in tensors.items()})

    _, got = jvp(slope, (tensors,), (along,))
    ahead, behind = moved(1e-5), moved(-1e-5)
    for name, one in got.items():
        expected = (ahead[name] - behind[name]) / 2e-5
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("method", ["lora", "dora", "mora"])
def test_a_traced_model_takes_other_batches(method: str) -> None:
    model, x = adapted("linear", method)
    traced = torch.jit.trace(model.eval(), (x,), check_trace=False)
    for other in (x, x[:3], x[:, :2]):
        torch.testing.assert_close(traced(other), model(other), rtol=1e-9, atol=1e-9)


def test_dropout_inside_of_a_transform_is_refused_in_words() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    trimtab.attach(model, trimtab.Rule(match="*", method="lora", rank=2, dropout=0.5))
    rows = torch.randn(5, 8)
    with pytest.raises(trimtab.SurgeryError, match=r"dropout .* inside of a transform.*model.eval\(\)"):
        vmap(model)(rows)
    assert torch.allclose(vmap(model.eval())(rows), model(rows))
