# SPDX-License-Identifier: Apache-2.0
"""What public entries do on the host, where a GPU would wait for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from counting.host import ALLOCATIONS, COPIES, HostReadError, host_ops
from singlepass import functional, kv, nn, optim
from singlepass.kv._steps import Planned

from . import budgets
from .budgets import HOST_BUDGETS, HostBudget
from .exceptions import faults

Call = Callable[[], object]
HEADS, WIDTH, TOKENS = 2, 32, 64
OPTIMIZERS = [name for name in dir(optim) if isinstance(getattr(optim, name), type)]


def step(name: str) -> Call:
    """Of an optimizer over three parameters."""
    params = [torch.nn.Parameter(torch.randn(8, 8)) for _ in range(3)]
    for p in params:
        p.grad = torch.randn_like(p)
    return getattr(optim, name)(params, lr=1e-3).step


def clipping() -> Call:
    params = [torch.nn.Parameter(torch.randn(8, 8)) for _ in range(3)]
    for p in params:
        p.grad = torch.randn_like(p)
    return lambda: optim.clip_grad_norm_(params, 1.0)


def spectral_step() -> Call:
    model = torch.nn.Sequential(nn.SSTLinear(16, 16, 4))
    optimizer = optim.SST(model, lr=1e-3)
    model(torch.randn(8, 16)).sum().backward()
    return optimizer.step


def trained(module: torch.nn.Module, *shape: int) -> Call:
    """A forward and a backward pass."""
    x = torch.randn(*shape, requires_grad=True)
    return lambda: module(x).sum().backward()


def function(name: str, *shape: int, **options: object) -> Call:
    x = torch.randn(*shape)
    return lambda: getattr(functional, name)(x, **options)


def product() -> Call:
    """Of x with a layer's vectors: four that are trained, and the others."""
    x, layer = torch.randn(8, 16), nn.SSTLinear(16, 16, 4, bias=False)
    values = layer.active_u, layer.active_v, layer.singular_values, layer.frozen_u, layer.frozen_v
    return lambda: functional.sst_linear(x, *values)


def tokens(count: int = TOKENS) -> Tensor:
    return torch.randn(1, HEADS, count, WIDTH)


def quantized() -> tuple[kv.Quantized, kv.Quantized]:
    keys = functional.quantize(tokens(), 4, axis="channel", block=32)
    return keys, functional.quantize(tokens(), 4, axis="token", block=32, channel_separable=True)


def restore() -> Call:
    keys, _ = quantized()
    return lambda: functional.dequantize(keys)


def attention() -> Call:
    window, range_of_window = tokens(16), torch.tensor([[0, 16]], dtype=torch.int32)
    segments, q = [quantized()], tokens(1)
    return lambda: functional.decode_attention(q, segments, window, window, range_of_window)


def saliency() -> Call:
    q, k, positions = tokens(4), tokens(), torch.tensor([10, 20, 40, 63])
    return lambda: functional.probe_saliency(q, k, positions)


def decoding(layer: kv.ZipCacheLayer | kv.MatryoshkaLayer) -> Call:
    """A step of generation after a prompt and a few steps, which leave room for the next."""
    prompt, new = tokens(300), tokens(1)
    layer.prefill(prompt, prompt, prompt)
    for _ in range(8):
        layer.step(new, new, new)
    return lambda: layer.step(new, new, new)


def planned(layer: kv.ZipCacheLayer | kv.MatryoshkaLayer) -> Call:
    """The same as a step that is planned, with what the host does before."""
    step, new = decoding(layer), tokens(1)

    def call() -> None:
        with layer.planned():
            layer.step(new, new, new)

    step()
    return call


def low_rank(ranks: int | list[int] = 16, bits: tuple[int, int] | None = None, **options: int) -> kv.MatryoshkaLayer:
    bases = torch.linalg.qr(torch.randn(HEADS, WIDTH, WIDTH)).Q
    return kv.MatryoshkaLayer(bases, bases, key_ranks=16, value_ranks=ranks, bits=bits, **options)


def rational_arguments() -> dict[str, Tensor]:
    return {"numerator": torch.randn(1, 6), "denominator": torch.randn(8, 4)}


ENTRIES: dict[str, Callable[[], Call]] = {
    **{f"optim.{name}.step": (lambda name=name: step(name)) for name in OPTIMIZERS if name != "SST"},
    "optim.SST.step": spectral_step,
    "optim.clip_grad_norm_": clipping,
    "nn.GroupRational": lambda: trained(nn.GroupRational(64), 4, 64),
    "nn.GRKAN": lambda: trained(nn.GRKAN(64, 64), 4, 64),
    "nn.KATMLP": lambda: trained(nn.KATMLP(64), 4, 64),
    "nn.SSTLinear": lambda: trained(nn.SSTLinear(16, 16, 4), 8, 16),
    "nn.LorentzLinear": lambda: trained(nn.LorentzLinear(17, 17, 4), 8, 17),
    "functional.lorentz": lambda: function("lorentz", 8, 17, log_scale=torch.zeros(())),
    "functional.sst_linear": product,
    "functional.rational": lambda: function("rational", 4, 64, **rational_arguments()),
    "functional.quantize": lambda: function("quantize", 1, HEADS, TOKENS, WIDTH, bits=4, axis="channel", block=32),
    "functional.dequantize": restore,
    "functional.decode_attention": attention,
    "functional.probe_saliency": saliency,
    "kv.ZipCacheLayer": lambda: decoding(kv.ZipCacheLayer()),
    "kv.MatryoshkaLayer": lambda: decoding(low_rank()),
    "kv.MatryoshkaLayer, ragged ranks": lambda: decoding(low_rank([16, 32])),
    "kv.MatryoshkaLayer, 4 and 2 bits": lambda: decoding(low_rank(bits=(4, 2))),
    "kv.ZipCacheLayer, planned": lambda: planned(kv.ZipCacheLayer(max_tokens=400)),
    "kv.MatryoshkaLayer, planned": lambda: planned(low_rank(max_tokens=400)),
    "kv.MatryoshkaLayer, 4 and 2 bits, planned": lambda: planned(low_rank(bits=(4, 2), max_tokens=400)),
}


@pytest.mark.slow("the first step of an optimizer imports much of torch")
@pytest.mark.parametrize("budget", HOST_BUDGETS, ids=lambda budget: budget.entry)
def test_a_call_keeps_its_budget(budget: HostBudget, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(Planned, "_check_written", lambda layer, tokens: None)  # reads on CPUs alone
    ops = host_ops(ENTRIES[budget.entry]())
    assert sum(ops.own.values()) == budget.ours
    counts = {
        budgets.ATEN: (sum(ops.aten.values()), budget.aten),
        budgets.ALLOCATED: (ops.count(*ALLOCATIONS), budget.allocations),
        budgets.COPIED: (ops.count(*COPIES), budget.copies),
    }
    assert faults(budget.entry, counts) == []


@pytest.mark.slow("imports Transformers, where that is installed")
def test_every_entry_has_a_budget() -> None:
    assert [budget.entry for budget in HOST_BUDGETS] == list(ENTRIES)
    called = {f"functional.{name}" for name in functional.__all__} | {f"optim.{name}.step" for name in OPTIMIZERS}
    called |= {f"optim.{name}" for name in dir(optim) if name.startswith("clip_")}
    called |= {f"nn.{name}" for name in nn.__all__ if hasattr(getattr(nn, name), "forward")}
    called |= {f"kv.{name}" for name in kv.__all__ if hasattr(getattr(kv, name), "attend")}
    assert called == {entry.partition(",")[0] for entry in ENTRIES}


def test_a_read_of_a_value_is_an_error() -> None:
    x = torch.ones(3)
    with pytest.raises(HostReadError, match=r"expected no read of a value; got _local_scalar_dense\. Keep the value"):
        host_ops(lambda: x.sum().item())
    assert host_ops(lambda: x.sum().item(), allow_reads=True).count("_local_scalar_dense") == 1


def test_ops_are_counted() -> None:
    x = torch.ones(3)
    ops = host_ops(lambda: torch.empty_like(x).copy_(x))
    assert dict(ops.aten) == {"empty_like": 1, "copy_": 1}
