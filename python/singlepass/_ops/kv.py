# SPDX-License-Identifier: Apache-2.0
"""A compressed KV cache: tokens in a few bits, quantised block by block, and attention that reads the codes.

Letters: B sequences, H heads of keys and values, Hq heads of queries (H divides Hq: query head h reads head
h // (Hq // H)), L tokens, D channels (a multiple of 16, at most 512), T slots of stored tokens, N blocks.

Slot ``starts[i] + j`` holds token j of block i, where j < ``counts[b, h, i]``; what lies between that and
``starts[i + 1]`` holds nothing. A token's D codes of ``bits`` bits each (2, 4 or 8) lie in planes: with P = 8 / bits
and W = D / P, byte w has the code of channel p * W + w in its bits p * bits and up. Steps and minima are float16,

    x^ = c * (code * step + minimum),    code = round((x / c - minimum) / step) within 0 .. 2^bits - 1,

the minimum rounded down and the step up, so that |x - x^| <= c * step / 2 for |x| <= 65504; beyond, x counts as that.
Zeros among them are positive. Codes are made in float32: (x * (1 / c) - minimum) * (1 / step), ties to even.

* ``axis`` 0: a step and a minimum for each channel of a block, ``scales`` (B, H, N, 2, D); c = 1.
* ``axis`` 1: for each token and each of G equal groups of channels, ``scales`` (B, H, T, 2, G); c is 1, or the
  square root of the largest magnitude that the channel has in the block, ``channels`` (B, H, N, D) in float16.

A group with a NaN or an infinity comes back as NaN. ``codes`` is uint8 (B, H, T, W); ``starts`` (N + 1,), ``counts``
(B, H, N) and ``index`` (B, H, T) are int32. Tensors need a last stride of 1, and all but ``x``, ``q``, ``k`` and ``v``
of the window and ``out`` must be contiguous from the third dimension on.
"""

from __future__ import annotations

import torch

from .op import Op

AXES = ("channel", "token")
BITS = (2, 4, 8)
MAX_HEAD_DIM = 512
SEGMENT = ("key_codes", "key_scales", "value_codes", "value_scales", "value_channels", "starts", "counts")

quantize_ = Op(
    "kv",
    "kv_quantize_(Tensor x, Tensor? index, Tensor starts, Tensor counts, Tensor(a!) codes, Tensor(b!) scales, "
    "Tensor(c!)? channels, *, int bits, int axis) -> ()",
    None,
    """Fills codes, scales and channels from token index[b, h, slot] of x (B, H, L, D), which is the slot's number where
    there is no index.""",
    used_by="`kv.quantize` and the caches",
)

dequantize_ = Op(
    "kv",
    "kv_dequantize_(Tensor codes, Tensor scales, Tensor? channels, Tensor? index, Tensor starts, Tensor counts, "
    "Tensor(a!) out, *, int bits, int axis) -> ()",
    None,
    """The way back: out[b, h, index[b, h, slot]] = x^, for the slots that hold a token. Other places of out stay.""",
    used_by="`kv.dequantize` and the caches",
    typed=(6,),
)

saliency = Op(
    "kv",
    "kv_saliency(Tensor q, Tensor k, Tensor positions, Tensor? mask, Tensor? lse, *, float scale, float softcap=0.0) "
    "-> Tensor",
    lambda q, k, *_, **__: k.new_empty(k.shape[:3], dtype=torch.float32),
    """How much attention tokens get from probes: column sums, over the P probes q (B, Hq, P, D) and over the query
    heads of a head, of softmax(cap(scale * q k^T)) for k (B, H, L, D): (B, H, L) in float32. Probe p stands at
    positions[p] (int64), sees the tokens up to there for which mask (B, L) is true, and counts if its own token is
    among those. With lse (B, Hq, P), float32, rows are exp(logit - lse) instead.
    cap(s) = softcap * tanh(s / softcap) if softcap > 0.""",
    used_by="`kv.probe_saliency` and the caches",
    typed=(0, 1),
)

decode = Op(
    "kv",
    "kv_decode(Tensor q, Tensor[] segments, Tensor window_k, Tensor window_v, Tensor window, Tensor? sinks, "
    "Tensor? first, *, int[] bits, int key_axis, float scale, float softcap=0.0) -> (Tensor, Tensor)",
    lambda q, segments, window_k, window_v, *_, **__: (
        q.new_empty((*q.shape[:3], window_v.shape[3])),
        q.new_empty(q.shape[:3], dtype=torch.float32),
    ),
    """Attention of q (B, Hq, Lq, D) over segments of compressed tokens, seven tensors each in the order of SEGMENT
    (empty value_channels: c = 1), and over the slots window[b, 0] <= j < window[b, 1] (int32) of window_k (B, H, W, D)
    and window_v (B, H, W, Dv). The last of those is the last query's own token: query i does not see the Lq - 1 - i
    slots before window[b, 1]. `first` (segments, B, H), int32: slots before it are not seen. `sinks` (Hq,), float32: a
    logit more in each row's sum. Returns the result, (B, Hq, Lq, Dv) in q's dtype, and the logarithm of the sums of
    exp, (B, Hq, Lq) in float32; a row that sees nothing gives 0 and -inf.

    Natively, where q has 16 bits and codes one group of channels, q * step and weight * step count as multiples of 1 /
    32639 of the largest in their row and block (fewer beyond 256 channels of 8 bits); smaller than 2^-100, as 0. In
    CUDA that holds for float32, too, with 32639^2, but not for segments of fewer than 32 slots or misaligned codes.""",
    used_by="`kv.decode_attention` and the caches",
    dtypes="fp32, bf16, fp16; 8, 4, 2 bits",
    typed=(0, 2),
)

step_ = Op(
    "kv",
    "kv_step_(Tensor q, Tensor k, Tensor v, Tensor[] segments, Tensor(a!) window_k, Tensor(b!) window_v, "
    "Tensor window, Tensor? sinks, Tensor? first, *, int[] bits, int key_axis, float scale, float softcap=0.0) "
    "-> (Tensor, Tensor, Tensor)",
    lambda q, k, v, segments, window_k, window_v, *_, **__: (
        q.new_empty((*q.shape[:3], window_v.shape[3])),
        q.new_empty(q.shape[:3], dtype=torch.float32),
        q.new_empty(q.shape),
    ),
    """kv_decode of tokens that come with their queries: k (B, H, Lq, D) and v (B, H, Lq, Dv), of the window's dtype, go
    to its slots window[b, 1] - Lq and up before it is read; none of those is before window[b, 0]. Returns the result,
    the logarithms, and q in memory of its own, for probes.""",
    used_by="the caches",
    dtypes="fp32, bf16, fp16; 8, 4, 2 bits",
    typed=(0, 4),
)

project_ = Op(
    "kv",
    "kv_project_(Tensor[] x, Tensor[] bases, Tensor? cos, Tensor? sin, Tensor(a!)[] out, *, int[] heads) -> ()",
    None,
    """Tokens in coordinates of bases, where heads of equal rank form a group. Each x[i] (B, Hx, L, D) has n = Hx / H
    heads for each of H KV heads, one after another, and G groups: bases[i * G + g] (Hg, D, R), float32, has the basis
    of a head in its columns; ``heads`` are the numbers of the heads, group after group, all H of them once.
    out[i * G + g] (B, Hg * n, L, R), x's dtype, becomes x[i] @ basis for the heads of the group. cos and sin (B or 1,
    L, C), x's dtype or float32: before, the first C channels of x[0] become x * cos + (-x2, x1) * sin, of their halves
    (x1, x2).""",
    used_by="`kv.MatryoshkaLayer`",
)
