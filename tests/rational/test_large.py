# SPDX-License-Identifier: Apache-2.0
"""More than 2^31 elements in one tensor: offsets of 32 bits would wrap."""

from __future__ import annotations

import pytest
import torch

from singlepass._ops import OPS

from ..memory import need

pytestmark = pytest.mark.large


def test_every_element_is_computed_once() -> None:
    rows = 2**28 + 3
    need("cpu", 3 * 2 * 8 * rows)
    x = torch.ones(rows, 8, dtype=torch.bfloat16)
    marked = [0, 2**27, 2**28 - 1, rows - 1]
    x[marked] = 3.0
    options = {"form": 0, "channel_dim": -1}
    tables = torch.tensor([[0.0, 1.0]]), torch.ones(1, 1)
    y = OPS["rational"].on("native")(x, *tables, None, None, **options)
    for row in marked:
        assert y[row].tolist() == [0.75] * 8
    assert float(y[2**27 + 1, 3]) == 0.5
    assert int(torch.count_nonzero(y == 0.75)) == 8 * len(marked)
    grad_x, grad_a, grad_b, *_ = OPS["rational_backward"].on("native")(y, x, *tables, None, None, **options)
    # f = x / (1 + |x|): f'(1) = 1/4, f'(3) = 1/16, both times the gradient f itself.
    assert float(grad_x[0, 0]) == 0.75 / 16
    assert float(grad_x[-2, 0]) == 0.125
    ones, threes = 8 * (rows - len(marked)), 8 * len(marked)
    torch.testing.assert_close(grad_a, torch.tensor([[ones / 4 + threes * 3 / 16, ones / 4 + threes * 9 / 16]]))
    torch.testing.assert_close(grad_b, torch.tensor([[-ones / 8 - threes * 27 / 64]]))
