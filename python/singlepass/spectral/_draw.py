# SPDX-License-Identifier: Apache-2.0
"""Draws the vectors that are active from now on."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import spectral as ops
from ._linear import SSTLinear


def draw_vectors(
    layers: list[SSTLinear], moments: list[list[Tensor]], seed: int, draw: int, uniform: float, backend: str | None
) -> None:
    """Draws for all layers, and swaps their vectors, singular values, and the ``moments`` (k,) of the values."""
    for device in dict.fromkeys(layer.singular_values.device for layer in layers):
        ids = [i for i, layer in enumerate(layers) if layer.singular_values.device == device]
        here = [layers[i] for i in ids]
        exchange = ops.sample(
            [layer.singular_values.detach() for layer in here],
            ranks=[layer.rank for layer in here],
            ids=ids,
            seed=seed,
            draw=draw,
            uniform=uniform,
            backend=backend,
        )
        none = torch.empty(0, device=device)
        pairs: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for i, layer, change in zip(ids, here, exchange, strict=True):
            pairs.append((layer.active_u, layer.frozen_u, layer.scales_u, change))
            pairs.append((layer.active_v, layer.frozen_v, layer.scales_v, change))
            for values in (layer.singular_values.detach(), *moments[i]):
                pairs.append((values[: layer.rank], values[layer.rank :], none, change))
        ops.swap_(*(list(column) for column in zip(*pairs, strict=True)), backend=backend)
        stored = [p for layer in here for p in (layer.singular_values, *layer.vectors())]
        torch.autograd.graph.increment_version(stored)
