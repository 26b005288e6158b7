# SPDX-License-Identifier: Apache-2.0
"""Sparse spectral training: what is measured in ``cases``, and the targets in ``checks``."""
