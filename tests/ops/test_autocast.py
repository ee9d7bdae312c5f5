"""Which dtype autocast would multiply in, and keeping it out."""

from __future__ import annotations

import torch

from trimtab.ops.autocast import autocast_dtype, cast, without_autocast


def test_the_dtype_is_that_of_the_context_and_none_outside() -> None:
    x = torch.ones(2, 2)
    assert autocast_dtype(x) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert autocast_dtype(x) is torch.bfloat16
        assert autocast_dtype(torch.empty(2, 2, device="meta")) is None


def test_products_keep_their_dtype_where_it_is_kept_out() -> None:
    x = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype is torch.bfloat16
        with without_autocast(x):
            assert (x @ x).dtype is torch.float32
        assert (x @ x).dtype is torch.bfloat16


def test_a_cast_to_the_same_dtype_is_the_tensor_itself() -> None:
    x = torch.ones(2)
    assert cast(x, torch.float32) is x
    assert cast(x, torch.bfloat16).dtype is torch.bfloat16
