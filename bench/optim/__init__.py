# SPDX-License-Identifier: Apache-2.0
"""Steps of optimizers: what is measured in ``cases``, and the targets in ``checks``."""
