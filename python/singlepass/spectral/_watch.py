# SPDX-License-Identifier: Apache-2.0
"""Notices singular vectors that an optimizer other than SST has stepped: they leave unit length."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from .._errors import message

# How far a length may be from 1. Storage in bfloat16 changes it by 2^-9 at most; int8 codes by a few thousandths.
_TOLERANCE = 1e-2

_warned = False


def off_unit(u: Tensor, v: Tensor) -> tuple[float, float] | None:
    """The least and the greatest length of rows, if one of them is not of unit length. Waits for the device."""
    wide = torch.promote_types(u.dtype, torch.float32)
    lengths = torch.cat([torch.linalg.vector_norm(rows.detach(), dim=1, dtype=wide) for rows in (u, v)])
    least, greatest = torch.stack(lengths.aminmax()).tolist()
    return (least, greatest) if greatest > 1.0 + _TOLERANCE or least < 1.0 - _TOLERANCE else None


def warn(where: str, got: str) -> None:
    contract = "singular vectors of unit length, as singlepass.spectral.SST keeps them"
    remedy = "Train the model by SST: other optimizers train only the active vectors, and let them leave unit length."
    warnings.warn(message(where, contract, got, remedy), stacklevel=3)


class Watch:
    """Watches one layer's active vectors.

    A forward pass reads two counters on the host. The vectors themselves are read, for which the host waits, only where
    somebody else than SST wrote to them: after the first, second, fourth, eighth and so on of such changes.
    """

    def __init__(self) -> None:
        self._version = -1
        self._changes = 0

    def trust(self, u: Tensor, v: Tensor) -> None:
        """Takes the vectors, as they are now, to be of unit length."""
        self._version = _version(u, v)

    def look(self, where: str, u: nn.Parameter, v: nn.Parameter) -> None:
        """Warns, once in a process, if vectors have left unit length since they were last trusted or looked at."""
        global _warned
        version = _version(u, v)
        if version == self._version or _warned or not _readable(u):
            return
        self._version = version
        self._changes += 1
        if self._changes & (self._changes - 1):
            return
        lengths = off_unit(u, v)
        if lengths is not None:
            _warned = True
            warn(where, f"lengths from {lengths[0]:.3g} to {lengths[1]:.3g} after a step or another change in place")


def _version(u: Tensor, v: Tensor) -> int:
    """Changes with every write in place."""
    try:
        return u._version + v._version
    except RuntimeError:  # tensors made in inference mode count no versions, and cannot be trained
        return 0


def _readable(p: nn.Parameter) -> bool:
    """Whether values may be read here: not of fake or sharded tensors, in a trace or during a CUDA graph capture."""
    if type(p) is not nn.Parameter or p.is_meta or torch.jit.is_tracing():
        return False
    return not (p.is_cuda and torch.cuda.is_current_stream_capturing())
