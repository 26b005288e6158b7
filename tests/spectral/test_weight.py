# SPDX-License-Identifier: Apache-2.0
"""``layer.weight`` is a copy: reading it is as of any tensor, and writing to it raises an error."""

from __future__ import annotations

import copy
import io
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from singlepass import spectral

from ..tolerances import assert_same_bits
from .layers import layer_of
from .training import SCHEDULE, layers_of, model_of, run

WRITES: dict[str, Callable[[Tensor], Any]] = {
    "init": nn.init.zeros_,
    "init with its own dispatch": nn.init.kaiming_uniform_,
    "in place": lambda w: w.mul_(2.0),
    "in place by an operator": lambda w: operator.iadd(w, 1.0),
    "an element": lambda w: operator.setitem(w, (0, 0), 1.0),
    "of data": lambda w: w.data.normal_(),
    "data": lambda w: setattr(w, "data", torch.zeros(40, 24)),
    "of a view": lambda w: w.T[0].fill_(1.0),
    "of a part": lambda w: nn.init.zeros_(w.chunk(2)[1]),
    "of what is detached": lambda w: w.detach().copy_(torch.zeros(40, 24)),
    "of a list": lambda w: torch._foreach_zero_([w]),
    "to train": nn.Parameter,
}


@pytest.mark.parametrize("how", WRITES)
def test_writing_is_refused(how: str) -> None:
    layer = layer_of("tall")
    before = layer.weight
    with pytest.raises(RuntimeError, match=r"SSTLinear: expected a weight that is set by set_weight.* of a copy\."):
        WRITES[how](layer.weight)
    assert_same_bits(layer.weight, before)


@pytest.mark.parametrize("value", [torch.zeros(40, 24), nn.Parameter(torch.zeros(40, 24)), None], ids=type)
def test_assigning_is_refused(value: Tensor | None) -> None:
    layer = layer_of("tall")
    with pytest.raises(AttributeError, match=r"SSTLinear: expected a weight .*; got an assignment\. Call set_weight"):
        layer.weight = value  # type: ignore[misc]


def test_reading_gives_plain_tensors() -> None:
    layer, x = layer_of("tall"), torch.randn(3, 24, requires_grad=True)
    weight = layer.weight
    results = [weight.clone(), weight + 0.0, 1.0 * weight, weight.double(), F.linear(x, weight), copy.deepcopy(weight)]
    assert {type(t) for t in results} == {Tensor}
    assert_same_bits(weight.clone().zero_(), torch.zeros(40, 24))
    dense = nn.Linear(24, 40)
    with torch.no_grad():
        dense.weight.copy_(weight)
    assert_same_bits(dense.weight, weight)
    F.linear(x, weight).sum().backward()
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    assert_same_bits(torch.load(file, weights_only=True), weight)
    compiled = torch.compile(lambda t: F.linear(t, layer.weight), backend="aot_eager", fullgraph=True)
    assert_same_bits(compiled(x), F.linear(x, weight))


def test_codes_stay_frozen() -> None:
    """``model.requires_grad_(True)`` works, whatever frozen vectors are made of, and changes nothing about them."""
    for how in (lambda m: m, copy.deepcopy, lambda m: m.to("meta").to_empty(device="cpu"), reloaded):
        model = how(model_of(frozen_dtype=torch.int8))
        model.requires_grad_(False)
        model.requires_grad_(True)
        for layer in layers_of(model):
            assert [p.requires_grad for p in layer.vectors()] == [True, True, False, False]
    model = model_of(frozen_dtype=torch.int8).requires_grad_(True)
    run(model, spectral.SST(model, lr=1e-2, **SCHEDULE), 5)


def reloaded(model: nn.Sequential) -> nn.Sequential:
    model.load_state_dict(model.state_dict(), assign=True)
    return model
