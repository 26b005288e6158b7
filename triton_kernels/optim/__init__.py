# SPDX-License-Identifier: Apache-2.0
"""Optimizer steps on GPUs, in Triton."""

from . import grad_norm, launchers

__all__ = ["grad_norm", "launchers"]
