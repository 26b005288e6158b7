# SPDX-License-Identifier: Apache-2.0
"""What tests/test_ops.py asks of each op of this family: arguments, and the tests that compare it with float64."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from singlepass._ops import rational as ops

from ..samples import Sample
from . import test_functional
from .inputs import LAYOUTS, make

FLOAT64 = {
    ops.rational: test_functional.test_against_float64,
    ops.rational_backward: test_functional.test_against_float64,
}
GRADIENTS = {ops.rational: test_functional.test_gradcheck}


def samples(device: str) -> Iterator[Sample]:
    for layout, form, fused in product(LAYOUTS, "AD", (False, True)):
        made = make(layout, form, fused=fused, device=device, requires_grad=False)
        tensors = (made.x, made.numerator, made.denominator, made.bias, made.gate)
        options = {"form": ops.FORMS.index(form), "channel_dim": made.channel_dim, "dropout": made.dropout}
        options |= {"seed": torch.tensor([5], device=device)}
        yield Sample(ops.rational, tensors, options)
        yield Sample(ops.rational_backward, (made.grad, *tensors), options)
