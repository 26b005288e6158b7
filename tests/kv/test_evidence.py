# SPDX-License-Identifier: Apache-2.0
"""Which tokens end up in 4 and which in 2 bits, against a count by hand in float64: probes are among each sequence's
own tokens, the newest always, and tokens that no probe saw are not taken for the least salient."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from singlepass.kv import ZipCacheLayer
from singlepass.kv._selection import PADDING, REGULAR, SALIENT

from .inputs import each_cpu_backend, generator
from .layers import drawn, kinds, part, stream


def by_hand(q: Tensor, keys: Tensor, probes: Iterable[int], tokens: range, ratio: float = 0.6) -> Tensor:
    """What each of some tokens should be, (heads, tokens), of one sequence without padding: queries (query heads, all
    tokens, channels), keys likewise. ``probes`` and ``tokens`` are places in them."""
    heads, length, width = keys.shape
    of_head = torch.zeros(heads, length, dtype=torch.float64)
    count = torch.zeros(length, dtype=torch.float64)
    for probe in probes:
        for row in range(q.shape[0]):
            logits = keys[row * heads // q.shape[0], : probe + 1].double() @ q[row, probe].double() * width**-0.5
            of_head[row * heads // q.shape[0], : probe + 1] += logits.softmax(0)
        count[: probe + 1] += 1
    saliency = torch.where(count > 0, of_head / count, torch.inf)[:, tokens.start : tokens.stop]
    many = max(int(len(tokens) * ratio + 0.5), int((saliency[0] == torch.inf).sum()))
    kinds_ = torch.full((heads, len(tokens)), REGULAR)
    for head in range(heads):
        order = sorted(range(len(tokens)), key=lambda i: (-float(saliency[head, i]), i))
        kinds_[head, order[:many]] = SALIENT
        if 0 < many < len(order):
            least, most = (float(saliency[head, order[i]]) for i in (many - 1, many))
            assert least == torch.inf or (least - most) / least > 1e-5, "float32 may decide otherwise"
    return kinds_


def newest(tokens: int, share: float) -> int:
    return max(1, round(tokens * share))


LENGTHS = (60, 41, 7, 1, 0)
PADDINGS = {
    "left": [range(60 - n, 60) for n in LENGTHS],
    "right": [range(n) for n in LENGTHS],
    "both": [range((60 - n) // 2, (60 - n) // 2 + n) for n in LENGTHS],
    "middle": [[*range(n // 2), *range(60 - n + n // 2, 60)] for n in LENGTHS],
}


@each_cpu_backend
@pytest.mark.parametrize("normalization", ["probe_nnz", "causal_nnz"])
@pytest.mark.parametrize(("recent", "random"), [(0.05, 0.05), (0.0, 0.0), (0.0, 1.0), (0.5, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("side", PADDINGS)
def test_padded_prompts(side: str, recent: float, random: float, normalization: str, backend: str) -> None:
    """Sequences of different lengths are compressed as each alone; without random probes also counted by hand."""
    q, k, v = drawn(60, batch=5)
    mask = torch.zeros(5, 60, dtype=torch.bool)
    for i, own in enumerate(PADDINGS[side]):
        mask[i, list(own)] = True
    options = {"recent_probes": recent, "random_probes": random, "normalization": normalization, "backend": backend}
    together = ZipCacheLayer(**options)
    together.prefill(q, k, v, mask)
    for i, own in enumerate(PADDINGS[side]):
        found = kinds(together)[i]
        assert bool((found[:, ~mask[i]] == PADDING).all())
        if not len(own):
            continue
        its = tuple(t[i : i + 1, :, list(own)] for t in (q, k, v))
        alone = ZipCacheLayer(**options)
        alone.prefill(*its)
        assert torch.equal(found[:, list(own)], kinds(alone)[0])
        if random in (0.0, 1.0) and normalization == "probe_nnz":
            n = len(own)
            probes = range(n - newest(n, recent), n) if random == 0.0 else range(n)
            assert torch.equal(found[:, list(own)], by_hand(its[0][0], its[1][0], probes, range(n)))


def test_probes_are_drawn_among_the_own_tokens() -> None:
    """Random probes too: a token that only one sequence's early queries look at is salient there."""
    q, k, v = drawn(200, batch=2)
    mask = torch.arange(200) < torch.tensor([[200], [40]])
    layer = ZipCacheLayer(0.1, recent_probes=0.0, random_probes=0.5)
    direction = torch.nn.functional.normalize(torch.randn(2, 1, 2, 32, generator=generator(1)), dim=-1)
    q[1:, :, :39] = 4.0 * direction[1].repeat_interleave(2, 1)[:, :, None]
    k[1, :, 3] = 4.0 * direction[1]
    layer.prefill(q, k, v, mask)
    assert bool((kinds(layer)[1, :, 3] == SALIENT).all())


@each_cpu_backend
@pytest.mark.parametrize(("recent", "random"), [(0.05, 0.05), (0.0, 0.0), (0.3, 0.3), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("tokens", [1, 2, 7, 30, 63, 64])
def test_windows_that_are_compressed_early(tokens: int, recent: float, random: float, backend: str) -> None:
    """By a prompt that comes before they are full; after tokens that were compressed already."""
    q, k, v = drawn(30 + tokens + 5)
    layer = ZipCacheLayer(window=64, recent_probes=recent, random_probes=random, backend=backend)
    layer.prefill(*part((q, k, v), 0, 30))
    due = {place for place in layer._held.window.probes.due if place < tokens}
    stream(layer, *part((q, k, v), 30, 30 + tokens))
    keys = layer.dequantize()[0]
    layer.prefill(*part((q, k, v), 30 + tokens, 35 + tokens))
    probes = due | set(range(tokens - newest(tokens, recent), tokens))
    for i in range(2):
        want = by_hand(q[i], keys[i], [30 + place for place in sorted(probes)], range(30, 30 + tokens))
        assert torch.equal(kinds(layer)[i, :, 30 : 30 + tokens], want)


@each_cpu_backend
@pytest.mark.parametrize(("recent", "random"), [(0.05, 0.05), (0.0, 0.0), (0.3, 0.3), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("end", [1, 7, 30, 63])
def test_sequences_that_end_in_a_window(end: int, recent: float, random: float, backend: str) -> None:
    """The newest of their own tokens are probes, as are those of the others; what follows them is not."""
    q, k, v = drawn(30 + 64 + 1)
    layer = ZipCacheLayer(window=64, recent_probes=recent, random_probes=random, backend=backend)
    layer.prefill(*part((q, k, v), 0, 30))
    due = None
    for i in range(30, 94):
        shown = torch.tensor([True, i < 30 + end])
        layer.append(*part((k, v), i, i + 1), shown[:, None])
        due = set(layer._held.window.probes.due) if due is None else due
        layer.attend(part((q,), i, i + 1)[0])
    keys = layer.dequantize()[0]
    layer.append(*part((k, v), 94, 95))
    kept = newest(64, recent)
    both = due | set(range(max(end - kept, 0), end))
    for i, n, last in ((0, 64, set(range(64 - kept, 64))), (1, end, set())):
        probes = [30 + place for place in sorted(both | last) if place < n]
        want = by_hand(q[i], keys[i, :, : 30 + n], probes, range(30, 30 + n))
        assert torch.equal(kinds(layer)[i, :, 30 : 30 + n], want)
    assert bool((kinds(layer)[1, :, 30 + end : 94] == PADDING).all())


@pytest.mark.parametrize("unseen", [1, 20, 39, 50])
def test_tokens_that_no_probe_saw_are_salient(unseen: int) -> None:
    """They come after the last query, and may be more than the share of salient ones."""
    q, k, v = drawn(64)
    layer = ZipCacheLayer(window=64)
    seen = 64 - unseen
    stream(layer, *part((q, k, v), 0, seen))
    due = {place for place in layer._held.window.probes.due if place < seen}
    layer.append(*part((k, v), seen, 64))
    layer.append(*part((k, v), 0, 1))
    # The newest of 64 tokens are probes if their queries came: of these 3, none did, or those before the unseen.
    probes = due | set(range(61, 64)) & set(range(seen))
    found = kinds(layer)
    assert bool((found[:, :, seen:] == SALIENT).all())
    for i in range(2):
        want = by_hand(q[i], k[i], sorted(probes), range(64)) if probes else torch.full((2, 64), SALIENT)
        assert torch.equal(found[i], want)


def test_probes_that_see_not_all_of_the_window_tell_nothing() -> None:
    q, k, v = drawn(40)
    layer = ZipCacheLayer(window=40, recent_probes=1.0)
    for i in range(40):
        layer.append(*part((k, v), i, i + 1))
        layer.attend(q[:, :, i : i + 1], sliding_window=3)
    layer.append(*part((k, v), 0, 1))
    probes = [0, 1, 2]  # these saw all
    for i in range(2):
        assert torch.equal(kinds(layer)[i], by_hand(q[i], k[i], probes, range(40)))


def test_newest_tokens_of_a_long_conversation() -> None:
    """A window of 128 is flushed at 30: its newest tokens are in 4 bits as often as others."""
    q, k, v = drawn(130, batch=8, heads=4, seed=3)
    layer = ZipCacheLayer()
    layer.prefill(*part((q, k, v), 0, 60))
    stream(layer, *part((q, k, v), 60, 90))
    layer.prefill(*part((q, k, v), 90, 130))
    last = kinds(layer)[:, :, 80:90] == SALIENT
    assert 0.4 < float(last.float().mean()) < 0.9
