# SPDX-License-Identifier: Apache-2.0
"""Sparse spectral training on GPUs, in Triton."""

from . import launchers

__all__ = ["launchers"]
