# SPDX-License-Identifier: Apache-2.0
"""Proof on a GPU: what the kernels claim, proved or refuted on one machine. docs/gpu-proof.md explains it."""
