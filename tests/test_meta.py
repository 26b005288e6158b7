# SPDX-License-Identifier: Apache-2.0
"""Modules made on meta: reset_parameters() fills all of their memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from singlepass.nn import GRKAN, KATMLP, GroupRational, LorentzLinear, SSTLinear

from .tolerances import assert_same_bits

MODULES: dict[str, Callable[..., nn.Module]] = {
    "GroupRational": partial(GroupRational, 8, 2, "silu"),
    "GRKAN": partial(GRKAN, 8, 6, groups=2),
    "KATMLP": partial(KATMLP, 8, 12, groups=2),
    "SSTLinear": partial(SSTLinear, 8, 6, 2),
    "SSTLinear, int8": partial(SSTLinear, 8, 6, 2, frozen_dtype=torch.int8),
    "LorentzLinear": partial(LorentzLinear, 8, 6, 2, scale=3.0),
}


@pytest.mark.parametrize("name", MODULES)
def test_memory_that_nobody_filled_is_filled(name: str) -> None:
    made = MODULES[name]()
    empty = MODULES[name](device="meta").to_empty(device="cpu")
    for t in empty.state_dict().values():
        t.fill_(float("nan") if t.is_floating_point() else 99)
    for module in (made, empty):
        torch.manual_seed(0)
        module.reset_parameters()
    state = empty.state_dict()
    assert state.keys() == made.state_dict().keys()
    for key, value in made.state_dict().items():
        assert_same_bits(state[key], value, key)
