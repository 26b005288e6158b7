# SPDX-License-Identifier: Apache-2.0
"""Rational activations: what is measured in ``cases``, and the targets in ``checks``."""
