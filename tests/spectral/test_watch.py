# SPDX-License-Identifier: Apache-2.0
"""Whoever trains a converted model by another optimizer is told, once; nobody else is."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from singlepass import optim, spectral
from singlepass.spectral import SST, SSTLinear, _watch

from .training import SCHEDULE, layers_of, model_of

Make = Callable[[nn.Module], torch.optim.Optimizer]

OTHERS: dict[str, Make] = {
    "torch AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.1),
    "torch SGD": lambda model: torch.optim.SGD(model.parameters(), lr=5.0),
    "AdamW": lambda model: optim.AdamW(model.parameters(), lr=0.1),
    "eager Lion": lambda model: optim.Lion(model.parameters(), lr=0.1, backend="eager"),
}


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[warnings.WarningMessage]]:
    """The warnings of a test; nobody has been warned before."""
    monkeypatch.setattr(_watch, "_warned", False)
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        yield messages


def train(model: nn.Module, optimizer: torch.optim.Optimizer | None, steps: int = 6) -> None:
    """Forward and backward passes, and steps of the optimizer if there is one."""
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(1)).to(layers_of(model)[0].active_u.dtype)
    for _ in range(steps):
        model(x).square().mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("name", OTHERS)
def test_other_optimizers_warn_once(told: list[warnings.WarningMessage], name: str) -> None:
    for _ in range(2):  # also if a second model goes the same way
        model = model_of()
        train(model, OTHERS[name](model))
    (warning,) = told
    assert warning.category is UserWarning
    text = str(warning.message)
    assert text.startswith("SSTLinear: expected singular vectors of unit length")
    assert text.endswith("let them leave unit length.")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("frozen", [None, torch.int8], ids=["", "int8"])
def test_sst_does_not(told: list[warnings.WarningMessage], dtype: torch.dtype, frozen: torch.dtype | None) -> None:
    model = model_of(dtype, frozen_dtype=frozen)
    train(model, SST(model, lr=0.05, rank_schedule=lambda draw: 2 + draw % 3, **SCHEDULE), steps=30)
    spectral.merge(model)
    assert not told


def test_sst_never_reads_the_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU reading waits for all that is queued."""
    model = model_of()
    optimizer = SST(model, lr=0.05, **SCHEDULE)
    train(model, optimizer, steps=1)
    monkeypatch.setattr(_watch, "off_unit", lambda *_: pytest.fail("the vectors were read"))
    train(model, optimizer, steps=14)


def test_small_steps_are_found_late_and_cost_little(
    told: list[warnings.WarningMessage], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    off_unit = _watch.off_unit
    monkeypatch.setattr(_watch, "off_unit", lambda u, v: calls.append(None) or off_unit(u, v))
    layer = SSTLinear(12, 20, 3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-9)
    train(nn.Sequential(layer), optimizer, steps=64)
    assert not told
    assert len(calls) == 6  # after 1, 2, 4, 8, 16 and 32 steps; the last step is not looked at
    optimizer.param_groups[0]["lr"] = 0.1
    train(nn.Sequential(layer), optimizer, steps=70)
    assert len(told) == 1
    assert len(calls) == 8


def loaded(model: nn.Module) -> nn.Module:
    model.load_state_dict(model_of().state_dict())
    return model


def assigned(model: nn.Module) -> nn.Module:
    model.load_state_dict(model_of().state_dict(), assign=True)
    return model


def converted(model: nn.Module) -> nn.Module:
    return model.bfloat16().half().float()


def emptied(model: nn.Module) -> nn.Module:
    model.to_empty(device="cpu").load_state_dict(model_of().state_dict())
    return model


def initialised(model: nn.Module) -> nn.Module:
    for layer in layers_of(model):
        layer.reset_parameters()
        layer.set_weight(torch.zeros_like(layer.weight))
    return model


def written(model: nn.Module) -> nn.Module:
    for layer in layers_of(model):
        layer.active_u.data = -layer.active_u.data
        layer.active_v.data.neg_()
    return model


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize(
    "change",
    [loaded, assigned, converted, emptied, initialised, written, pickled, copy.deepcopy],
    ids=lambda f: f.__name__,
)
def test_what_leaves_vectors_their_length_does_not(
    told: list[warnings.WarningMessage], change: Callable[[nn.Module], nn.Module]
) -> None:
    model = model_of()
    train(model, None, steps=1)
    model = change(model)
    train(model, None)
    spectral.merge(model)
    assert not told


@pytest.mark.parametrize("mode", ["eval", "no_grad"])
def test_only_training_is_watched(told: list[warnings.WarningMessage], mode: str) -> None:
    model = model_of()
    with torch.no_grad():
        layers_of(model)[0].active_u.mul_(3.0)
        if mode == "no_grad":
            model(torch.randn(6, 12))
    if mode == "eval":
        model.eval()(torch.randn(6, 12))
    assert not told
    train(model.train(), None, steps=1)
    assert len(told) == 1


def test_compiled_training_goes_on_without_a_break(told: list[warnings.WarningMessage]) -> None:
    torch._dynamo.reset()
    model = model_of()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        compiled(torch.randn(6, 12)).square().mean().backward()
        optimizer.step()
    assert not [w for w in told if "unit length" in str(w.message)]  # a compiled pass does not look
    spectral.merge(model)
    assert len([w for w in told if "unit length" in str(w.message)]) == 1


def test_traces_are_left_alone(told: list[warnings.WarningMessage], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_watch, "off_unit", lambda *_: pytest.fail("the vectors were read"))
    model = nn.Sequential(SSTLinear(12, 20, 3))
    with torch.no_grad():
        model[0].active_u.neg_()
    torch.jit.trace(model, torch.randn(6, 12))
    torch.export.export(model, (torch.randn(6, 12),))
    assert not [w for w in told if "unit length" in str(w.message)]


def test_layers_made_in_inference_mode() -> None:
    with torch.inference_mode():
        layer = SSTLinear(8, 8, 2)
        assert layer(torch.randn(3, 8)).shape == (3, 8)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        layer(torch.randn(3, 8))


def test_merging_tells_what_was_trained_wrongly(told: list[warnings.WarningMessage]) -> None:
    model = model_of()
    with torch.no_grad():
        layers_of(model)[0].active_v.mul_(2.5)
    model.eval()
    x = torch.randn(6, 12)
    y = model(x)
    linear = layers_of(model)[0].to_linear()
    torch.testing.assert_close(linear(x), layers_of(model)[0](x))
    torch.testing.assert_close(spectral.merge(model)(x), y)
    first, second = (str(warning.message) for warning in told)
    assert first.startswith("SSTLinear.to_linear: expected singular vectors of unit length")
    assert second.startswith("merge: expected singular vectors of unit length")
    assert "got lengths from 1 to 2.5 in 0 (1 of 2 layers). " in second
