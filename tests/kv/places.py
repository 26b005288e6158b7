# SPDX-License-Identifier: Apache-2.0
"""The functions under test, on the CPU or on a GPU."""

from __future__ import annotations

from singlepass import kv

from ..placed import placed

quantize = placed(kv.quantize)
dequantize = placed(kv.dequantize)
probe_saliency = placed(kv.probe_saliency)
decode_attention = placed(kv.decode_attention)
