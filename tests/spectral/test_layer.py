# SPDX-License-Identifier: Apache-2.0
"""The layer: decomposition, storage, state dicts, conversion and merging."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from singlepass.spectral import LorentzLinear, SSTLinear, convert, merge, training_nbytes
from singlepass.spectral._decompose import decompose, drift

from ..tolerances import assert_same_bits, assert_within
from .backends import UNIT
from .layers import SIZES, layer_of, linear

FROZEN = {None: 16, torch.bfloat16: 2**9, torch.float16: 2**12, torch.int8: 2**9}


def orthonormal(rows: torch.Tensor, bound: float) -> None:
    gram = rows.double() @ rows.double().mT
    assert_within(gram, torch.eye(len(rows), dtype=torch.float64), torch.full_like(gram, bound), "rows")


@pytest.mark.parametrize("size", SIZES)
def test_starts_as_the_linear_layer(size: str) -> None:
    outputs, inputs, rank = SIZES[size]
    dense = linear(outputs, inputs)
    layer = SSTLinear.from_linear(dense, rank)
    u, s, v = layer.factors()
    assert u.shape == (min(outputs, inputs), outputs)
    assert v.shape == (min(outputs, inputs), inputs)
    assert (s.diff() <= 0).all()
    assert (s >= 0).all()
    orthonormal(u, 1e-6)
    orthonormal(v, 1e-6)
    # Factors are rounded once, and so are the sums over them.
    scale = (u.abs() * s[:, None]).mT.double() @ v.abs().double()
    assert_within(layer.weight, dense.weight.detach().double(), (len(s) + 4) * UNIT * scale, "W")
    x = torch.randn(7, inputs)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_keeps_dtype_bias_and_mode(dtype: torch.dtype) -> None:
    dense = linear(12, 9).to(dtype).eval()
    layer = SSTLinear.from_linear(dense, 0.25)
    assert layer.rank == 2
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert not layer.training
    assert_same_bits(layer.bias.detach(), dense.bias.detach())
    assert layer.bias.data_ptr() != dense.bias.data_ptr()
    back = layer.to_linear()
    assert type(back) is nn.Linear
    assert back.weight.dtype == dtype
    assert not back.training
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(back.weight, dense.weight, rtol=8 * eps, atol=8 * eps)


def test_gram_and_library_decompositions() -> None:
    """Well-conditioned matrices go through their Gram matrix; others, zero among them, through torch.linalg.svd."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64)).Q
    graded = basis * torch.logspace(0, -9, 30, dtype=torch.float64)
    low_rank = torch.randn(30, 4) @ torch.randn(4, 20)
    for weight in (torch.randn(30, 20), torch.randn(20, 30), graded, low_rank, torch.zeros(5, 7), torch.ones(1, 1)):
        u, s, v = decompose(weight)
        want = torch.linalg.svdvals(weight.double())
        assert_within(s, want, torch.full_like(want, 1e-12) * (1 + want.max()), "values")
        orthonormal(u, 3e-7)
        orthonormal(v, 3e-7)
        torch.testing.assert_close(
            (u * s[:, None]).mT @ v, weight.double(), rtol=0, atol=1e-6 * float(want.max() + 1e-30)
        )


def test_drift() -> None:
    u, v = torch.eye(3, 5), torch.eye(3, 4)
    assert drift(u, v) == 0.0
    v[1, 1], v[1, 2] = 0.8, 0.6
    assert drift(u, v) == pytest.approx(0.6)
    u[2, 2] = 1.5
    assert drift(u, v) == pytest.approx(1.25)


@pytest.mark.parametrize("frozen_dtype", FROZEN, ids=str)
def test_frozen_storage(frozen_dtype: torch.dtype | None) -> None:
    dense = linear(200, 150)
    layer = SSTLinear.from_linear(dense, 10, frozen_dtype=frozen_dtype)
    assert layer.frozen_u.dtype == layer.frozen_v.dtype == layer.frozen_dtype == (frozen_dtype or torch.float32)
    assert layer.scales_u.shape == ((140, 2) if frozen_dtype == torch.int8 else (0,))
    assert not layer.frozen_u.requires_grad
    error = (layer.weight - dense.weight).abs().max() / dense.weight.abs().max()
    assert error < 16 / FROZEN[frozen_dtype], error
    assert ("frozen_dtype" in repr(layer)) == (frozen_dtype is not None)


def test_bytes() -> None:
    """The published counts for rank d / 16, and less with frozen vectors in 16 bits."""
    d, rank = 512, 32
    dense = training_nbytes(nn.Linear(d, d, bias=False))
    assert dense == {"weights": 4 * d * d, "gradients": 4 * d * d, "states": 8 * d * d, "total": 16 * d * d}
    layer = training_nbytes(SSTLinear(d, d, rank, bias=False, device="meta"))
    vectors = 2 * rank * d
    assert layer["weights"] == 4 * (2 * d * d + d) + 8  # the count of draws
    assert layer["gradients"] == 4 * (vectors + d)
    assert layer["states"] == 8 * (vectors + d)
    assert layer["total"] / dense["total"] < 0.65
    galore = 4 * (2 * d * d + 3 * rank * d)
    half = training_nbytes(SSTLinear(d, d, rank, bias=False, frozen_dtype=torch.bfloat16, device="meta"))
    assert half["total"] < galore < layer["total"]
    small = training_nbytes(SSTLinear(d, d, rank, bias=False, frozen_dtype=torch.int8, device="meta"))
    assert small["weights"] == 4 * (vectors + d) + 2 * (d - rank) * (d + 4 * d // 128) + 8


def test_galore_keeps_more_than_bfloat16_vectors() -> None:
    """The peer's own optimizer, its states counted after a step."""
    galore_torch = pytest.importorskip("galore_torch")
    d, rank = 256, 16
    dense = nn.Linear(d, d, bias=False)
    group = {"params": [dense.weight], "rank": rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    optimizer = galore_torch.GaLoreAdamW([group], lr=1e-3)
    dense(torch.randn(9, d)).square().mean().backward()
    optimizer.step()
    state = optimizer.state[dense.weight]
    held = [t for t in state.values() if isinstance(t, torch.Tensor)] + [state["projector"].ortho_matrix]
    kept = dense.weight.nbytes + dense.weight.grad.nbytes + sum(t.nbytes for t in held)
    ours = SSTLinear(d, d, rank, bias=False, frozen_dtype=torch.bfloat16)
    assert training_nbytes(ours)["total"] < kept


def test_state_dict_bit_for_bit() -> None:
    for frozen_dtype in FROZEN:
        layer = layer_of("tall", frozen_dtype=frozen_dtype)
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        other = SSTLinear(24, 40, 5, frozen_dtype=frozen_dtype)
        other.load_state_dict(torch.load(file, weights_only=True))
        for name, value in layer.state_dict().items():
            assert_same_bits(other.state_dict()[name], value, name)


def test_a_state_of_another_rank_loads() -> None:
    layer, other = layer_of("tall"), SSTLinear(24, 40, 9)
    other.load_state_dict(layer.state_dict())
    assert other.rank == 5
    assert_same_bits(other.weight, layer.weight)
    with pytest.raises(RuntimeError, match="size mismatch"):
        SSTLinear(24, 41, 5).load_state_dict(layer.state_dict())


def test_copies_and_conversions() -> None:
    layer = layer_of("tall", frozen_dtype=torch.int8)
    twin = copy.deepcopy(layer)
    assert_same_bits(twin.weight, layer.weight)
    twin.active_u.data.zero_()
    assert layer.active_u.abs().max() > 0
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.frozen_dtype == torch.int8
    assert half.scales_u.dtype == torch.float32
    assert half(torch.randn(2, 24).bfloat16()).dtype == torch.bfloat16


def test_factors_of_codes_keep_their_bits() -> None:
    layer = layer_of("tall", frozen_dtype=torch.int8)
    before = layer.scales_u.clone()
    assert_same_bits(layer.to(torch.bfloat16).float().scales_u, before)


def test_a_failed_load_leaves_the_rank() -> None:
    layer, other = layer_of("tall"), SSTLinear(24, 41, 7)
    old = other.active_u
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(layer.state_dict())
    assert other.rank == 7
    assert other.active_u is old


def test_rank_can_change() -> None:
    layer = layer_of("tall")
    before, old = layer.factors(), layer.active_u
    assert not layer.set_rank(5)
    assert layer.active_u is old
    for rank in (9, 24, 1):
        assert layer.set_rank(rank)
        assert layer.rank == len(layer.active_u) == len(layer.active_v) == rank
        assert layer.active_u.requires_grad
        for new, was in zip(layer.factors(), before, strict=True):
            assert_same_bits(new, was)


def test_bad_layers_are_refused() -> None:
    dense = linear(6, 4)
    for rank in (0, 5, -1, 1.5, 0.0, True, "2"):
        with pytest.raises(ValueError, match="expected a rank from 1 to 4"):
            SSTLinear.from_linear(dense, rank)
    broken = linear(6, 4)
    broken.weight.data[2, 1] = float("nan")
    for call, text in (
        (lambda: SSTLinear.from_linear(broken, 2), "a finite weight"),
        (lambda: SSTLinear.from_linear(nn.Conv1d(4, 6, 1), 2), r"a torch\.nn\.Linear"),
        (lambda: SSTLinear.from_linear(nn.Linear(4, 6, device="meta"), 2), "a weight with values"),
        (lambda: SSTLinear(4, 6, 2, frozen_dtype=torch.int16), "frozen_dtype"),
        (lambda: SSTLinear(4, 6, 2, gradient="full"), "gradient among"),
        (lambda: SSTLinear(4, 6, 2, evaluation="dense"), "evaluation among"),
        (lambda: SSTLinear(0, 6, 2), "in_features and out_features"),
        (lambda: SSTLinear(4, 6, 2).set_weight(torch.ones(4, 6)), "a weight of shape"),
        (lambda: LorentzLinear(4, 1, 1), "out_features of at least 2"),
        (lambda: LorentzLinear(4, 3, 1, k=2.0), "k > 0, offset >= sqrt"),
        (lambda: LorentzLinear(4, 3, 1, scale=0.0), "a positive scale"),
    ):
        with pytest.raises(ValueError, match=f"expected {text}"):
            call()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 16)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))] * 2
        )
        self.shared = nn.Linear(16, 16)
        self.again = self.shared
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.lm_head = nn.Linear(16, 11, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        x = self.again(self.shared(x))
        return self.lm_head(x + self.attention(x, x, x)[0])


def spectral_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, SSTLinear)}


def test_convert_and_merge() -> None:
    model, tokens = Model(), torch.randint(11, (2, 5))
    before = model(tokens)
    assert convert(model, 0.25) is model
    both = {f"blocks.{i}.{j}" for i in (0, 1) for j in (1, 3)}
    assert spectral_names(model) == both | {"shared", "again"}
    assert model.shared is model.again
    assert model.blocks[0] is model.blocks[1]
    torch.testing.assert_close(model(tokens), before, rtol=1e-4, atol=1e-5)
    assert merge(model) is model
    assert not spectral_names(model)
    assert model.shared is model.again
    torch.testing.assert_close(model(tokens), before, rtol=1e-4, atol=1e-5)


def test_layers_to_skip() -> None:
    for skip, left in (
        (["shared", "again"], {"blocks.0.1", "blocks.0.3", "blocks.1.1", "blocks.1.3"}),
        (["blocks.*", "again"], {"shared"}),
        ("*.3", {"blocks.0.1", "blocks.1.1", "shared", "again"}),
    ):
        assert spectral_names(convert(Model(), 2, skip=skip)) == left


def test_what_is_not_trained_stays_linear() -> None:
    model = Model()
    model.shared.weight.requires_grad_(False)
    model.blocks[0][1].bias.requires_grad_(False)
    model.blocks[0][3] = torch.nn.utils.parametrizations.weight_norm(model.blocks[0][3])
    convert(model, 2)
    assert spectral_names(model) == {"blocks.0.1", "blocks.1.1"}
    assert not model.blocks[0][1].bias.requires_grad


def test_a_transformer_of_torch_runs_in_eval_mode() -> None:
    """Its fast path reads the weights of its linear layers."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        want = layer(x)
        torch.testing.assert_close(convert(layer, 4)(x), want, rtol=1e-4, atol=1e-5)


def test_lorentz_layers_are_not_merged() -> None:
    model = nn.Sequential(nn.Linear(4, 4), LorentzLinear(4, 5, 2))
    merge(convert(model, 2))
    assert [type(m) for m in model] == [nn.Linear, LorentzLinear]
    with pytest.raises(NotImplementedError, match="LorentzLinear: expected"):
        model[1].to_linear()


def test_bad_conversions_leave_the_model_alone() -> None:
    for arguments, text in (
        ({"rank": 17}, "convert: layer .*: expected a rank from 1 to 16"),
        ({"rank": 2, "skip": ["*"]}, "convert: expected torch.nn.Linear or Conv1D layers inside the model"),
        ({"rank": 2, "gradient": "x"}, "gradient among"),
        ({"rank": 2, "backend": "x"}, "backend among"),
        ({"rank": 2, "skip": ["shared", "typo"]}, "names of modules to skip; got 'typo'"),
    ):
        model = Model()
        with pytest.raises(ValueError, match=text):
            convert(model, **arguments)
        assert not spectral_names(model)
    model = Model()
    model.shared.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="convert: layer shared: expected a finite weight"):
        convert(model, 2)
    assert not spectral_names(model)
    with pytest.raises(ValueError, match="merge: expected a model with SSTLinear layers"):
        merge(model)
    model = convert(Model(), 2)
    with pytest.raises(ValueError, match=r"convert: expected .*; got none in Model\. It has been converted already\."):
        convert(model, 2)
    model.blocks[0][3].singular_values.data[1] = float("nan")
    with pytest.raises(ValueError, match=r"merge: blocks\.0\.3: expected a finite weight"):
        merge(model)
    assert len(spectral_names(model)) == 6


def test_lorentz_linear_is_hybonet_s() -> None:
    """The authors' layer, written out: a dense layer, the time from its first output, the rest rescaled."""
    torch.manual_seed(0)
    layer = LorentzLinear(9, 17, rank=2, dropout=0.5, activation=torch.relu).eval()
    x = torch.randn(5, 9, requires_grad=True)
    z = torch.nn.functional.linear(torch.relu(x), layer.weight, layer.bias)
    time = z[:, :1].sigmoid() * layer.log_scale.exp() + 1.1
    space = z[:, 1:]
    want = torch.cat(
        (time, space * ((time * time - 1) / space.square().sum(-1, keepdim=True).clamp(min=1e-8)).sqrt()), -1
    )
    got = layer(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert layer.log_scale.exp().item() == pytest.approx(10.0)
    grad = torch.randn_like(want)
    leaves = (x, layer.log_scale, layer.bias)
    for a, b in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    fixed = LorentzLinear.from_linear(linear(6, 4), 2, train_scale=False, scale=2.0)
    assert not fixed.log_scale.requires_grad
    assert fixed.log_scale.exp().item() == pytest.approx(2.0)
