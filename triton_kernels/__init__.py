# SPDX-License-Identifier: Apache-2.0
"""Triton implementations of the ops. Importing a module here needs Triton; nothing else in singlepass does."""
