# SPDX-License-Identifier: Apache-2.0
"""What the kernels for GPUs do, counted without one, and how long a GPU should take for it."""
