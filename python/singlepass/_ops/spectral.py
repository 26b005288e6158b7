# SPDX-License-Identifier: Apache-2.0
"""Sparse spectral training of W = U^T diag(s) V: what its layers and its optimizer need beside matrix products.

A layer with m outputs, n inputs and k = min(m, n) keeps singular vectors as rows, U (k, m) and V (k, n), in two
segments: the first r rows of both are active and trained, the other k - r frozen; s (k,) has the active values first.

* ``spectral_scale_``: ``q`` (N, k) and ``t`` (N, k), rows of contiguous elements, those of q apart from each other and
  from t; ``s`` (k,), any dtype.
  Multiplies q's columns by s in place, and returns the column sums of q * t as they stood before: with q = g U^T and
  t = x V^T these are what dx = (q diag(s)) V is made of, and the gradient of s. float32 (eager in float64: float64).
* ``spectral_step_``: AdamW on lists of tensors in place, as the optimizer steps define their arguments, and a
  constraint at the end. A matrix (rows, columns), contiguous, has unit rows: each is divided by its Euclidean norm
  after the update (a row of zeros stays). ``project`` takes from each row's gradient its part along the row first. A
  vector has singular values: those below zero become zero. ``seed`` and ``ids`` round bfloat16 parameters
  stochastically, after the constraint.
* ``spectral_sample``: for each layer, draws ``ranks[i]`` of the k places of ``s[i]`` without replacement, with
  probabilities in proportion to uniform / k + (1 - uniform) * s / sum(s), as torch.multinomial would. Returns for each
  layer ``exchange``, int64, (rank,): -1 where the vector in that active place stays, else the frozen row, counted
  from 0, that takes its place; rows that come are in ascending order. Place j of layer i draws its number from words 0
  and 1 of the Philox block with key ``seed`` and counter (j, (draw << 32) + ids[i]); its race time is -log(number) / p,
  and the r first are drawn, the lower place where two are equal. A negative or non-finite value counts as zero; where
  all are zero, all places are equally likely.
* ``spectral_swap_``: exchanges rows between ``active[i]`` (r, c) and ``frozen[i]`` (f, c), or (r,) and (f,), both
  contiguous, as ``exchange[i]`` says, converting between their dtypes. Its rows are distinct; a row that is not there
  stays. A frozen tensor may be int8: ``scales[i]`` (f, ceil(c / 128)), float32, then has a factor for each 128 columns
  of a row, the largest magnitude divided by 127; elsewhere ``scales[i]`` is empty. Codes are rounded to nearest even.
* ``lorentz``: HyboNet's map to the hyperboloid of curvature -1/K from rows z (..., c), c >= 2, and ``log_scale``, one
  element: time = sigmoid(z_0) exp(log_scale) + offset; the rest z_i sqrt(max(time^2 - K, 0) / max(|z_1..|^2, 1e-8)).
  ``lorentz_backward`` returns the gradients of z and of log_scale.

Tensors are float32, bfloat16 or float16 (eager: float64 too); arithmetic is float32.
"""

from __future__ import annotations

import torch

from .op import Op

# Columns of a row of int8 codes that share a factor.
BLOCK = 128

scale_ = Op(
    "spectral",
    "spectral_scale_(Tensor(a!) q, Tensor t, Tensor s) -> Tensor",
    lambda q, t, s: q.new_empty(q.shape[1], dtype=torch.promote_types(q.dtype, torch.float32)),
    "q's columns times s in place; the column sums of q * t.",
    used_by="`spectral.SSTLinear`, backward",
)

step_ = Op(
    "spectral",
    "spectral_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
    "Tensor(d!)[] steps, Tensor lr, *, float beta1, float beta2, float eps, float weight_decay, bool project=False, "
    "bool maximize=False, int? seed=None, int[] ids=[], Tensor? grad_scale=None, Tensor? found_inf=None) -> ()",
    None,
    "AdamW, then unit rows and values that are not negative.",
    used_by="`spectral.SST`",
)

sample = Op(
    "spectral",
    "spectral_sample(Tensor[] s, *, int[] ranks, int[] ids, int seed, int draw, float uniform) -> Tensor[]",
    lambda s, *, ranks, **_: [v.new_empty(rank, dtype=torch.int64) for v, rank in zip(s, ranks, strict=True)],
    "Draws the vectors that are to be active.",
    used_by="`spectral.SST`: draws vectors",
)

swap_ = Op(
    "spectral",
    "spectral_swap_(Tensor(a!)[] active, Tensor(b!)[] frozen, Tensor(c!)[] scales, Tensor[] exchange) -> ()",
    None,
    "Exchanges active rows and frozen ones.",
    used_by="`spectral.SST`: swaps vectors",
    dtypes="fp32, bf16, fp16; int8 frozen vectors",
    typed=(0, 1),
)

lorentz = Op(
    "spectral",
    "lorentz(Tensor z, Tensor log_scale, *, float k, float offset) -> Tensor",
    lambda z, log_scale, **_: z.new_empty(z.shape),
    "HyboNet's map to the hyperboloid.",
    used_by="`spectral.LorentzLinear`, `spectral.lorentz`",
)

lorentz_backward = Op(
    "spectral",
    "lorentz_backward(Tensor grad, Tensor z, Tensor log_scale, *, float k, float offset) -> (Tensor, Tensor)",
    lambda grad, z, log_scale, **_: (z.new_empty(z.shape), log_scale.new_empty(log_scale.shape)),
    "Gradients of z and of log_scale.",
    used_by="their gradients",
)
