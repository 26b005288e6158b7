# SPDX-License-Identifier: Apache-2.0
"""What Triton's kernels may take, as one Triton compiles them for H100 and H200."""

from __future__ import annotations

from dataclasses import dataclass

TRITON = "3.7"
ARCH = "sm_90"


@dataclass(frozen=True)
class TritonBudget:
    """Of a launch of a case: registers of a thread, and instructions of a pass of the hot loop for each element."""

    case: str
    launch: int
    registers: int
    instructions: float

    def __str__(self) -> str:
        return f"{self.case} {self.launch}"


TRITON_BUDGETS = (
    TritonBudget("optim/AdamW/gpt2-small/bfloat16", 0, 54, 50),
    TritonBudget("optim/Lion/gpt2-small/bfloat16", 0, 30, 29),
    TritonBudget("optim/AdaBelief/gpt2-small/bfloat16", 0, 53, 54.5),
    TritonBudget("optim/Adan/gpt2-small/bfloat16", 0, 68, 70.5),
    TritonBudget("optim/DiffGrad/gpt2-small/bfloat16", 0, 58, 72.5),
    TritonBudget("optim/LAMB/gpt2-small/bfloat16", 0, 34, 5.7),
    TritonBudget("optim/LAMB/gpt2-small/bfloat16", 1, 80, 50),
    TritonBudget("optim/LAMB/gpt2-small/bfloat16", 2, 40, 40.5),
    TritonBudget("optim/LARS/gpt2-small/bfloat16", 0, 40, 15.3),
    TritonBudget("optim/LARS/gpt2-small/bfloat16", 1, 32, 23),
    TritonBudget("optim/SGDSaI/gpt2-small/bfloat16", 0, 32, 23),
    TritonBudget("rational/rational_backward/128x197x3072/bfloat16", 0, 31, 32.5),
    TritonBudget("rational/rational_backward/128x197x3072/bfloat16", 1, 72, 75),
    TritonBudget("rational/rational_backward/128x197x3072/bfloat16", 2, 32, 7.2),
    TritonBudget("kv/kv_decode/1x32768/bfloat16", 0, 128, 7.2),
    TritonBudget("kv/kv_decode/1x32768/bfloat16", 1, 56, 22),
    TritonBudget("kv/low_rank_append/1x32768/bfloat16", 0, 139, 26.2),
    TritonBudget("kv/kv_quantize_/1x32768/bfloat16", 0, 64, 18),
    TritonBudget("kv/kv_quantize_/1x32768/bfloat16", 1, 64, 39.5),
    TritonBudget("kv/kv_quantize_/1x32768/bfloat16", 2, 70, 21.3),
    TritonBudget("kv/kv_quantize_/1x32768/bfloat16", 3, 64, 43),
    TritonBudget("kv/kv_dequantize_/1x32768/bfloat16", 0, 56, 11.5),
    TritonBudget("kv/kv_dequantize_/1x32768/bfloat16", 1, 48, 18),
    TritonBudget("kv/kv_dequantize_/1x32768/bfloat16", 2, 55, 11),
    TritonBudget("kv/kv_dequantize_/1x32768/bfloat16", 3, 48, 17),
    TritonBudget("kv/kv_saliency/1x8192/bfloat16", 0, 127, 62),
    TritonBudget("kv/kv_saliency/1x8192/bfloat16", 1, 162, 66),
    TritonBudget("spectral/spectral_step_/12-blocks-768/bfloat16", 0, 64, 102),
    TritonBudget("spectral/spectral_step_/12-blocks-768/bfloat16", 1, 107, 79),
    TritonBudget("spectral/spectral_step_/12-blocks-768/bfloat16", 2, 48, 93.5),
    TritonBudget("spectral/spectral_scale_/2048x8192/bfloat16", 0, 48, 16),
    TritonBudget("spectral/spectral_scale_/2048x8192/bfloat16", 1, 32, 10.7),
    TritonBudget("spectral/lorentz/2048x8192/bfloat16", 0, 31, 11.6),
    TritonBudget("spectral/lorentz_backward/2048x8192/bfloat16", 0, 72, 17.7),
    TritonBudget("spectral/lorentz_backward/2048x8192/bfloat16", 1, 39, 9.3),
)
