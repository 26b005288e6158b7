# SPDX-License-Identifier: Apache-2.0
"""One module per family; each has a function ``cases()`` that yields its `Case` objects."""
