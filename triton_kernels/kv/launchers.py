# SPDX-License-Identifier: Apache-2.0
"""Launches the KV cache's kernels. Arguments and results are those of ``singlepass._ops.kv``.

The compiled code depends on dtypes, head dimensions, bits and groups, on which optional inputs are present, and on the
alignment of codes to 16 bytes. Launchers read nothing from the device, so a CUDA graph can capture any of these calls.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..._errors import require
from ..._ops import kv as ops
from .._common import FUSED_OPTIONS, LAUNCH_OPTIONS, STORAGE
from .._launch import device_guard, require_dtypes
from .arguments import (
    ANY,
    Packed,
    check_blocks,
    check_device,
    check_layout,
    check_option,
    check_queries,
    check_tokens,
    is_aligned,
    place,
    strides,
    unspecialized,
    vector_of,
)
from .codec import codec_kernel
from .decode import decode_kernel
from .functions import ROWS
from .merge import merge_kernel
from .project import project_kernel
from .saliency import column_sums_kernel, log_sums_kernel

TILE_SIZE, CODEC_TILE_SIZE = 4096, 2048  # elements of a tile, limited by registers
LEAST_TILE = 16  # slots or rows, the fewest that tensor cores take
# A split has up to BLOCKS blocks, which pays for merging it, if that leaves SPLITS splits, enough to keep a GPU busy
# with one sequence. This depends on the blocks of a segment alone: a sequence gets the same bits in any batch.
BLOCKS, SPLITS = 8, 64
MERGED_SPLITS, MERGED_CHANNELS = 32, 64
PROJECTED_ROWS, PROJECTED_CHANNELS = 64, 32
SALIENCY_TILES = 4096, 8192  # elements of a tile of rows, and of a tile of tokens


def _run_codec(
    op: str,
    quantizes: bool,
    plain: Tensor,
    index: Tensor | None,
    starts: Tensor,
    counts: Tensor,
    codes: Tensor,
    scales: Tensor,
    channels: Tensor | None,
    bits: int,
    axis: int,
) -> None:
    device = check_device(op, plain, index, starts, counts, codes, scales, channels)
    check_tokens(op, "tokens", plain)
    batch, heads = plain.shape[:2]
    blocks = check_blocks(op, starts, counts, batch, heads)
    packed = Packed.of(op, codes, scales, channels, blocks, plain, bits, axis)
    a_index = check_option(op, "index", index, torch.int32, (batch, heads, codes.shape[2]), 2)
    programs = batch * heads * blocks
    if programs == 0:
        return
    strides = [n for t in (index, codes, scales, channels, counts) for n in ((0, 0) if t is None else t.stride()[:2])]
    with device_guard(device):
        codec_kernel[(programs,)](
            *(plain.data_ptr(), a_index, codes.data_ptr(), scales.data_ptr()),
            *(0 if channels is None else channels.data_ptr(), starts.data_ptr(), counts.data_ptr()),
            *(*plain.stride()[:3], *strides, heads, blocks),
            *(
                quantizes,
                index is not None,
                STORAGE[plain.dtype],
                packed.head_dim,
                bits,
                packed.groups,
                packed.separable,
            ),
            *(vector_of(plain), 16 if is_aligned(codes) else 1, packed.block_w),
            max(1, CODEC_TILE_SIZE // (2 if packed.groups > 1 else 1) // (8 // bits * packed.block_w)),
            **LAUNCH_OPTIONS,
        )


@ops.quantize_.triton
def kv_quantize_(
    x: Tensor,
    index: Tensor | None,
    starts: Tensor,
    counts: Tensor,
    codes: Tensor,
    scales: Tensor,
    channels: Tensor | None,
    *,
    bits: int,
    axis: int,
) -> None:
    """``kv_quantize_`` in Triton, in one launch."""
    _run_codec("kv_quantize_", True, x, index, starts, counts, codes, scales, channels, bits, axis)


@ops.dequantize_.triton
def kv_dequantize_(
    codes: Tensor,
    scales: Tensor,
    channels: Tensor | None,
    index: Tensor | None,
    starts: Tensor,
    counts: Tensor,
    out: Tensor,
    *,
    bits: int,
    axis: int,
) -> None:
    """``kv_dequantize_`` in Triton, in one launch."""
    _run_codec("kv_dequantize_", False, out, index, starts, counts, codes, scales, channels, bits, axis)


def _segment(
    parts: list[Tensor], bits: int, key_axis: int, window_k: Tensor, window_v: Tensor
) -> tuple[tuple, tuple, int]:
    """Checks a segment. Returns what decode_kernel takes: addresses and sizes, the layout, and the number of splits."""
    op = "kv_decode"
    key_codes, key_scales, value_codes, value_scales, value_channels, starts, counts = parts
    factors = value_channels if value_channels.dim() == 4 else None
    blocks = check_blocks(op, starts, counts, *window_k.shape[:2])
    keys = Packed.of(op, key_codes, key_scales, None, blocks, window_k, bits, key_axis)
    values = Packed.of(op, value_codes, value_scales, factors, blocks, window_v, bits, 1)
    slots = key_codes.shape[2]
    remedy = "Quantise them alike."
    require(value_codes.shape[2] == slots, op, f"{slots} slots of values, as of keys", value_codes.shape[2], remedy)
    each = max(1, min(BLOCKS, blocks // SPLITS))
    splits = -(-blocks // each)
    alignment = 16 if is_aligned(key_codes) and is_aligned(value_codes) else 1
    layout = bits, keys.groups, values.groups, values.separable, keys.block_w, values.block_w, alignment
    places = [place(t) for t in (key_codes, key_scales, value_codes, value_scales, factors, counts)]
    numbers = starts.data_ptr(), blocks, each, splits
    return (*places, *map(unspecialized, numbers)), layout, splits


@ops.decode.triton
def kv_decode(
    q: Tensor,
    segments: list[Tensor],
    window_k: Tensor,
    window_v: Tensor,
    window: Tensor,
    sinks: Tensor | None,
    first: Tensor | None,
    *,
    bits: list[int],
    key_axis: int,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``kv_decode`` in Triton: one launch attends to the splits of all heads, another merges them."""
    op = "kv_decode"
    device = check_device(op, q, *segments, window_k, window_v, window, sinks, first)
    for role, t in (("q", q), ("window_k", window_k), ("window_v", window_v)):
        check_tokens(op, role, t)
    check_queries(op, q, window_k)
    batch, heads = window_k.shape[:2]
    query_heads, queries, head_dim, value_dim = *q.shape[1:], window_v.shape[3]
    same = window_v.shape[:3] == window_k.shape[:3] and window_v.dtype == window_k.dtype
    contract = f"window_v {tuple(window_k.shape[:3])} of {window_k.dtype}, as window_k"
    require(same, op, contract, f"{tuple(window_v.shape)} of {window_v.dtype}", "Only channels may differ.")
    check_layout(op, "window", window, torch.int32, (batch, 2), 1)
    a_sinks = check_option(op, "sinks", sinks, torch.float32, (query_heads,))
    a_first = check_option(op, "first", first, torch.int32, (len(bits), batch, heads))
    tensors, count = len(ops.SEGMENT), len(bits)
    contract = f"{tensors} tensors for each of {count} segments"
    require(len(segments) == tensors * count, op, contract, len(segments), "See the op's schema.")
    parts = [segments[tensors * i : tensors * (i + 1)] for i in range(count)]
    made = [_segment(part, b, key_axis, window_k, window_v) for part, b in zip(parts, bits, strict=True)]

    out = q.new_empty((batch, query_heads, queries, value_dim))
    lse = q.new_empty((batch, query_heads, queries), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    rows = query_heads // heads * queries
    blocks = triton.next_power_of_2(head_dim), triton.next_power_of_2(value_dim)
    row_tiles, splits = -(-rows // ROWS.value), sum(n for _, _, n in made) + 1
    with device_guard(device):
        programs = batch * heads * row_tiles * splits
        partials = torch.empty(programs * ROWS.value * (value_dim + 2), dtype=torch.float32, device=device)
        decode_kernel[(programs,)](
            *(q.data_ptr(), strides(q), tuple(numbers for numbers, _, _ in made)),
            *(window_k.data_ptr(), strides(window_k), window_v.data_ptr(), strides(window_v)),
            *(window.data_ptr(), window.stride(0), a_first, partials),
            *(batch, heads, query_heads // heads, queries, row_tiles, splits, scale, softcap),
            *(tuple(layout for _, layout, _ in made), first is not None, softcap > 0),
            *(STORAGE[q.dtype], STORAGE[window_k.dtype], vector_of(window_k, window_v), head_dim, value_dim),
            *(*blocks, max(LEAST_TILE, TILE_SIZE // max(blocks))),
            **FUSED_OPTIONS,
        )
        merge_kernel[(lse.numel(), -(-value_dim // MERGED_CHANNELS))](
            *(partials, a_sinks, out.data_ptr(), lse, rows, queries, query_heads, row_tiles, splits),
            *(STORAGE[q.dtype], value_dim, MERGED_SPLITS, MERGED_CHANNELS),
            **FUSED_OPTIONS,
        )
    return out, lse


@ops.step_.triton
def kv_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: list[Tensor],
    window_k: Tensor,
    window_v: Tensor,
    window: Tensor,
    sinks: Tensor | None,
    first: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """``kv_step_``: PyTorch stores the new tokens and copies the queries."""
    op = "kv_step_"
    check_device(op, q, k, v, window_k, window_v, window)
    for new, held in ((k, window_k), (v, window_v)):
        shape = (*held.shape[:2], q.shape[2], held.shape[3])
        contract, got = f"tokens {shape} of {held.dtype}, as the window's", f"{tuple(new.shape)} of {new.dtype}"
        require(new.shape == shape and new.dtype == held.dtype, op, contract, got, "Pass the queries' own.")
    slots = window[:, 1:] + torch.arange(-q.shape[2], 0, device=q.device)
    sequences = torch.arange(len(q), device=q.device)[:, None]
    for new, held in ((k, window_k), (v, window_v)):
        held.transpose(1, 2)[sequences, slots] = new.transpose(1, 2)
    out, lse = kv_decode(q, segments, window_k, window_v, window, sinks, first, **options)
    return out, lse, q.clone(memory_format=torch.contiguous_format)


@ops.saliency.triton
def kv_saliency(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    lse: Tensor | None,
    *,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """``kv_saliency`` in Triton: one launch computes the rows' log-sums, unless given, another the column sums."""
    op = "kv_saliency"
    device = check_device(op, q, k, positions, mask, lse)
    check_tokens(op, "q", q)
    check_tokens(op, "k", k)
    check_queries(op, q, k)
    batch, heads, length, head_dim = k.shape
    probes, rows = q.shape[2], q.shape[1] // heads * q.shape[2]
    check_layout(op, "positions", positions, torch.int64, (probes,), 0)
    a_mask = check_option(op, "mask", mask, torch.bool, (batch, length), 1)
    check_option(op, "lse", lse, torch.float32, (batch, q.shape[1], probes))
    sums = k.new_zeros((batch, heads, length), dtype=torch.float32)
    if sums.numel() == 0 or rows == 0:
        return sums
    block_d = triton.next_power_of_2(head_dim)
    scarce = 2 if torch.float32 in (q.dtype, k.dtype) else 1  # tf32x3 products take more registers
    block_r, block_t = (max(LEAST_TILE, size // block_d // scarce) for size in SALIENCY_TILES)
    with device_guard(device):
        given = lse is not None
        lse = torch.empty((batch, heads, rows), dtype=torch.float32, device=device) if lse is None else lse
        arguments = (
            *(q.data_ptr(), *q.stride()[:3], k.data_ptr(), *k.stride()[:3], positions.data_ptr()),
            *(a_mask, 0 if mask is None else mask.stride(0), lse, heads, rows, probes, length, scale, softcap),
        )
        constants = (
            *(mask is not None, softcap > 0, STORAGE[q.dtype], STORAGE[k.dtype]),
            *(head_dim, vector_of(q, k), block_d, block_r, block_t),
        )
        if not given:
            programs = batch * heads * -(-rows // block_r)
            log_sums_kernel[(programs,)](*arguments, *constants, **FUSED_OPTIONS)
        programs = batch * heads * -(-length // block_t)
        column_sums_kernel[(programs,)](*arguments, sums, *constants, **FUSED_OPTIONS)
    return sums


def _turns(op: str, role: str, t: Tensor | None, x: Tensor) -> tuple[int, int, int]:
    """The address and the strides of cosines or sines; zeros if there are none."""
    if t is None:
        return 0, 0, 0
    fits = t.dim() == 3 and t.shape[0] in (1, x.shape[0]) and t.shape[1] == x.shape[2] and t.stride(2) == 1
    fits = fits and 2 <= t.shape[2] <= x.shape[3] and t.shape[2] % 2 == 0
    contract = f"{role} (batch or 1, tokens, an even number of channels) for x {tuple(x.shape)}, dense in the last"
    require(fits, op, contract, tuple(t.shape), "Pass what rotary embeddings give.")
    return t.data_ptr(), 0 if t.shape[0] == 1 else t.stride(0), t.stride(1)


@ops.project_.triton
def kv_project_(
    x: list[Tensor],
    bases: list[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    out: list[Tensor],
    *,
    heads: list[int],
) -> None:
    """``kv_project_`` in Triton, in a launch for each group of each tensor."""
    require(len(x) > 0, "kv_project_", "tokens", "none", "Pass some.")
    op, number, groups = "kv_project_", len(heads), len(bases) // max(len(x), 1)
    device = check_device(op, *x, *bases, cos, sin, *out)
    require(sorted(heads) == list(range(number)), op, f"heads 0 to {number - 1}, each once", heads, "Check them.")
    fits = len(bases) == len(out) == groups * len(x)
    contract, got = f"as many bases as outputs, a multiple of {len(x)}", (len(bases), len(out))
    require(fits, op, contract, got, "Pass one of each for each group of heads.")
    require((cos is None) == (sin is None), op, "both cos and sin, or neither", "one", "Pass both.")
    batch, rows, length = x[0].shape[0], x[0].shape[1], x[0].shape[2]
    turns = *_turns(op, "cos", cos, x[0]), *_turns(op, "sin", sin, x[0])
    rotated = 0 if cos is None else cos.shape[2]
    if cos is not None and sin is not None:
        require_dtypes(op, [cos, sin])
        alike = cos.shape[2] == sin.shape[2] and cos.dtype == sin.dtype
        require(alike, op, "sin as cos", f"{tuple(sin.shape)} of {sin.dtype}", "Pass both alike.")
    launches = []
    for i, tokens in enumerate(x):
        check_tokens(op, "x", tokens)
        alike = tokens.shape[:3] == x[0].shape[:3] and tokens.dtype == x[0].dtype
        contract = f"x {tuple(x[0].shape[:3])} of {x[0].dtype} and a multiple of {number} heads"
        fits = alike and number > 0 and rows % number == 0
        require(fits, op, contract, f"{tuple(tokens.shape)} of {tokens.dtype}", "Pass the same tokens.")
        own = [len(basis) for basis in bases[i * groups : (i + 1) * groups]]
        require(sum(own) == number, op, f"bases of {number} heads", sum(own), "Pass one for each.")
        for g in range(groups):
            named = heads[sum(own[:g]) : sum(own[: g + 1])]
            basis, to = bases[i * groups + g], out[i * groups + g]
            check_layout(op, "bases", basis, torch.float32, (ANY, tokens.shape[3], ANY), 0)
            check_tokens(op, "out", to)
            shape = (batch, rows // number * len(named), length, basis.shape[2])
            fits = to.shape == shape and to.dtype == tokens.dtype
            contract = f"out {shape} of {tokens.dtype}"
            require(fits, op, contract, f"{tuple(to.shape)} of {to.dtype}", "Allocate it so.")
            launches.append((tokens, basis, to, turns, rotated if i == 0 else 0, cos, named))
    with device_guard(device):
        for launch in launches:
            _project(*launch)


def _project(
    x: Tensor,
    basis: Tensor,
    out: Tensor,
    turns: tuple[int, ...],
    rotated: int,
    cos: Tensor | None,
    named: list[int],
) -> None:
    """The launch of one group of heads, of which there may be none."""
    head_dim, rank, length = x.shape[3], basis.shape[2], x.shape[2]
    group = out.shape[1] // max(len(named), 1)
    programs = x.shape[0] * len(named) * -(-group * length // PROJECTED_ROWS)
    if programs > 0:
        project_kernel[(programs,)](
            *(x.data_ptr(), *x.stride()[:3], basis.data_ptr(), out.data_ptr(), *out.stride()[:3], *turns),
            *(tuple(map(unspecialized, named)), len(named), group, length),
            *(STORAGE[x.dtype], "fp32" if cos is None else STORAGE[cos.dtype], rotated, head_dim, rank),
            *(vector_of(x), PROJECTED_CHANNELS, min(triton.next_power_of_2(rank), 64), PROJECTED_ROWS),
            **FUSED_OPTIONS,
        )
