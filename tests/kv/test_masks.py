# SPDX-License-Identifier: Apache-2.0
"""Attention masks of every kind give what transformers' own cache gives, over the same keys and values."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.24")

from transformers import DynamicCache, PreTrainedModel

from singlepass.kv import ZipCache
from singlepass.kv._masks import read_mask

from .inputs import generator
from .models import BYTES, MODELS, ROUNDINGS, build, error, prompt, run, steps

pytestmark = pytest.mark.filterwarnings("error::FutureWarning")

HEADS = 4
LOWEST = torch.finfo(torch.float32).min


def causal(before: int, tokens: int) -> Tensor:
    return torch.ones(1, 1, tokens, before + tokens, dtype=torch.bool).tril(before)


def tree(before: int, parents: list[int]) -> Tensor:
    """Drafts that see what is cached, their ancestors and themselves; -1 is no parent."""
    mask = torch.zeros(1, 1, len(parents), before + len(parents), dtype=torch.bool)
    mask[..., :before] = True
    for i, parent in enumerate(parents):
        if parent >= 0:
            mask[0, 0, i, before:] = mask[0, 0, parent, before:]
        mask[0, 0, i, before + i] = True
    return mask


def documents(before: int, sizes: list[int]) -> Tensor:
    """Each sees itself alone; the first one goes on with what is cached."""
    of = torch.cat([torch.full((n,), i) for i, n in enumerate(sizes)])
    columns = torch.cat((torch.zeros(before, dtype=of.dtype), of))
    return causal(before, len(of)) & (of[:, None] == columns)


def by_head(before: int, tokens: int) -> Tensor:
    shown = torch.rand(2, HEADS, tokens, before + tokens, generator=generator(3)) < 0.6
    return causal(before, tokens) & (shown | torch.eye(tokens, before + tokens, dtype=torch.bool).roll(before, 1))


def hides_from_the_last(before: int, tokens: int) -> Tensor:
    mask = causal(before, tokens).clone()
    mask[..., -1, 2 : before + tokens - 2] = False
    return mask


def additive(shown: Tensor, hidden: float = LOWEST) -> Tensor:
    return torch.zeros(shown.shape).masked_fill(~shown, hidden)


def alibi(before: int, tokens: int) -> Tensor:
    slopes = 2.0 ** -torch.arange(1.0, HEADS + 1)[:, None, None]
    behind = torch.arange(before + tokens) - torch.arange(before, before + tokens)[:, None]
    return (slopes * behind)[None] + additive(causal(before, tokens))


# How many tokens are cached, and the mask of those that come.
MASKS: dict[str, tuple[int, Tensor]] = {
    "siblings": (20, tree(20, [-1, -1, -1])),
    "branches": (20, tree(20, [-1, 0, 1, -1, 3, 0])),
    "branches, one tree for each sequence": (20, torch.cat((tree(20, [-1, 0, -1, 2]), tree(20, [-1, -1, 1, 0])))),
    "a branch and its sibling": (33, tree(33, [-1, -1])),
    "documents": (0, documents(0, [13, 1, 20, 6])),
    "documents after others": (15, documents(15, [3, 9, 9])),
    "by head, a prompt": (0, by_head(0, 30)),
    "by head": (21, by_head(21, 5)),
    "the last query sees least": (20, hides_from_the_last(20, 6)),
    "the last query sees least, a prompt": (0, hides_from_the_last(0, 30)),
    "one query that sees not all": (20, hides_from_the_last(20, 1)),
    "queries that do not see themselves": (20, causal(20, 4).roll(-1, 3) & causal(20, 4)),
    "a sliding window, a prompt": (0, causal(0, 40).triu(-9)),
    "a sliding window": (30, causal(30, 4).triu(30 - 9)),
    "both ways": (0, torch.ones(1, 1, 30, 30, dtype=torch.bool)),
    "both ways after others": (12, torch.ones(1, 1, 9, 21, dtype=torch.bool)),
    "padding that sees itself": (0, causal(0, 20) & (torch.arange(20) >= 5) | torch.eye(20, dtype=torch.bool)),
    "drafts that see themselves alone": (20, torch.eye(3, 23, dtype=torch.bool).roll(20, 1)[None, None]),
    "siblings, added": (20, additive(tree(20, [-1, -1, -1]))),
    "siblings, -inf": (20, additive(tree(20, [-1, -1, -1]), -torch.inf)),
    "siblings, -1e9": (20, additive(tree(20, [-1, -1, -1]), -1e9)),
    "alibi, a prompt": (0, alibi(0, 30)),
    "alibi": (20, alibi(20, 5)),
    "alibi, one token": (20, alibi(20, 1)),
    "a bias of one head": (20, torch.randn(1, 1, 3, 23, generator=generator(5)) + additive(causal(20, 3))),
    "causal": (20, causal(20, 5)),
    "causal, all heads": (20, causal(20, 5).expand(2, HEADS, -1, -1)),
    "causal, added": (20, additive(causal(20, 5))),
}


def plain_copy(cache: ZipCache, model: PreTrainedModel) -> DynamicCache:
    """transformers' own cache of the keys and values that a cache restores."""
    plain = DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        if layer.inner.length:
            plain.update(*layer.inner.dequantize(), i)
    return plain


@torch.no_grad()
def step(model: PreTrainedModel, implementation: str, ids: Tensor, mask: Tensor | None, cache: object) -> Tensor:
    model.set_attn_implementation(implementation)
    begin = cache.get_seq_length()
    positions = torch.arange(begin, begin + ids.shape[1])[None]
    return model(ids, attention_mask=mask, position_ids=positions, cache=cache).logits


@pytest.mark.parametrize("implementation", ["singlepass", "sdpa"])
@pytest.mark.parametrize("name", MASKS)
def test_masks_are_followed(name: str, implementation: str) -> None:
    """The step itself, and those after it, which see all tokens; float32, the difference is one of roundings."""
    before, mask = MASKS[name]
    tokens, model = mask.shape[2], build()
    model.set_attn_implementation(implementation)
    ids = prompt(2, before + tokens + 3)
    cache = ZipCache(model.config, window=16)
    if before:
        run(model, ids[:, :before], steps(before - 3, before), cache)
    plain = plain_copy(cache, model)
    new = ids[:, before : before + tokens]
    got = step(model, implementation, new, mask, cache)
    want = step(model, "sdpa", new, mask, plain)
    assert error(got, want) < ROUNDINGS
    if "causal" not in name:
        assert error(step(model, "sdpa", new, None, plain_copy_of(plain, before)), want) > 0.01, "the mask matters"
    assert cache.get_seq_length() == before + tokens
    for layer, exact in zip(cache.layers, plain.layers, strict=True):  # all tokens are stored, the newest as they are
        held = layer.inner.dequantize()[0]
        n = layer.inner.window_length
        assert n >= (tokens if before and tokens <= 16 else 0)
        assert error(held[:, :, before + tokens - n :], exact.keys[:, :, before + tokens - n :]) < ROUNDINGS
        assert error(held, exact.keys) < 0.5
    plain = plain_copy(cache, model)
    for i in range(3):
        token = ids[:, before + tokens + i :][:, :1]
        got, want = step(model, implementation, token, None, cache), step(model, "sdpa", token, None, plain)
        assert error(got, want) < (ROUNDINGS if i == 0 else 0.3), "later ones may compress the window"


def plain_copy_of(plain: DynamicCache, length: int) -> DynamicCache:
    """Its first tokens."""
    copy = DynamicCache()
    for i, layer in enumerate(plain.layers):
        if length:
            copy.update(layer.keys[:, :, :length], layer.values[:, :, :length], i)
    return copy


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss"])
def test_masks_with_softcap_and_sinks(name: str) -> None:
    model, ids = build(**MODELS[name]), prompt(1, 15)
    cache, plain = ZipCache(model.config, window=16, **BYTES), DynamicCache(config=model.config)
    outs = []
    for implementation, its, exact in (("singlepass", cache, False), ("eager", plain, True)):
        step(model, implementation, ids[:, :12], None, its)
        shown = tree(12, [-1, -1, -1])
        mask = additive(shown) if exact else shown
        model.set_attn_implementation(implementation)
        masks = {"full_attention": mask, "sliding_attention": mask}
        with torch.no_grad():
            options = {"attention_mask": masks, "position_ids": torch.tensor([[12, 12, 12]])}
            outs.append(model(ids[:, 12:], cache=its, **options).logits)
    assert error(*outs) < 0.02  # of eight bits
    assert cache.layers[1].inner.length == 15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masks_of_another_dtype(dtype: torch.dtype) -> None:
    """float32's lowest number is no number in 16 bits."""
    model, ids = build().to(dtype), prompt(1, 23)
    outs = []
    for mask in (tree(20, [-1, -1, -1]), additive(tree(20, [-1, -1, -1]))):
        model.set_attn_implementation("singlepass")
        cache = ZipCache(model.config, window=16, **BYTES)
        run(model, ids[:, :20], [], cache)
        outs.append(step(model, "singlepass", ids[:, 20:], mask, cache))
    assert bool(outs[0].isfinite().all())
    torch.testing.assert_close(*outs)


PADDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "left": lambda i: i >= torch.tensor([[0], [7], [23]]),
    "right": lambda i: i < torch.tensor([[24], [17], [1]]),
    "both": lambda i: (i >= torch.tensor([[3], [0], [20]])) & (i < torch.tensor([[20], [24], [21]])),
    "middle": lambda i: (i < torch.tensor([[5], [12], [1]])) | (i > torch.tensor([[9], [12], [22]])),
    "everywhere": lambda i: torch.rand(3, len(i), generator=generator(4)) < 0.6,
}


@pytest.mark.parametrize("chunks", [[], [10], [8, 9, 10, 17]], ids=str)
@pytest.mark.parametrize("side", PADDINGS)
def test_padding_anywhere(side: str, chunks: list[int]) -> None:
    """A prompt, at once or in chunks, and tokens after it: whatever sees a token gives what it gives elsewhere, padding
    itself too; and padding is not stored."""
    model, ids = build(), prompt(3, 30)
    padding = PADDINGS[side](torch.arange(24)) | (torch.arange(24) == 23) & (side == "everywhere")
    mask = torch.cat((padding, torch.ones(3, 6, dtype=torch.bool)), 1)
    model.set_attn_implementation("sdpa")
    cuts = [*chunks, *steps(24, 30)]
    want = run(model, ids, cuts, DynamicCache(config=model.config), mask.long())
    model.set_attn_implementation("singlepass")
    cache = ZipCache(model.config, window=8, **BYTES)
    got = run(model, ids, cuts, cache, mask.long())
    sees = mask.cumsum(1) > 0
    assert error(got[sees], want[sees]) < 0.02  # of eight bits
    for layer in cache.layers:
        assert torch.equal(layer.inner.token_mask(), mask)
        held = sum(int(segment.keys.counts[:, 0].sum()) for segment in layer.inner._held.compressed.segments.values())
        assert held + 3 * layer.inner.window_length == int(mask.sum())


def hidden(*ranges: tuple[int, int]) -> Tensor:
    """An attention_mask of 40 tokens for each range, which it hides."""
    return torch.stack([~((torch.arange(40) >= begin) & (torch.arange(40) < end)) for begin, end in ranges]).long()


@pytest.mark.parametrize("begin", [29, 24, 12], ids="from the {}th token".format)
def test_a_sequence_that_ended_early_goes_on(begin: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the second turn of a batch: what followed its end is in the cache, and is no longer. Attention is over the
    packed codes as before."""
    model, ids = build(), prompt(2, 40)
    model.set_attn_implementation("singlepass")
    cache = ZipCache(model.config, window=16, **BYTES)
    run(model, ids[:, :30], steps(10, 30), cache)
    mask, plain = hidden((0, 0), (begin, 30)), plain_copy(cache, model)
    got = step(model, "singlepass", ids[:, 30:35], mask[:, :35], cache)
    want = step(model, "sdpa", ids[:, 30:35], mask[:, :35], plain)
    assert error(got, want) < 0.02  # of eight bits: the window was compressed
    for layer in cache.layers:
        assert torch.equal(layer.inner.token_mask(), mask[:, :35].bool())
        monkeypatch.setattr(layer.inner, "dequantize", None)
    for i in range(35, 40):
        got = step(model, "singlepass", ids[:, i : i + 1], mask[:, : i + 1], cache)
        want = step(model, "sdpa", ids[:, i : i + 1], mask[:, : i + 1], plain)
        assert error(got, want) < 0.02
    with pytest.raises(ValueError, match="a mask that hides padding"):
        step(model, "singlepass", ids[:, :1], None, cache)


@pytest.mark.parametrize("kind", ["in the middle", "drafts"])
def test_hiding_what_a_later_mask_may_show(kind: str) -> None:
    """Tokens that others follow, and those that a mask of four dimensions hides, stay in the cache."""
    model, ids = build(), prompt(2, 40)
    model.set_attn_implementation("singlepass")
    cache = ZipCache(model.config, window=16)
    run(model, ids[:, :30], steps(20, 30), cache)
    plain = plain_copy(cache, model)
    for end in (35, 36, 37):
        begin = cache.get_seq_length()
        mask = hidden((0, 0), (10, 15))[:, :end]
        if kind == "drafts":
            mask = causal(begin, end - begin) & hidden((0, 0), (24, 30))[:, None, None, :end].bool()
        got = step(model, "singlepass", ids[:, begin:end], mask, cache)
        want = step(model, "sdpa", ids[:, begin:end], mask, plain)
        assert error(got, want) < ROUNDINGS
    for layer in cache.layers:
        assert bool(layer.inner.token_mask().all())
    plain = plain_copy(cache, model)
    got, want = (step(model, name, ids[:, 37:38], None, x) for name, x in (("singlepass", cache), ("sdpa", plain)))
    assert error(got, want) < ROUNDINGS


@pytest.mark.parametrize("seed", range(12))
def test_steps_of_all_kinds_one_after_another(seed: int) -> None:
    """Plain, padded and custom ones, of one token and of many, with tokens removed and sequences chosen between. Where
    a plain step compresses the window eight bits make a difference, in custom steps roundings alone."""
    drawn, gen = random.Random(seed), generator(seed)
    model = build(num_hidden_layers=2)
    cache = ZipCache(model.config, window=drawn.choice([1, 4, 8, 16]), **BYTES)
    if drawn.random() < 0.3:
        cache.activate_past_recording()
    tokens = torch.zeros(3, 0, dtype=torch.bool)
    for kind in drawn.choices(["plain", "padded", "custom", "by head", "biased"], k=8):
        n, before = drawn.choice([1, 1, 2, 3, 7, 20]), tokens.shape[1]
        new = torch.rand(3, n, generator=gen) < (0.7 if kind == "padded" else 1.0)
        tokens = torch.cat((tokens, new), 1)
        mask = causal(before, n) & tokens[:, None, None]
        if kind in ("custom", "by head"):
            shown = torch.rand(3, HEADS if kind == "by head" else 1, n, before + n, generator=gen) < 0.6
            mask = mask & shown | torch.eye(n, before + n, dtype=torch.bool).roll(before, 1)
        given = additive(mask) if drawn.random() < 0.4 else mask
        given = torch.randn(mask.shape, generator=gen) + additive(mask) if kind == "biased" else given
        plain, ids = plain_copy(cache, model), prompt(3, n, seed=before)
        got, want = (step(model, name, ids, given, x) for name, x in (("singlepass", cache), ("sdpa", plain)))
        sees = mask.any(3).all(1)
        assert error(got[sees], want[sees]) < (0.02 if kind in ("plain", "padded") else ROUNDINGS)
        assert torch.equal(cache.layers[1].inner.token_mask(), tokens)
        if drawn.random() < 0.2:
            removed = drawn.randint(0, cache.layers[0].inner.window_length)
            cache.crop(-removed)
            tokens = tokens[:, : tokens.shape[1] - removed]
        if drawn.random() < 0.2:
            chosen = torch.randint(0, 3, (3,), generator=gen)
            cache.reorder_cache(chosen)
            tokens = tokens[chosen]


def test_a_query_that_does_not_see_itself_is_padding() -> None:
    """It gets what it sees; its token is not stored, and a mask that shows it later is refused."""
    model, ids = build(), prompt(2, 22)
    model.set_attn_implementation("singlepass")
    cache = ZipCache(model.config, window=16, **BYTES)
    run(model, ids[:, :20], [], cache)
    plain = plain_copy(cache, model)
    mask = causal(20, 1) & (torch.arange(21) < 20)
    got, want = (step(model, name, ids[:, 20:21], mask, x) for name, x in (("singlepass", cache), ("sdpa", plain)))
    assert error(got, want) < ROUNDINGS
    with pytest.raises(ValueError, match="a mask that hides padding"):
        step(model, "singlepass", ids[:, 21:], None, cache)
    mask = causal(21, 1) & (torch.arange(22) != 20)
    got, want = (step(model, name, ids[:, 21:], mask, x) for name, x in (("singlepass", cache), ("sdpa", plain)))
    assert error(got, want) < ROUNDINGS


def test_what_is_padding() -> None:
    """A token that no query sees, where all else is causal; nothing else."""

    def read(mask: Tensor, before: int = 0, held: Tensor | None = None) -> tuple[list[list[bool]] | None, bool]:
        padding, is_plain, cached = read_mask(mask, before, (len(mask), HEADS, mask.shape[2]), held, "test")
        assert cached is None
        return None if padding is None else padding.tolist(), is_plain

    left = torch.arange(5) >= 2
    assert read(causal(0, 5)) == (None, True)
    assert read(causal(0, 5) & left) == ([left.tolist()], True)
    assert read(additive(causal(0, 5) & left)) == ([left.tolist()], True)
    assert read(causal(0, 5) & left | torch.eye(5, dtype=torch.bool)) == (None, False)
    assert read(tree(4, [-1, -1]), 4) == (None, False)
    assert read(causal(4, 2) & (torch.arange(6) != 1), 4) == (None, False), "hides what the cache holds"
    assert read(causal(4, 2) & (torch.arange(6) != 1), 4, torch.arange(4)[None] != 1) == (None, True)
    assert read(alibi(0, 5)) == (None, False)
    assert read(additive(causal(0, 3)) + torch.nan) == (None, False), "a NaN is no mask"
    held = torch.tensor([[True, False, True, True]])
    to_the_first = causal(4, 2).clone()
    to_the_first[..., -1, 1] = False
    with pytest.raises(ValueError, match=r"^test: expected a mask that hides padding, .*; got one that shows some"):
        read(to_the_first, 4, held)
    late = causal(0, 3000)
    late[..., 2000, 5] = False
    assert read(late) == (None, False), "rows beyond the first thousand count"
