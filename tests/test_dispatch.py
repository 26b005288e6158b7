# SPDX-License-Identifier: Apache-2.0
"""Which backend runs: the automatic order and its line in the log, strict wishes, the reasons against a backend."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad

from singlepass import _native, optim
from singlepass._autograd import has_tangent
from singlepass._ops import BACKENDS, OPS, op, requested

FLOAT32 = frozenset((torch.float32,))
OP = OPS["lion_step_"]


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test finds out for itself what can run, and has the log to itself."""
    monkeypatch.setattr(OP, "_obstacles", {})
    monkeypatch.setattr(OPS["stream_"], "_obstacles", {})
    monkeypatch.setattr(OP, "_chosen", {})
    monkeypatch.setattr(OP, "_logged", set())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def pretend(monkeypatch: pytest.MonkeyPatch, *, cpu: bool = True, cuda: bool = True, triton: bool = True) -> None:
    """Libraries and Triton as if they were there, or not."""
    there = {"cpu": cpu, "cuda": cuda}
    find = importlib.util.find_spec
    monkeypatch.setattr(
        _native,
        "status",
        lambda device: _native.LibraryStatus(there[device], Path("x.so"), "" if there[device] else "not built"),
    )
    monkeypatch.setattr(_native, "has_kernel", lambda name, device: there[device])
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: (object() if triton else None) if name == "triton" else find(name)
    )


@pytest.mark.parametrize(
    ("device", "there", "expected"),
    [
        ("cpu", {}, "native"),
        ("cpu", {"cpu": False}, "eager"),
        ("cuda", {}, "native"),
        ("cuda", {"cuda": False}, "triton"),
        ("cuda", {"cuda": False, "triton": False}, "eager"),
        ("mps", {}, "eager"),
        ("meta", {}, "eager"),
    ],
)
def test_the_automatic_order(
    monkeypatch: pytest.MonkeyPatch, device: str, there: dict[str, bool], expected: str
) -> None:
    pretend(monkeypatch, **there)
    assert OP.choose(device, FLOAT32, None) == expected


def test_a_library_without_the_ops_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr(_native, "has_kernel", lambda name, device: name != OP.name)
    assert OP.choose("cuda", FLOAT32, None) == "triton"
    with pytest.raises(RuntimeError, match="the native library for cuda has no kernel for this op"):
        OP.choose("cuda", FLOAT32, "native")


@pytest.mark.parametrize("dtypes", [(torch.float64,), (torch.float32, torch.float64)], ids=str)
def test_dtypes_that_kernels_do_not_take_go_to_eager(dtypes: tuple[torch.dtype, ...]) -> None:
    assert OP.choose("cpu", frozenset(dtypes), None) == "eager"
    with pytest.raises(RuntimeError, match=r"not torch\.float64"):
        OP.choose("cpu", frozenset(dtypes), "native")


def test_the_choice_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pretend(monkeypatch, cuda=False)
    with caplog.at_level(logging.INFO, "singlepass"):
        for _ in range(3):
            OP.choose("cuda", FLOAT32, None)
            OP.choose("cpu", FLOAT32, None)
    assert [record.getMessage() for record in caplog.records] == [
        "lion_step_ on cuda: triton; native: not built",
        "lion_step_ on cpu: native",
    ]


@pytest.mark.usefixtures("fresh_dynamo")
def test_what_is_logged_compiles_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    counter = CompileCounter()
    compiled = torch.compile(lambda x: x + len(OP.choose("cpu", FLOAT32, None)), backend=counter, fullgraph=True)
    compiled(torch.ones(3))
    OP.choose("cpu", FLOAT32, None)
    compiled(torch.ones(3))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_dynamo")
def test_forward_mode_elsewhere_compiles_nothing_anew() -> None:
    counter = CompileCounter()
    compiled = torch.compile(lambda x: x + int(has_tangent(x)), backend=counter, fullgraph=True)
    compiled(torch.ones(3))
    with forward_ad.dual_level():
        compiled(torch.ones(3))
    assert counter.frame_count == 1


def test_steps_log_once(caplog: pytest.LogCaptureFixture) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with caplog.at_level(logging.INFO, "singlepass"):
        for _ in range(2):
            optimizer = optim.Lion([p])
            for _ in range(2):
                optimizer.step()
    assert [record.getMessage() for record in caplog.records] == ["lion_step_ on cpu: native"]


def test_an_explicit_choice_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "singlepass"):
        OP.choose("cpu", FLOAT32, "eager")
    assert not caplog.records


@pytest.mark.parametrize(
    ("backend", "device", "reason"),
    [
        ("native", "mps", "there is no native library for mps"),
        ("triton", "cpu", "Triton kernels run on cuda, not on cpu"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused(monkeypatch, backend: str, device: str, reason: str) -> None:
    pretend(monkeypatch)
    with pytest.raises(RuntimeError, match=rf"^{OP.name}: expected backend '{backend}' to be usable; got {reason}\. "):
        OP.choose(device, FLOAT32, backend)
    assert OP.rejection(backend, device) == reason


def test_reasons_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cpu=False, cuda=False, triton=False)
    assert OP.rejection("native", "cpu") == "not built"
    assert OP.rejection("native", "cuda") == "not built"
    assert OP.rejection("triton", "cuda") == "triton is not installed"
    assert OPS["stream_"].rejection("triton", "cuda") == "there is no Triton kernel for this op"
    everywhere = {op.rejection("triton", "cpu") for op in OPS.values()}  # one line of `singlepass info`, not two
    assert everywhere == {"Triton kernels run on cuda, not on cpu"}
    assert OP.rejection("eager", "anything") is None


def test_rocm_gets_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, too, tensors are on cuda and Triton can be installed."""
    pretend(monkeypatch, cuda=False)
    monkeypatch.setattr(torch.version, "hip", "7.2")
    assert OP.choose("cuda", FLOAT32, None) == "eager"
    reasons = {op.rejection("triton", "cuda") for op in (OP, OPS["stream_"])}
    assert reasons == {"Triton kernels are for NVIDIA GPUs, and this torch is for ROCm"}


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^lion_step_: expected backend among native, triton, eager; got 'fpga'\. "):
        OP.choose("cpu", FLOAT32, "fpga")


@pytest.mark.parametrize("environment", ["triton", "fpga"])
def test_the_environment_is_as_strict(wish: Callable[[str], None], environment: str) -> None:
    wish(environment)
    with pytest.raises((RuntimeError, ValueError), match=environment):
        optim.Lion([torch.nn.Parameter(torch.ones(3))])


@pytest.mark.parametrize(
    ("environment", "argument", "expected"),
    [
        (None, None, None),
        ("eager", None, "eager"),
        ("eager", "native", "native"),
    ],
)
def test_the_argument_goes_before_the_environment(
    wish: Callable[[str], None], environment: str | None, argument: str | None, expected: str | None
) -> None:
    if environment is not None:
        wish(environment)
    assert requested(argument) == expected


@pytest.mark.parametrize(("value", "wish"), [("", None), ("eager", "eager")])
def test_the_environment_is_read_at_the_import(value: str, wish: str | None) -> None:
    command = [sys.executable, "-c", "from singlepass._ops import requested; print(requested(None))"]
    environment = os.environ | {"SINGLEPASS_BACKEND": value}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert found == f"{wish}\n"


def test_a_change_after_the_import_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SINGLEPASS_BACKEND", "eager")
    monkeypatch.setattr(op, "_FOUND", None)
    found = r"^SINGLEPASS_BACKEND: expected None, as when singlepass was imported; got 'eager'\. Set it before, or "
    with pytest.raises(ValueError, match=found):
        optim.Lion([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match=found):
        OP.choose("cpu", FLOAT32)


@pytest.mark.parametrize("by", ["argument", "environment"])
@pytest.mark.parametrize("backend", ["native", "eager"])
def test_the_wish_is_what_runs(
    monkeypatch: pytest.MonkeyPatch, wish: Callable[[str], None], backend: str, by: str
) -> None:
    calls: list[str] = []
    for name in ("native", "eager"):
        function = OP.on(name)
        spy = lambda *a, _name=name, _function=function, **k: (calls.append(_name), _function(*a, **k))[0]  # noqa: E731
        monkeypatch.setitem(OP._functions, name, spy)
    if by == "environment":
        wish(backend)
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optim.Lion([p], backend=backend if by == "argument" else None).step()
    assert calls == [backend]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_every_implementation_can_be_called_directly(name: str, backend: str) -> None:
    """Triton's launchers, too, which register when they are imported."""
    if backend == "triton":
        pytest.importorskip("triton")
        if not OPS[name].has_triton:
            return
    assert callable(OPS[name].on(backend))
