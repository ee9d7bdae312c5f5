"""Whether a tensor still is what it was: changes of every kind are noticed, and nothing else is taken for one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trimtab.ops.stamp import Stamp

SHAPES = [(3, 5), (128, 128), (160, 130), (130, 160), (700, 40), (2, 9000), (5, 60, 70)]


@pytest.mark.parametrize("quickly", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_untouched_tensor_is_what_it_was(shape: tuple[int, ...], quickly: bool) -> None:
    tensor = torch.randn(shape)
    assert Stamp([tensor]).fits([tensor], quickly=quickly) is True


@pytest.mark.parametrize("shape", SHAPES)
def test_another_tensor_with_the_same_numbers_is_another(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    assert not Stamp([tensor]).fits([tensor.clone()])
    assert not Stamp([tensor]).fits([])
    assert not Stamp([tensor]).fits([tensor, tensor])


def test_a_change_in_place_is_noticed_quickly() -> None:
    tensor = torch.randn(4, 4)
    stamp = Stamp([tensor])
    tensor[0, 0] += 1
    assert not stamp.fits([tensor], quickly=True)


def test_other_numbers_under_the_same_parameter_are_noticed_quickly() -> None:
    tensor = nn.Parameter(torch.randn(4, 4))
    stamp = Stamp([tensor])
    tensor.data = tensor.data.clone()
    assert not stamp.fits([tensor], quickly=True)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (160, 130), (130, 160), (127, 130), (700, 40)])
def test_any_row_and_any_column_changed_past_the_version_is_noticed(shape: tuple[int, int], turned: bool) -> None:
    tensor: Tensor = torch.randn(shape)
    tensor = tensor.t() if turned else tensor
    for axis in (0, 1):
        for place in range(tensor.shape[axis]):
            stamp = Stamp([tensor])
            tensor.data.select(axis, place).add_(1)
            assert not stamp.fits([tensor]), (axis, place)
            assert stamp.fits([tensor], quickly=True)


def test_the_second_of_two_tensors_counts_as_the_first() -> None:
    one, other = torch.randn(3), torch.randn(200, 200)
    stamp = Stamp([one, other])
    other.data.mul_(2)
    assert not stamp.fits([one, other])


def test_one_number_alone_is_compared() -> None:
    tensor = torch.ones(1)
    stamp = Stamp([tensor])
    tensor.data[0] = 2.0
    assert not stamp.fits([tensor])
