# SPDX-License-Identifier: Apache-2.0
"""Tables that are counted, not measured: traffic of optimizers, bytes of caches, memory of training."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .grid import Grid, number
from .registry import dtype_name


def traffic_grid() -> Grid:
    """The passes of each optimizer's floor and their bytes for a parameter."""
    from .optim.cases import RULES

    dtypes = (torch.float32, torch.bfloat16)
    head = ["optimizer", "passes: read only / read and written", *(f"p, g, h in {dtype_name(d)}" for d in dtypes)]
    grid = Grid("Bytes of a step for each parameter", head)
    for rule in RULES:
        passes = "; ".join(" / ".join(" ".join(letters) or "–" for letters in p) for p in rule.passes)
        grid.lines.append([rule.name, passes, *(str(sum(p.bytes for p in rule.traffic(1, d))) for d in dtypes)])
    return grid


def cache_grid(tokens: int = 32768, width: int = 128) -> Grid:
    """Bytes of a token's key and value in one head, counted by the cache itself."""
    from singlepass.kv import Codec, cache_nbytes

    own, kivi, flat = Codec.zipcache(), Codec.kivi(), Codec.per_token_head()
    caches = (
        ("ZipCache, 60 % in 4 bits, the rest in 2", 0.6, 4, 2, own),
        ("ZipCache, 60 %, regular blocks of 16", 0.6, 4, 2, Codec(regular_block=16)),
        ("ZipCache, 60 %, blocks of 128", 0.6, 4, 2, Codec(regular_block=128)),
        ("ZipCache, 60 %, one block for the prompt", 0.6, 4, 2, Codec.zipcache(None)),
        ("ZipCache, 40 %", 0.4, 4, 2, own),
        ("ZipCache, 80 %", 0.8, 4, 2, own),
        ("8 bits for each token and head", 1.0, 8, 8, flat),
        ("4 bits for each token and head", 1.0, 4, 4, flat),
        ("ZipCache's codec, all in 4 bits", 1.0, 4, 4, own),
        ("ZipCache's codec, all in 2 bits", 0.0, 4, 2, own),
        ("KIVI, 4 bits, groups of 32", 1.0, 4, 4, kivi),
        ("KIVI, 2 bits, groups of 32", 0.0, 2, 2, kivi),
    )
    head = ["cache", "bytes per token and head", "bits per element", "times smaller than 16 bits"]
    grid = Grid(f"A prompt of {tokens:,} tokens, head_dim {width}", head)
    grid.lines.append(["16 bits", str(4 * width), "16.00", "1.00"])
    for name, ratio, salient, regular, codec in caches:
        options: dict[str, Any] = {"salient_ratio": ratio, "salient_bits": salient, "regular_bits": regular}
        per_token = cache_nbytes(tokens, head_dim=width, codec=codec, **options) / tokens
        numbers = (per_token, 8 * per_token / (2 * width), 4 * width / per_token)
        grid.lines.append([name, *(f"{n:.{digits}f}" for n, digits in zip(numbers, (1, 2, 2), strict=True))])
    return grid


def training_grid(width: int = 2048, rank: int = 128) -> Grid:
    """Bytes that training a square layer keeps, counted on its tensors; GaLore's by its formula."""
    from singlepass.spectral import SSTLinear, training_nbytes

    layer = partial(SSTLinear, width, width, rank, False, device="meta")
    dense = training_nbytes(torch.nn.Linear(width, width, False, device="meta"))
    rows = {"full rank, AdamW": dense}
    # galore-torch: the dense weight and gradient, a projector, and two moments of rank rows.
    galore = {"weights": dense["weights"], "gradients": dense["gradients"], "states": 3 * rank * width * 4}
    rows["GaLore, float32"] = galore | {"total": sum(galore.values())}
    for name, dtype in (("float32", None), ("bfloat16", torch.bfloat16), ("int8", torch.int8)):
        rows[f"SST, frozen vectors in {name}"] = training_nbytes(layer(frozen_dtype=dtype))
    parts = list(dense)
    grid = Grid(f"MiB that training a {width} x {width} layer keeps, rank {rank}", ["", *parts, "of full rank"])
    for name, counts in rows.items():
        grid.lines.append([name, *(number(counts[part] / 2**20) for part in parts)])
        grid.lines[-1].append(f"{100 * counts['total'] / dense['total']:.0f} %")
    return grid
