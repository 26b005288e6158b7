# SPDX-License-Identifier: Apache-2.0
"""Optimizer steps on GPUs, in Triton."""

from .launchers import OPS

__all__ = ["OPS"]
