# SPDX-License-Identifier: Apache-2.0
"""Measures every op against its one-pass memory floor, eager PyTorch, ``torch.compile`` and installed peers.

Run it with ``singlepass bench``; docs/benchmarks.md says how things are measured and what the columns mean.
"""
