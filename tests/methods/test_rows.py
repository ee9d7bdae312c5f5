"""Chosen rows of an embedding and of an output head trained, and nothing else of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import trimtab
from trimtab import PlanError, Rule

Make = Callable[..., Any]
ROWS = [7, 2, 31]
IDS = torch.tensor([[2, 5, 7, 7, 31], [9, 2, 1, 0, 3]])


def gemma3(**changes: Any) -> Any:
    """Its embedding multiplies what it looks up, and is tied to the head."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    config = Gemma3TextConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, **changes)
    return Gemma3ForCausalLM(config).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
        return found


def both(model: Any) -> list[str]:
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(model.get_input_embeddings())], names[id(model.get_output_embeddings())]]


MODELS = ["untied", "tied", "scaled and tied"]


def made(kind: str, tiny_llama: Make) -> Any:
    torch.manual_seed(0)
    return gemma3() if kind == "scaled and tied" else tiny_llama(tie_word_embeddings=kind == "tied")


@pytest.mark.parametrize("kind", MODELS)
def test_rows_train_as_they_would_by_themselves(kind: str, tiny_llama: Make, tmp_path: Path) -> None:
    """Against the bare model with the whole tables trained, whose gradients of all other rows are thrown away."""
    bare = made(kind, tiny_llama).double()
    model, reference = copy.deepcopy(bare), copy.deepcopy(bare)
    report = trimtab.attach(model, Rule(match=both(bare), method="full", rows=ROWS))
    tables = 2 if kind == "untied" else 1
    assert report.trainable_parameters == tables * len(ROWS) * 16
    # The head's products with these rows are made apart, and other shapes may be rounded otherwise.
    torch.testing.assert_close(logits(model), logits(bare), rtol=1e-13, atol=1e-13)
    reference.requires_grad_(False)
    held = {id(module.weight): module.weight for module in map(reference.get_submodule, both(bare))}
    assert len(held) == tables
    optimisers = []
    for trained in (list(trimtab.trainable_parameters(model).values()), list(held.values())):
        for parameter in trained:
            parameter.requires_grad_()
        optimisers.append(torch.optim.SGD(trained, lr=0.5))
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        reference(IDS, labels=IDS).loss.backward()
        for weight in held.values():
            weight.grad[[row for row in range(40) if row not in ROWS]] = 0.0
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-10, atol=1e-12)
    embedding = model.get_input_embeddings()
    torch.testing.assert_close(embedding.weight + 0, next(iter(held.values())), rtol=1e-10, atol=1e-12)
    assert torch.equal(trimtab.effective_weight(model, both(bare)[0]), embedding.weight + 0)

    trimtab.save_adapter(model, tmp_path)
    again = copy.deepcopy(bare)
    trimtab.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    wanted = logits(model)
    trimtab.merge(model)
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-14)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == (kind != "untied")
    trimtab.detach(again)
    for name, value in bare.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_the_table_itself_is_not_copied() -> None:
    model = nn.Sequential(nn.Embedding(1000, 8), nn.Linear(8, 500))
    report = trimtab.attach(model, Rule(match=["0", "1"], method="full", rows=[3]))
    assert report.trainable_parameters == 16
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            sizes.extend(one.numel() for one in [output] if isinstance(one, Tensor))
            return output

    with Sizes():
        model(torch.tensor([[1, 3]])).sum().backward()
    assert max(sizes) < 1000 * 8  # (the head's own weight is turned, not copied)


def test_a_padding_row_never_trains() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, padding_idx=5))
    trimtab.attach(model, Rule(match="0", method="full", rows=[2, 5, 7]))
    model(torch.tensor([2, 5, 5, 7])).sum().backward()
    gradient = model[0].adapter.weight.grad
    assert gradient is not None
    assert gradient[[0, 2]].all()
    assert not gradient[1].any()


def test_a_bfloat16_table_keeps_float32_rows() -> None:
    model = nn.Sequential(nn.Embedding(9, 4).bfloat16(), nn.Linear(4, 9).bfloat16())
    trimtab.attach(model, Rule(match=["0", "1"], method="full", rows=[8]))
    output = model(torch.tensor([8, 1]))
    assert output.dtype == torch.bfloat16
    assert {one.dtype for one in trimtab.trainable_parameters(model).values()} == {torch.float32}
    table, trained = model[0].base.weight.detach(), model[0].adapter.weight.detach()
    for dtype in (None, torch.float64):
        effective = model[0].adapter.effective_weight(model[0].handle, dtype)
        assert effective.dtype == (dtype or torch.float32)
        assert torch.equal(effective[:8], table[:8].to(effective.dtype))
        assert torch.equal(effective[8:], trained.to(effective.dtype))


def test_a_table_that_shortens_its_own_rows_is_refused_at_once() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=1.0))
    with pytest.raises(PlanError, match=r"max_norm=1\.0: each pass shortens rows of the frozen table"):
        trimtab.attach(model, Rule(match="0", method="full", rows=[3]))
    assert type(model[0]) is nn.Embedding


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"rows": [40]}, r"no row 40: the table has 40.*resize_token_embeddings\(41\)"),
        ({"rows": [-1]}, "greater than or equal to 0"),
        ({"rows": []}, "at least 1 item"),
        ({"rows": [1], "magnitude": True}, "leave 'magnitude' and 'tensors' out"),
        ({"rows": [1], "match": "model.norm"}, "ends with no module"),
    ],
)
def test_what_cannot_be_is_said(rule: dict[str, Any], says: str, tiny_llama: Make) -> None:
    model = tiny_llama()
    with pytest.raises(PlanError, match=says):
        trimtab.attach(model, Rule(**{"match": "*.embed_tokens", "method": "full", **rule}))
