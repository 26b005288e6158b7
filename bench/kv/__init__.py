# SPDX-License-Identifier: Apache-2.0
"""KV caches: what is measured in ``cases``, and the targets in ``checks``."""
