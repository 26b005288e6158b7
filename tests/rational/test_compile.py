# SPDX-License-Identifier: Apache-2.0
"""torch.library's own checks of the ops, torch.compile, torch.export and vmap."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from singlepass.functional import rational
from singlepass.nn import KATMLP, GroupRational

from ..tolerances import assert_same_bits
from .inputs import Place, each_compiled, make

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@each_compiled
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)])
@pytest.mark.parametrize("form", ["A", "D"])
def test_compiles_into_one_graph(place: Place, compiler: str, form: str) -> None:
    if place.backend == "triton":
        pytest.skip("an explicit Triton backend beside native is a plain function, which Dynamo does not trace")
    for layout in ("rows", "planes", "chunk"):
        torch._dynamo.reset()
        inputs = make(layout, form, fused=True, device=place.device)
        expected = inputs.results(place.backend)
        call = torch.compile(inputs.call, fullgraph=True, backend=compiler)
        y = call(place.backend)
        for got, want in zip((y.detach(), *torch.autograd.grad(y, inputs.leaves, inputs.grad)), expected, strict=True):
            assert_same_bits(got, want, layout)


def test_batch_sizes_do_not_compile_anew() -> None:
    counter = CompileCounter()
    layer = GroupRational(24)
    call = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for batch in (2, 3, 17, 40):
        x = torch.randn(batch, 5, 24)
        assert_same_bits(call(x).detach(), layer(x).detach())
    assert counter.frame_count == 1


def test_a_dropout_that_changes_compiles() -> None:
    x, a, b = torch.randn(3, 24), torch.randn(1, 6), torch.randn(8, 4)
    call = torch.compile(lambda p: rational(x, a, b, dropout=p, seed=1), fullgraph=True, backend="aot_eager")
    for p in (0.1, 0.2, 0.3):
        assert_same_bits(call(p), rational(x, a, b, dropout=p, seed=1))


def test_random_numbers_are_new_in_every_call_of_a_graph() -> None:
    layer = GroupRational(24, dropout=0.5)
    call = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.ones(64, 24)
    assert not torch.equal(call(x), call(x))


@pytest.mark.parametrize("module", [lambda: GroupRational(24, form="C"), lambda: KATMLP(24, 48)], ids=["act", "mlp"])
def test_exports(module) -> None:
    model: nn.Module = module().eval()
    x = torch.randn(4, 7, 24)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    other = torch.randn(9, 7, 24)
    torch.testing.assert_close(exported.module()(other), model(other))


def test_vmap() -> None:
    a, b = torch.randn(1, 6), torch.randn(8, 4)
    x = torch.randn(3, 5, 24)
    found = torch.vmap(lambda row: rational(row, a, b))(x)
    assert_same_bits(found, rational(x, a, b, backend="eager"))
