# SPDX-License-Identifier: Apache-2.0
"""How much attention tokens get from probes, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ..placed import implementation
from ..simt.bounded import HALF_ULP, Bounded
from ..tolerances import assert_same_bits
from . import truth
from .inputs import NAN, WIDTHS, check_bounds, each_backend, each_dtype, each_layout, exact, generator, tokens
from .places import probe_saliency

POSITIONS = [36, 3, 17, 17, 0, 30, 31, 36]  # in no order, some twice


def inputs(
    group: int = 4, width: int = 64, dtype: torch.dtype = torch.float32, layout: str = "contiguous"
) -> tuple[Tensor, Tensor, Tensor]:
    k = tokens((2, 2, 37, width), dtype, layout)
    q = tokens((2, 2 * group, len(POSITIONS), width), dtype, layout, seed=9)
    return q, k, torch.tensor(POSITIONS)


def expected(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    *,
    mask: Tensor | None = None,
    lse: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    normalization: str = "probe_nnz",
) -> Bounded:
    """Sums over how many queries see a token, a probe's query heads each counting; divided in float32. Infinity where
    none does, 0 for padding."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    optional = [None if t is None else exact(t) for t in (mask, lse)]
    arrays = (exact(q).astype(np.float64), exact(k).astype(np.float64), exact(positions), *optional)
    sums = truth.saliency(*arrays, scale, softcap)
    length, places = k.shape[2], np.arange(k.shape[2])
    valid = np.ones((len(q), length), bool) if mask is None else exact(mask)
    probes = (valid[:, positions.numpy()][:, :, None] & (places <= positions.numpy()[:, None])).sum(1)
    tokens = (valid[:, :, None] & (places <= places[:, None])).sum(1)
    seen = tokens if normalization == "causal_nnz" else probes
    divisor = q.shape[1] // k.shape[1] * np.maximum(seen, 1)[:, None]
    unknown = np.broadcast_to((valid & (probes == 0))[:, None], sums.value.shape)
    value = np.where(unknown, np.inf, sums.value / divisor)
    return Bounded(value, np.where(unknown, 0.0, sums.error / divisor + 2.0 * HALF_ULP * sums.value / divisor))


def check(backend: str, q: Tensor, k: Tensor, positions: Tensor, **options: Any) -> Tensor:
    found = probe_saliency(q, k, positions, backend=backend, **options)
    assert found.dtype == torch.float32
    assert found.shape == k.shape[:3]
    want = expected(q, k, positions, **options)
    known = np.isfinite(want.value)
    assert bool((found.cpu()[torch.from_numpy(~known)] == torch.inf).all())
    check_bounds(found[torch.from_numpy(known).to(found.device)], want[known], f"{backend} {list(options)}")
    return found


@each_backend
@each_dtype
@each_layout
def test_against_float64(backend: str, dtype: torch.dtype, layout: str) -> None:
    check(backend, *inputs(dtype=dtype, layout=layout))


@each_backend
@pytest.mark.parametrize("group", [1, 2, 4, 7, 8])
def test_groups_of_query_heads(backend: str, group: int) -> None:
    check(backend, *inputs(group))


@each_backend
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(backend: str, width: int) -> None:
    check(backend, *inputs(2, width))


@each_backend
@pytest.mark.parametrize("normalization", ["probe_nnz", "causal_nnz"])
def test_all_tokens_as_probes_are_the_papers_equation(backend: str, normalization: str) -> None:
    """p_i = sum_k A[k, i] / nnz(A[:, i]), A lower triangular; where all are probes both normalisations are that."""
    k, q = tokens((1, 1, 50, 32)), tokens((1, 2, 50, 32), seed=3)
    a = np.zeros((2, 50, 50))
    for h, i in np.ndindex(2, 50):
        logits = exact(q)[0, h, i].astype(np.float64) @ exact(k)[0, 0, : i + 1].astype(np.float64).T / 32**0.5
        a[h, i, : i + 1] = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    want = a.sum((0, 1)) / (a != 0).sum((0, 1))
    order = torch.randperm(50, generator=generator())
    for positions in (torch.arange(50), order):
        found = check(backend, q[:, :, positions], k, positions, normalization=normalization)
        np.testing.assert_allclose(found[0, 0].numpy(), want, rtol=2e-5)


@each_backend
def test_normalizations_differ_where_not_all_are_probes(backend: str) -> None:
    q, k, positions = inputs()
    by_probes = check(backend, q, k, positions)
    by_tokens = check(backend, q, k, positions, normalization="causal_nnz")
    probes = torch.tensor([sum(p >= i for p in POSITIONS) for i in range(37)])
    torch.testing.assert_close(by_probes, by_tokens * torch.arange(37, 0, -1) / probes, rtol=1e-6, atol=0.0)


@each_backend
@pytest.mark.parametrize("scale", [None, 0.01, 3.0])
@pytest.mark.parametrize("softcap", [0.0, 0.5, 20.0])
def test_scale_and_cap(backend: str, scale: float | None, softcap: float) -> None:
    check(backend, *inputs(), scale=scale, softcap=softcap)


@each_backend
def test_padding(backend: str) -> None:
    """What stands in padding is never read; a probe that is padding counts for nothing; a sequence may be all of it."""
    q, k, positions = inputs()
    q, k = (torch.cat((t, t[:1])) for t in (q, k))
    mask = torch.ones(3, 37, dtype=torch.bool)
    mask[0, :5], mask[1, [9, 17, 36]], mask[2] = False, False, False
    clean = check(backend, q, k, positions, mask=mask)
    assert not bool(clean[~mask[:, None].expand(-1, 2, -1)].any())
    check(backend, q, k, positions, mask=mask, normalization="causal_nnz")
    k = torch.where(mask[:, None, :, None], k, NAN)
    q = torch.where(mask[:, positions][:, None, :, None], q, NAN)
    assert_same_bits(probe_saliency(q, k, positions, mask=mask, backend=backend), clean)


@each_backend
def test_left_padding_is_no_padding(backend: str) -> None:
    q, k, positions = inputs()
    padded = torch.cat((torch.full((2, 2, 6, 64), NAN), k), 2)
    mask = (torch.arange(43) >= 6).expand(2, -1)
    found = check(backend, q, padded, positions + 6, mask=mask)
    without = probe_saliency(q, k, positions, backend=backend)
    torch.testing.assert_close(found[:, :, 6:], without, rtol=1e-5, atol=1e-8)


@each_backend
@each_dtype
def test_sums_over_more_than_the_keys(backend: str, dtype: torch.dtype) -> None:
    """Given the logarithm of a larger sum, weights are smaller; one's own gives what is found without."""
    q, k, positions = inputs(dtype=dtype)
    more = (torch.rand(2, 8, 8, generator=generator()) * 3.0 + 12.0).contiguous()
    check(backend, q, k, positions, lse=more)
    logits = torch.einsum("bhgpd,bhld->bhgpl", q.double().unflatten(1, (2, 4)), k.double()) / 8.0
    seen = torch.arange(37) <= positions[:, None]
    own = logits.masked_fill(~seen, -torch.inf).logsumexp(-1).flatten(1, 2).float()
    found = check(backend, q, k, positions, lse=own)
    torch.testing.assert_close(found, probe_saliency(q, k, positions, backend=backend), rtol=1e-4, atol=1e-7)


@each_backend
def test_one_token_and_none(backend: str) -> None:
    q, k, _ = inputs()
    check(backend, q[:, :, :1], k[:, :, :1], torch.zeros(1, dtype=torch.int64))  # 1, but for rounding
    none = torch.zeros(0, dtype=torch.int64)
    assert bool((probe_saliency(q[:, :, :0], k, none, backend=backend) == torch.inf).all())
    assert probe_saliency(q[:, :, :0], k[:, :, :0], none, backend=backend).shape == (2, 2, 0)


@each_backend
def test_probes_do_not_see_what_comes_after_them(backend: str) -> None:
    q, k, positions = inputs()
    early = positions.clamp(max=20)
    found = check(backend, q, k, early)
    assert bool((found[:, :, 21:] == torch.inf).all())
    by_tokens = check(backend, q, k, early, normalization="causal_nnz")
    assert bool((by_tokens[:, :, 21:] == torch.inf).all()), "no evidence is not zero evidence"
    k = k.clone()
    k[:, :, 21:] = NAN
    assert_same_bits(probe_saliency(q, k, early, backend=backend), found)


@each_backend
def test_many_tokens(backend: str) -> None:
    """Longer than any piece that a kernel takes at a time; sums over a row are one."""
    k, q = tokens((1, 2, 700, 32), torch.bfloat16), tokens((1, 4, 60, 32), torch.bfloat16, seed=5)
    positions = torch.randperm(700, generator=generator())[:60]
    check(backend, q, k, positions)
    run = implementation("kv_saliency", backend)
    sums = run(q, k, positions, None, None, scale=32**-0.5)
    torch.testing.assert_close(sums.sum(2), torch.full((1, 2), 120.0), rtol=1e-4, atol=0.0)


def test_more_rows_than_32_bits_can_number_are_refused() -> None:
    q, k, positions = torch.zeros(16).expand(1, 2**31, 1, 16), torch.zeros(1, 1, 1, 16), torch.tensor([0])
    with pytest.raises(RuntimeError, match="at most 2147483519 tokens, and rows of a head; got 1 and 2147483648"):
        implementation("kv_saliency", "simt")(q, k, positions, None, None, scale=1.0)


@pytest.mark.serial
def test_the_same_bits_on_any_number_of_threads_and_in_any_batch(each_thread_count: tuple[int, ...]) -> None:
    k, q = tokens((3, 4, 500, 64)), tokens((3, 8, 50, 64), seed=5)
    positions = torch.randperm(500, generator=generator())[:50]
    found = []
    for count in each_thread_count:
        torch.set_num_threads(count)
        found.append(probe_saliency(q, k, positions, backend="native"))
        alone = probe_saliency(q[1:2], k[1:2], positions, backend="native")
        assert_same_bits(alone, found[-1][1:2])
    for other in found[1:]:
        assert_same_bits(other, found[0])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"k": torch.zeros(2, 37, 64)}, r"k \(batch, heads, tokens, channels\)"),
        ({"k": torch.zeros(2, 2, 37, 20)}, r"k of 16, 32, ..., 512 channels; got 20"),
        ({"q": torch.zeros(2, 7, 8, 64)}, r"q of batch 2, a multiple of 2 heads and 64 channels"),
        ({"q": torch.zeros(2, 8, 8, 32)}, r"q of batch 2, a multiple of 2 heads and 64 channels"),
        ({"q": torch.zeros(1, 8, 8, 64)}, r"q of batch 2, a multiple of 2 heads and 64 channels"),
        ({"q": torch.zeros(2, 0, 8, 64)}, r"q of batch 2, a multiple of 2 heads and 64 channels"),
        ({"positions": torch.tensor(POSITIONS[:-1])}, r"int64 positions of shape \(8,\) on cpu; got \(7,\)"),
        ({"positions": torch.tensor(POSITIONS).int()}, r"int64 positions of shape \(8,\)"),
        ({"mask": torch.ones(2, 36, dtype=torch.bool)}, r"a bool mask of shape \(2, 37\)"),
        ({"mask": torch.ones(2, 37)}, r"a bool mask of shape \(2, 37\)"),
        ({"normalization": "none"}, r"probe_nnz or causal_nnz; got 'none'"),
        ({"lse": torch.zeros(2, 8, 7)}, r"float32 lse of shape \(2, 8, 8\)"),
        ({"lse": torch.zeros(2, 8, 8).half()}, r"float32 lse of shape \(2, 8, 8\)"),
        ({"softcap": -1.0}, "softcap >= 0"),
        ({"backend": "cuda"}, "backend among native, triton, eager"),
    ],
)
def test_errors(changes: dict[str, Any], text: str) -> None:
    q, k, positions = inputs()
    options = {"q": q, "k": k, "positions": positions} | changes
    with pytest.raises(ValueError, match=f": expected {text}"):
        probe_saliency(**options)


def test_small_tensors_may_be_strided() -> None:
    """Positions, masks and sums that are every second element of others, or transposed, or expanded."""
    q, k, positions = inputs()
    mask, lse = torch.arange(37).ge(3).expand(2, -1), torch.zeros(2, 8, len(POSITIONS))
    plain = probe_saliency(q, k, positions, mask=mask.contiguous(), lse=lse)
    for strided in (_every_second, _transposed):
        got = probe_saliency(q, k, _every_second(positions), mask=strided(mask), lse=strided(lse))
        assert_same_bits(got, plain)
    assert_same_bits(probe_saliency(q, k, positions, mask=mask, lse=lse[:1].expand(2, -1, -1)), plain)


def _every_second(t: Tensor) -> Tensor:
    return torch.stack((t, t), -1)[..., 0]


def _transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT


def test_gradients_are_refused() -> None:
    q, k, positions = inputs()
    for name, its in (("q", (q.clone().requires_grad_(), k)), ("k", (q, k.clone().requires_grad_()))):
        with pytest.raises(ValueError, match=f"probe_saliency: expected {name} that needs no gradient"):
            probe_saliency(*its, positions)
        with torch.no_grad():
            probe_saliency(*its, positions)
