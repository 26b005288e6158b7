# SPDX-License-Identifier: Apache-2.0
"""KV caches on GPUs, in Triton."""

from .launchers import OPS

__all__ = ["OPS"]
