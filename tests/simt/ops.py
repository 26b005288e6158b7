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
from singlepass._ops.optim import StepOp

from .build import MODULE_FOLDER, build, build_counting

COUNTING = "traffic"  # the library whose ops count what kernels do to memory


def library(name: str = "simt") -> Path:
    if name == COUNTING:
        return build_counting() / "_C_traffic.so"
    folder = Path(os.environ[MODULE_FOLDER]) if MODULE_FOLDER in os.environ else build(sanitize=False)
    return folder / "_C_simt.so"


@functools.cache
def _define(name: str) -> torch.library.Library:
    """Defines the ops once more, in a namespace of their own, and loads what runs them."""
    path = library(name)  # may skip the test
    defined = torch.library.Library(f"singlepass_{name}", "DEF")
    for op in OPS.values():
        for overload_name in op.overload.overloadpacket.overloads():
            declared = getattr(op.overload.overloadpacket, overload_name)
            defined.define(str(declared._schema).partition("::")[2], tags=tuple(declared.tags))
        defined.impl(op.name, op.on("eager"), "CompositeExplicitAutograd")  # as in the package
    torch.ops.load_library(path)
    return defined


def overload(op: Op, name: str = "simt") -> Callable[..., Any]:
    """The function of an op, in a library."""
    _define(name)
    return getattr(getattr(torch.ops, f"singlepass_{name}"), op.name).default


@contextmanager
def in_place_of_native() -> Iterator[None]:
    """Native implementations are these, as on a GPU they would be CUDA's."""
    find = Op.on
    with (
        mock.patch.object(Op, "on", lambda op, backend: overload(op) if backend == "native" else find(op, backend)),
        mock.patch.object(StepOp, "at", lambda op: overload(op).overloadpacket.at),
    ):
        yield
