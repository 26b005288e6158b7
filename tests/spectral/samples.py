# SPDX-License-Identifier: Apache-2.0
"""What tests/test_ops.py asks of each op of this family: arguments, and the tests that compare it with float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from singlepass._ops import spectral as ops

from ..samples import Sample
from . import test_ops

FLOAT64 = {
    ops.lorentz: test_ops.test_lorentz,
    ops.lorentz_backward: test_ops.test_lorentz,
    ops.sample: test_ops.test_draws_follow_the_distribution,
    ops.scale_: test_ops.test_scale,
    ops.step_: test_ops.test_step,
    ops.swap_: test_ops.test_swap,
}
GRADIENTS = {ops.lorentz: test_ops.test_lorentz_gradients_in_float64}


def samples(device: str) -> Iterator[Sample]:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    yield Sample(ops.scale_, (random(9, 5), random(9, 5), random(5)))
    params = [normalize(random(3, 7)), random(4).abs()]
    lists = [params, [random(3, 7), random(4)], *([torch.zeros_like(p) for p in params] for _ in "mv")]
    counts = [torch.zeros((), device=device) for _ in params]
    hyper = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}
    yield Sample(ops.step_, (*lists, counts, torch.tensor(0.1)), hyper)
    halves = [[t.bfloat16() for t in values] for values in lists]
    yield Sample(ops.step_, (*halves, counts, torch.tensor(0.1)), hyper | {"seed": 3, "ids": [0, 1]})
    draws = {"ranks": [2], "ids": [0], "seed": 1, "draw": 0, "uniform": 0.5}
    yield Sample(ops.sample, ([random(6).abs()],), draws)
    exchange = torch.tensor([-1, 3], device=device)
    yield Sample(ops.swap_, ([random(2, 5)], [random(4, 5)], [random(0)], [exchange]))
    options, log_scale = {"k": 1.0, "offset": 1.1}, torch.tensor(0.3, device=device)
    yield Sample(ops.lorentz, (random(3, 4, 5), log_scale), options)
    yield Sample(ops.lorentz_backward, (random(3, 4, 5), random(3, 4, 5), log_scale), options)
