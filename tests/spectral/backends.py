# SPDX-License-Identifier: Apache-2.0
"""Where the ops of sparse spectral training are tested."""

from __future__ import annotations

import pytest
import torch

GPU = [pytest.param(f"cuda {name}", marks=pytest.mark.gpu) for name in ("native", "triton")]
each_kernel = pytest.mark.parametrize("backend", ["native", "simt", *GPU])
each_backend = pytest.mark.parametrize("backend", ["native", "eager", "simt", *GPU])

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

# Half the distance between one and the next float32.
UNIT = 2.0**-24
