"""The options of all methods: documented, strict, frozen; and the folder as the list of methods."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

import trimtab
from trimtab import methods

# A whole method in one file: dV[o, i] = v[o], one number per output.
SHIFT = '''
"""Adds ``v[o]`` to every weight of output o."""

import torch
from pydantic import Field
from torch import nn

from trimtab.methods import _weight
from trimtab.ops.cost import Work
from trimtab.ops.update import Update


class Options(_weight.WeightOptions):
    start: float = Field(0.0, description="Where v starts.")


class ShiftUpdate(Update):
    def __init__(self, in_features):
        self.in_features = in_features

    def delta(self, tensors):
        return tensors[0].unsqueeze(1).expand(-1, self.in_features)

    def work(self, tokens, tensors, dtype):
        return Work(tokens, tokens, len(tensors[0]))

    def fold(self, weight, ratio, tensors):
        total = weight + tensors[0].to(weight.dtype).unsqueeze(1)
        return total if ratio is None else total * ratio.unsqueeze(1).to(weight.dtype)

    def add_product(self, product, rows, tensors, through):
        product.add_(rows.sum(1, keepdim=True) * tensors[0].to(rows.dtype))

    def add_gradient(self, grad_rows, after, rows, tensors, through):
        if grad_rows is not None:
            grad_rows.add_((after.grad * tensors[0].to(after.grad.dtype)).sum(1, keepdim=True))
        return ((after.grad * rows.sum(1, keepdim=True)).sum(0).to(tensors[0].dtype),)


class Shift(_weight.WeightMethod):
    options_type = Options

    def __init__(self, base, options):
        super().__init__(base, options)
        self.v = nn.Parameter(torch.full((self.out_features,), options.start, dtype=self.dtype))

    def factors(self):
        return ShiftUpdate(self.in_features), (self.v,)
'''


@pytest.fixture
def shift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A method file put into the folder of methods, for one test."""
    (tmp_path / "shift.py").write_text(SHIFT)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    methods.names.cache_clear()
    methods.method_class.cache_clear()
    yield
    monkeypatch.undo()
    methods.names.cache_clear()
    methods.method_class.cache_clear()
    sys.modules.pop("trimtab.methods.shift", None)
    vars(methods).pop("shift", None)


def test_the_folder_is_the_list() -> None:
    folder = Path(methods.__file__).parent
    files = {path.stem for path in folder.glob("*.py") if not path.name.startswith("_")}
    assert set(methods.names()) == files
    assert methods.names() == sorted(methods.names())
    assert {"lora", "dora", "mora", "full"} <= files


@pytest.mark.usefixtures("shift")
def test_one_file_adds_a_method() -> None:
    """It can be named in a rule, takes every common option, and everything else works with it: nothing else was
    told."""
    assert "shift" in methods.names()
    model = nn.Sequential(nn.Linear(5, 3))
    weight = model[0].weight.detach().clone()
    trimtab.attach(model, trimtab.Rule(match="0", method="shift", magnitude=True, dropout=0.1))
    model.eval()
    x = torch.randn(4, 5, requires_grad=True)
    with torch.no_grad():
        model[0].adapter.v.copy_(torch.tensor([0.1, -0.2, 0.3]))
    total = weight + model[0].adapter.v.detach()[:, None]
    expected = total * (weight.norm(dim=1) / total.norm(dim=1))[:, None]
    output = model(x)
    assert torch.allclose(output, x @ expected.t() + model[0].bias, atol=1e-6)
    output.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, expected.sum(0).expand(4, -1), atol=1e-6)
    assert torch.allclose(trimtab.effective_weight(model, "0"), expected, atol=1e-6)
    trimtab.merge(model)
    assert torch.allclose(model(x), output, atol=1e-6)


@pytest.mark.parametrize("method", methods.names())
def test_every_option_is_documented_and_frozen(method: str) -> None:
    kind = methods.options_class(method)
    for name, field in kind.model_fields.items():
        assert field.description, f"{method}.{name}"
    options = kind()
    with pytest.raises(ValidationError):
        options.dropout = 0.5  # type: ignore[misc]
    assert methods.method_class(method).options_type is kind


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("lora", {"rnk": 8}, "rnk"),
        ("lora", {"rank": -1}, "greater than or equal to 0"),
        ("lora", {"rank": 2.5}, "rank"),
        ("lora", {"rank": 0}, "rank: 0 leaves nothing to train"),
        ("lora", {"alpha": 0}, "greater than 0"),
        ("lora", {"dropout": 1.0}, "less than 1"),
        ("lora", {"dropout": -0.1}, "greater than or equal to 0"),
        ("lora", {"init": "zeros"}, "'kaiming' or 'gaussian'"),
        ("lora", {"init_std": 0.1}, "init_std belongs to init: gaussian"),
        ("lora", {"magnitude_axis": "rows"}, "'output' or 'input'"),
        ("lora", {"dtype": "int8"}, "dtype"),
        ("dora", {"magnitude": False}, "True"),
        ("mora", {"alpha": 8}, "alpha"),
        ("mora", {"rank": 0}, "greater than or equal to 1"),
        ("mora", {"form": "turned"}, "'rotation' or 'sharing'"),
        ("full", {"rank": 8}, "rank"),
        ("full", {"dropout": 0.1}, "less than or equal to 0"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(method: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        methods.options_class(method)(**options)
    assert words in str(caught.value)


def test_an_unknown_method_names_the_nearest() -> None:
    for ask in (methods.options_class, methods.method_class):
        with pytest.raises(trimtab.PlanError, match=r"unknown method 'dorra'.*dora, full, lora, mora.*mean 'dora'\?"):
            ask("dorra")
    with pytest.raises(trimtab.PlanError, match="unknown method '_method'"):
        methods.options_class("_method")


@pytest.mark.parametrize(
    ("method", "sizes"),
    [("lora", {"rank": 8}), ("mora", {"rank": 8}), ("parallel", {"bottleneck": 64}), ("serial", {"bottleneck": 64})],
)
def test_the_size_of_a_rule_that_says_none(method: str, sizes: dict[str, int]) -> None:
    options = trimtab.Rule(match="*", method=method).options
    assert {name: getattr(options, name) for name in sizes} == sizes
