# SPDX-License-Identifier: Apache-2.0
"""Rational activations on GPUs, in Triton."""

from . import launchers

__all__ = ["launchers"]
