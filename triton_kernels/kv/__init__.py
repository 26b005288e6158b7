# SPDX-License-Identifier: Apache-2.0
"""KV caches on GPUs, in Triton."""

from . import launchers

__all__ = ["launchers"]
