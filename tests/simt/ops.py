# SPDX-License-Identifier: Apache-2.0
"""The ops as GPUs run them, registration included, on the CPU: what `backend="simt"` means in tests."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from singlepass._ops import OPS, Op

from .build import MODULE_FOLDER, build

NAMESPACE = "singlepass_simt"


@functools.cache
def _library() -> torch.library.Library:
    """Defines the ops once more, in a namespace of their own, and loads what runs them."""
    library = torch.library.Library(NAMESPACE, "DEF")
    for op in OPS.values():
        library.define(str(op.overload._schema).partition("::")[2], tags=tuple(op.overload.tags))
        library.impl(op.name, op.on("eager"), "CompositeExplicitAutograd")  # as in the package
    folder = Path(os.environ[MODULE_FOLDER]) if MODULE_FOLDER in os.environ else build(sanitize=False)
    torch.ops.load_library(folder / "_C_simt.so")
    return library


def overload(op: Op) -> Callable[..., Any]:
    """The function of an op."""
    _library()
    return getattr(getattr(torch.ops, NAMESPACE), op.name).default


@contextmanager
def in_place_of_native() -> Iterator[None]:
    """Native implementations are these, as on a GPU they would be CUDA's."""
    find = Op.on
    with mock.patch.object(Op, "on", lambda op, backend: overload(op) if backend == "native" else find(op, backend)):
        yield
