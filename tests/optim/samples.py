# SPDX-License-Identifier: Apache-2.0
"""What tests/test_ops.py asks of each op of this family: arguments, and the tests that compare it with float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from singlepass._ops import optim as ops

from ..samples import Sample
from ..simt.truth import CASES
from . import test_grad_norm, test_rules, test_stream
from .steps import Mix, hyper_of, make_tensors, normal, rule_of, set_grads

FLOAT64 = {
    **{rule_of(case): test_rules.test_ten_steps_in_every_mix_of_dtypes for case in CASES},
    ops.grad_norm: test_grad_norm.test_norm_and_divisor,
    ops.grad_squares: test_grad_norm.test_sum_of_squares,
    ops.stream_: test_stream.test_values_stay,
}
LAYOUTS = {"contiguous": lambda t: t, "permuted": lambda t: t.permute(2, 0, 1).contiguous().permute(1, 2, 0)}


def samples(device: str) -> Iterator[Sample]:
    one = torch.ones((), device=device)
    more = {"maximize": True, "seed": 3, "ids": [0, 1], "offsets": [0, 3], "grad_scale": 2 * one, "found_inf": 0 * one}
    for case in (case for case in CASES if not case.label):
        for layout, mix, options in (
            ("contiguous", Mix(), {}),
            ("permuted", Mix(torch.bfloat16, torch.float16), more),
        ):
            tensors = make_tensors(case, [(3, 4, 5), (2, 1, 7)], mix, device=device, like=LAYOUTS[layout])
            set_grads(tensors, 1)
            arguments = (*tensors.arguments(case), torch.tensor(case.lr, dtype=torch.float64))
            yield Sample(rule_of(case), arguments, hyper_of(case, torch.float32) | options)
            for phase in (1, 2) if rule_of(case).has_norms else ():
                norms = torch.ones(2, 2, dtype=torch.float64, device=device)
                yield Sample(
                    rule_of(case),
                    arguments,
                    hyper_of(case, torch.float32) | options | {"norms": norms, "phase": phase},
                )
    for like in LAYOUTS.values():
        grads = [like(normal((3, 4, 5), i, device=device)) for i in range(3)]
        yield Sample(ops.grad_squares, (grads,))
        yield Sample(ops.grad_norm, (grads,))
        yield Sample(ops.grad_norm, (grads,), {"max_norm": 1.0, "grad_scale": one})
    streams = [normal((64,), i, device=device) for i in range(4)]
    yield Sample(ops.stream_, (streams[:2], streams[2:]))
