"""When kept norms still hold: equal numbers of one dtype on one device, and NaN never."""

from __future__ import annotations

import torch

from trimtab import methods
from trimtab.methods._norms import same_values


def test_equal_tensors_are_the_same() -> None:
    one, other = torch.randn(3, 2), torch.randn(4)
    assert same_values([one.clone(), other.clone()], [one, other]) is True


def test_one_number_a_dtype_or_a_device_makes_another() -> None:
    tensor = torch.ones(3)
    changed = tensor.clone()
    changed[1] += 1
    assert not same_values([tensor], [changed])
    assert not same_values([tensor], [tensor.double()])
    assert not same_values([tensor], [tensor.to("meta")])
    assert not same_values([torch.tensor([float("nan")])], [torch.tensor([float("nan")])])


def test_methods_are_listed_by_what_they_sit_on() -> None:
    assert set(methods.names("block")) == {"parallel", "serial"}
    assert {"dora", "lora", "mora"} <= set(methods.names("weight"))
