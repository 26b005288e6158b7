# SPDX-License-Identifier: Apache-2.0
"""The table of bytes is what a cache takes."""

from __future__ import annotations

import pytest

from singlepass.kv import Codec, ZipCacheLayer, cache_nbytes

from .layers import drawn

CODECS = {
    "zipcache": Codec.zipcache(),
    "one block": Codec.zipcache(None),
    "kivi": Codec.kivi(16),
    "per token and head": Codec.per_token_head(),
}


@pytest.mark.parametrize("ratio", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("tokens", [1, 129, 300])
def test_a_prompt_takes_what_the_table_says(tokens: int, name: str, ratio: float) -> None:
    q, k, v = drawn(tokens, batch=2, heads=3)
    options = {"salient_ratio": ratio, "salient_bits": 8, "regular_bits": 4, "codec": CODECS[name]}
    layer = ZipCacheLayer(**options)
    layer.prefill(q, k, v)
    assert cache_nbytes(tokens, batch=2, heads=3, head_dim=k.shape[3], **options) == layer.nbytes
