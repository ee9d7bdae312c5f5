"""The stand-in for a weight that is read: what it answers itself. (How models meet it: tests/surgery.)"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from trimtab.errors import SurgeryError
from trimtab.ops.read_weight import read_weight


def read(trained: Tensor, given: list[Tensor] | None = None) -> Tensor:
    """``2 * trained``, read as a weight; what is assigned to its data goes into ``given``."""
    of = (trained.shape, trained.dtype, trained.device)
    assign = None if given is None else given.append
    return read_weight(lambda: 2 * trained, (trained,), of=of, assign=assign)


def test_what_is_assigned_to_its_data_arrives() -> None:
    given: list[Tensor] = []
    value = torch.zeros(2, 3)
    read(torch.ones(2, 3), given).data = value
    assert len(given) == 1
    assert given[0] is value
    with pytest.raises(SurgeryError, match="assigning to its data"):
        read(torch.ones(2, 3)).data = value


def test_asking_for_no_gradient_gives_the_weight_back() -> None:
    weight = read(torch.ones(2, 3))
    assert weight.requires_grad_(False) is weight
    with pytest.raises(SurgeryError, match="asking for its gradient"):
        weight.requires_grad_()


def test_a_gradient_may_be_asked_for_twice_and_of_what_the_weight_does_not_need() -> None:
    used, unused = torch.ones(2, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    weight = read_weight(lambda: 2 * used, (used, unused), of=(used.shape, used.dtype, used.device))
    total = weight.sum()
    for _ in range(2):
        found = torch.autograd.grad(total, (used, unused), retain_graph=True, allow_unused=True)
        assert found[1] is None
        assert torch.equal(found[0], torch.full((2, 3), 2.0))


def test_where_a_program_is_compiled_the_weight_itself_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = read(torch.ones(2, 3))
    assert type(found) is Tensor
    assert torch.equal(found, torch.full((2, 3), 2.0))


def test_numbers_with_a_gradient_are_given_to_numpy_only_by_force() -> None:
    weight = read(torch.ones(2, 3, requires_grad=True))
    with pytest.raises(RuntimeError, match="requires grad"):
        weight.numpy()
    assert np.array_equal(weight.numpy(force=True), np.full((2, 3), 2.0, np.float32))
    assert np.array_equal(weight.detach().numpy(), np.full((2, 3), 2.0, np.float32))
    for dtype in (np.float32, np.float64):
        array = np.asarray(read(torch.ones(2, 3)), dtype=dtype)
        assert array.dtype == dtype
        assert np.array_equal(array, np.full((2, 3), 2.0))
