# SPDX-License-Identifier: Apache-2.0
"""Sparse spectral training on GPUs, in Triton."""

from .launchers import OPS

__all__ = ["OPS"]
