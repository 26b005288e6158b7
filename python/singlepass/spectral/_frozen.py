# SPDX-License-Identifier: Apache-2.0
"""How frozen singular vectors are stored, and the memory that training needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._errors import require
from .._ops.spectral import BLOCK
from ..reference.spectral import decode, encode

FROZEN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64)


def factors_shape(rows: int, columns: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Of the factors that rows of a frozen dtype have."""
    return (rows, -(-columns // BLOCK)) if dtype == torch.int8 else (0,)


class Codes(nn.Parameter):
    """A parameter of integers, which ``model.requires_grad_(True)`` leaves alone: it can take no gradient."""

    def __new__(cls, data: Tensor) -> Codes:
        return super().__new__(cls, data, requires_grad=False)

    def requires_grad_(self, requires_grad: bool = True) -> Codes:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Codes:
        if id(self) not in memo:
            memo[id(self)] = type(self)(self.data.clone())
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self), (self.data,)


def frozen_parameter(rows: Tensor) -> nn.Parameter:
    """Rows, or codes, as a parameter without gradients; a parameter that is one is returned as it is."""
    kind = Codes if rows.dtype == torch.int8 else nn.Parameter
    if isinstance(rows, kind):
        return rows
    return Codes(rows.detach()) if kind is Codes else nn.Parameter(rows, requires_grad=False)


def freeze(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows in a frozen dtype, and the factors of int8 codes (of no elements for other dtypes)."""
    if dtype == torch.int8:
        return encode(rows)
    return rows.to(dtype, copy=True), rows.new_empty(0, dtype=torch.float32)


def thaw(stored: Tensor, scales: Tensor) -> Tensor:
    """Rows of a floating-point dtype; int8 codes become float32."""
    return decode(stored, scales) if stored.dtype == torch.int8 else stored


def check_frozen_dtype(where: str, dtype: torch.dtype | None) -> None:
    names = "None, torch.float32, torch.bfloat16, torch.float16, torch.float64 or torch.int8"
    require(dtype is None or dtype in FROZEN_DTYPES, where, f"frozen_dtype {names}", dtype, "Choose one of them.")


def training_nbytes(module: nn.Module, state_dtype: torch.dtype = torch.float32) -> dict[str, int]:
    """Bytes for training a module with AdamW: ``weights``, ``gradients``, ``states`` and their ``total``.

    Args:
        module: any module; parameters with ``requires_grad=False`` have neither gradients nor states.
        state_dtype: of AdamW's two moments.

    Example:
        >>> import torch
        >>> from singlepass.spectral import SSTLinear, training_nbytes
        >>> training_nbytes(torch.nn.Linear(512, 512, bias=False))["total"]
        4194304
        >>> training_nbytes(SSTLinear(512, 512, rank=32, bias=False))["total"]
        2498568
    """
    counts = {"weights": 0, "gradients": 0, "states": 0}
    for p in module.parameters():
        counts["weights"] += p.nbytes
        if p.requires_grad:
            counts["gradients"] += p.nbytes
            counts["states"] += 2 * p.numel() * state_dtype.itemsize
    counts["weights"] += sum(b.nbytes for b in module.buffers())
    return counts | {"total": sum(counts.values())}
