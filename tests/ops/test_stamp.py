"""Whether a tensor still is what it was: changes of every kind are noticed, and nothing else is taken for one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

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


@pytest.mark.parametrize("columns", [slice(0, 1), slice(0, 3), slice(0, 3, 2)], ids=str)
def test_of_a_part_of_a_tensor_every_row_is_compared_and_nothing_beside_it(columns: slice) -> None:
    """Also of one that is neither laid out row by row nor column by column."""
    whole = torch.randn(20_000, 4)
    part = whole[:, columns]
    stamp = Stamp([part])
    whole.data[:, 3] += 1
    assert stamp.fits([part])
    for row in (0, 1, 2, 19_998, 19_999):
        stamp = Stamp([part])
        whole.data[row, columns] += 1
        assert not stamp.fits([part]), row
        assert stamp.fits([part], quickly=True)


@pytest.mark.parametrize("shape", [(20_000,), (20_000, 1), (1, 20_000)])
def test_every_number_of_one_row_or_column_is_compared(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    for place in (0, 1, 2, 19_998, 19_999):
        stamp = Stamp([tensor])
        tensor.data.view(-1)[place] += 1
        assert not stamp.fits([tensor]), place


def test_every_second_number_of_a_row_can_be_stamped() -> None:
    part = torch.randn(40_000)[::2]
    stamp = Stamp([part])
    assert stamp.fits([part])
    part.data.add_(1)
    assert not stamp.fits([part])


def test_tensors_without_numbers_are_what_they_were_until_they_are_changed() -> None:
    with FakeTensorMode():
        fake = torch.empty(3, 4)
    for tensor in (torch.empty(3, 4, device="meta"), fake):
        stamp = Stamp([tensor])
        assert stamp.fits([tensor])
        tensor.add_(1)
        assert not stamp.fits([tensor])


def test_what_has_no_version_is_known_by_its_numbers_or_not_at_all() -> None:
    """Tensors of inference mode count no changes, and on an accelerator nobody compares the numbers."""
    with torch.inference_mode():
        tensor, elsewhere = torch.ones(3), torch.ones(3, device="meta")
    stamp = Stamp([tensor])
    assert stamp.fits([tensor])
    with torch.inference_mode():
        tensor.add_(1)
    assert not stamp.fits([tensor])
    assert not Stamp([elsewhere]).fits([elsewhere])
