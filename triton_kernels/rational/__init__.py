# SPDX-License-Identifier: Apache-2.0
"""Rational activations on GPUs, in Triton."""

from .launchers import OPS

__all__ = ["OPS"]
