# SPDX-License-Identifier: Apache-2.0
"""What kernels may take, as one nvcc compiles them for sm_80, which A100 and RTX 4090 run, and for H100 and H200."""

from __future__ import annotations

from dataclasses import dataclass

NVCC = "13.0"
ARCHS = ("sm_80", "sm_90")
DECODE_BYTES = 6_000_000  # of decode attention's cubins, for all architectures
# Instructions of a warp for 32 tokens of decode attention's window, of 128 channels, and for four rows of queries.
WINDOW_CHUNK = {"bfloat16": 740, "float32": 1703}

# What is counted in a pass of the hot loop, for each element of a lane.
INSTRUCTIONS, DOUBLES, CONVERSIONS = "instructions", "float64 operations", "conversions to float64"
TENSOR = "tensor-core instructions of a warp for 1,024 elements"
# In the hot loop as a whole.
NARROW, DIVISIONS, CALLS = "accesses of less than 16 bytes", "integer divisions", "calls"
# In the launch: instructions of all warps' lanes for each element of the case.
EXECUTED = "executed instructions"
REGISTERS, SPILLED = "registers", "bytes of local memory"


@dataclass(frozen=True)
class Budget:
    """Of one launch of a benchmark's case.

    instructions, executed: see above; the second is None where a launch goes over results, not elements.
    doubles, conversions, tensor: float64 operations, conversions to it, and tensor-core instructions.
    blocks: that an SM of an H100 and of an A100 holds at least.
    """

    case: str
    launch: int
    registers: int
    blocks: int
    instructions: float
    executed: float | None
    reason: str
    doubles: float = 0.0
    conversions: float = 0.0
    tensor: float = 0.0

    @property
    def subject(self) -> str:
        return f"{self.case} {self.launch}"


_STREAM = "memory binds: in the time in which an H200 copies a byte, it issues 6.9 instructions of a lane"
_ROOTS = "the same, with a square root and a division by IEEE's rules"
_SMALL = "the same in bfloat16, which is rounded in six instructions"
_NORM = "one float64 operation for each square: a fused one rounds as two do, because products of floats are exact"
_FORWARD = "at most 4 x 6.9 instructions for each element of 4 bytes on an H200; a thread's start counts, too"
_BACKWARD = "arithmetic alone is 37 instructions for each element; the H200 has 41, the A100 29 of its float32 lanes"
_REDUCE = "few: reads partial sums, two at a time"
_DECODE = "0.54 bytes for each code in 4 bits, for which an H200 has 3.7 instructions; two limbs of integers"
_HALVES = "the same with four limbs, as a second integer takes what the first leaves over"
_SALIENCY = "0.64 of the rate of tensor cores: 16 instructions for each logit of 128 channels, on an H100"
_ROWS = "memory binds: in the time in which an H200 copies a byte, it issues 6.9 instructions; a square for the norm"
_COLUMNS = "memory binds; sums of products in float32, and of those in float64"
_ADDED = "few: adds up what blocks have left"
_HYPERBOLIC = "the same as for norms: |z|^2, and backward grad . z"
_CODEC = "issue binds, not memory, where blocks are small: once for each prompt, under 1 % of its time"
_PROJECTED = "a launch binds: one token of 16 heads"
_PARTS = "three bfloat16 parts of each float32, of whose products six are made"

BUDGETS = (
    Budget("optim/AdamW/gpt2-small/float32", 0, 85, 2, 37, 38.1, _ROOTS),
    Budget("optim/Lion/gpt2-small/float32", 0, 72, 3, 19, 20.2, _STREAM),
    Budget("optim/AdaBelief/gpt2-small/float32", 0, 78, 3, 20.5, 22, _ROOTS),
    Budget("optim/Adan/gpt2-small/float32", 0, 110, 2, 51, 54, _ROOTS),
    Budget("optim/DiffGrad/gpt2-small/float32", 0, 94, 2, 58, 58.8, _ROOTS),
    Budget("optim/LAMB/gpt2-small/float32", 0, 32, 8, 3.4, 5, _NORM, doubles=1, conversions=1),
    Budget("optim/LAMB/gpt2-small/float32", 1, 78, 3, 41, 44, _NORM, doubles=2, conversions=2),
    Budget("optim/LAMB/gpt2-small/float32", 2, 60, 4, 30, 31, _ROOTS),
    Budget("optim/LARS/gpt2-small/float32", 0, 56, 4, 7, 9.3, _NORM, doubles=2, conversions=2),
    Budget("optim/LARS/gpt2-small/float32", 1, 64, 4, 10, 11.3, _STREAM),
    Budget("optim/SGDSaI/gpt2-small/float32", 0, 64, 4, 10, 11.2, _STREAM),
    Budget("optim/AdamW/gpt2-small/bfloat16", 0, 99, 2, 57.5, 59, _SMALL),
    Budget("optim/Lion/gpt2-small/bfloat16", 0, 83, 2, 37.5, 39, _SMALL),
    Budget("optim/AdaBelief/gpt2-small/bfloat16", 0, 106, 2, 39.5, 41, _SMALL),
    Budget("optim/Adan/gpt2-small/bfloat16", 0, 119, 2, 82.5, 84, _SMALL),
    Budget("optim/DiffGrad/gpt2-small/bfloat16", 0, 109, 2, 93, 94.5, _SMALL),
    Budget("optim/LAMB/gpt2-small/bfloat16", 0, 32, 8, 4.75, 6.4, _NORM, doubles=1, conversions=1),
    Budget("optim/LAMB/gpt2-small/bfloat16", 1, 91, 2, 48.5, 51, _NORM, doubles=2, conversions=2),
    Budget("optim/LAMB/gpt2-small/bfloat16", 2, 70, 3, 45, 46, _SMALL),
    Budget("optim/LARS/gpt2-small/bfloat16", 0, 64, 4, 11.5, 14, _NORM, doubles=2, conversions=2),
    Budget("optim/LARS/gpt2-small/bfloat16", 1, 80, 3, 28.5, 29.6, _SMALL),
    Budget("optim/SGDSaI/gpt2-small/bfloat16", 0, 80, 3, 28.5, 29.6, _SMALL),
    Budget("rational/rational_backward/128x197x3072/float32", 0, 32, 8, 13.6, 14.8, _FORWARD),
    Budget("rational/rational_backward/128x197x3072/float32", 1, 80, 4, 43, 44, _BACKWARD),
    Budget("rational/rational_backward/128x197x3072/bfloat16", 0, 32, 8, 13.9, 15, _FORWARD),
    Budget("rational/rational_backward/128x197x3072/bfloat16", 1, 80, 4, 44.5, 45.5, _BACKWARD),
    Budget("rational/rational_backward/128x197x3072/bfloat16", 2, 32, 8, 5.2, None, _REDUCE, doubles=1),
    Budget("spectral/spectral_step_/12-blocks-768/float32", 0, 65, 7, 42, 6.1, _ROWS, doubles=1, conversions=1),
    Budget("spectral/spectral_step_/12-blocks-768/bfloat16", 0, 118, 4, 54, 8.2, _ROWS, doubles=1, conversions=1),
    Budget("spectral/spectral_scale_/2048x8192/float32", 0, 110, 2, 8.4, 43, _COLUMNS),
    Budget("spectral/spectral_scale_/2048x8192/float32", 1, 32, 8, 5.8, None, _ADDED, doubles=1),
    Budget("spectral/spectral_scale_/2048x8192/bfloat16", 0, 110, 2, 8.6, 43, _COLUMNS),
    Budget("spectral/lorentz/2048x8192/float32", 0, 80, 3, 3.3, 37, _HYPERBOLIC, doubles=1, conversions=1),
    Budget("spectral/lorentz/2048x8192/bfloat16", 0, 54, 4, 3.8, 38, _HYPERBOLIC, doubles=1, conversions=1),
    Budget("spectral/lorentz_backward/2048x8192/float32", 0, 96, 2, 7.8, 59, _HYPERBOLIC, doubles=2, conversions=2),
    Budget("spectral/lorentz_backward/2048x8192/float32", 1, 32, 8, 10.9, None, _ADDED, doubles=1),
    Budget("spectral/lorentz_backward/2048x8192/bfloat16", 0, 72, 3, 9.3, 69, _HYPERBOLIC, doubles=2, conversions=2),
    Budget("kv/kv_quantize_/1x32768/float32", 0, 98, 2, 12.8, 9.9, _CODEC),
    Budget("kv/kv_quantize_/1x32768/float32", 1, 104, 2, 29, 14.7, _CODEC),
    Budget("kv/kv_quantize_/1x32768/float32", 2, 104, 2, 13.4, 13.6, _CODEC),
    Budget("kv/kv_quantize_/1x32768/float32", 3, 110, 2, 29.5, 15.4, _CODEC),
    Budget("kv/kv_dequantize_/1x32768/float32", 0, 88, 2, 11.3, 4.8, _CODEC),
    Budget("kv/kv_dequantize_/1x32768/float32", 1, 76, 3, 36, 11.8, _CODEC),
    Budget("kv/kv_dequantize_/1x32768/float32", 2, 120, 2, 11.6, 6, _CODEC),
    Budget("kv/kv_dequantize_/1x32768/float32", 3, 80, 3, 37.1, 10.3, _CODEC),
    Budget("kv/low_rank_append/1x32768/float32", 0, 91, 5, 28, None, _PROJECTED, tensor=48),
    Budget("kv/kv_decode/8x32768/bfloat16", 0, 128, 4, 1.36, 2.2, _DECODE, tensor=2),
    Budget("kv/kv_decode/8x32768/float32", 0, 168, 3, 1.85, 3, _HALVES, tensor=4),
    Budget("kv/kv_saliency/1x8192/bfloat16", 0, 168, 3, 10, None, _SALIENCY, tensor=64),
    Budget("kv/kv_saliency/1x8192/bfloat16", 1, 168, 3, 9.3, None, _SALIENCY, tensor=64),
    Budget("kv/kv_saliency/1x8192/float32", 0, 255, 2, 60.6, None, _PARTS, tensor=384),
    Budget("kv/kv_saliency/1x8192/float32", 1, 255, 2, 59.5, None, _PARTS, tensor=384),
)


ATEN, ALLOCATED, COPIED = "aten ops", "allocations", "copies"


@dataclass(frozen=True)
class HostBudget:
    """Of one call of a public entry, which may read no value of the device.

    ours: our ops, inside which nothing is seen. aten: PyTorch's; allocations, copies: which of them are such.
    """

    entry: str
    ours: int
    aten: int
    allocations: int
    copies: int
    reason: str


_STEP = "one op over all parameters, and the learning rate as a tensor"
_SCALES = "the same; whether a parameter's scale is known is found without reading it"
_CLIPPING = "one op for the norm, a scale from it, and one call that multiplies all gradients"
_TRAINED = "with the forward and the backward pass of what is around"
_PRODUCTS = "the same, with matrix products"
_ALONE = "one op, which makes its result"
_STORED = "once for each prompt or compression: blocks, and what is stored"
_CACHE = "a step that compresses nothing: one op, which stores the token, too"
_WHOLE = "where tokens keep their dtype: three projections, and on CPUs attention by the op, with where tokens end"
_RAGGED = "the same for two groups of heads, and results in their order"
_FEW_BITS = "a step that compresses nothing: three projections around what ZipCacheLayer does"
_PLANNED = "lengths on the device: places of tokens and of probes, all of which a graph captures or a compiler fuses"

HOST_BUDGETS = (
    HostBudget("optim.AdaBelief.step", 1, 1, 0, 1, _STEP),
    HostBudget("optim.AdamW.step", 1, 1, 0, 1, _STEP),
    HostBudget("optim.Adan.step", 1, 1, 0, 1, _STEP),
    HostBudget("optim.DiffGrad.step", 1, 1, 0, 1, _STEP),
    HostBudget("optim.LAMB.step", 2, 2, 0, 1, _STEP),
    HostBudget("optim.LARS.step", 1, 1, 0, 1, _STEP),
    HostBudget("optim.Lion.step", 1, 1, 0, 1, _STEP),
    HostBudget("optim.SGDSaI.step", 1, 11, 1, 1, _SCALES),
    HostBudget("optim.SST.step", 3, 3, 0, 3, _STEP),
    HostBudget("optim.clip_grad_norm_", 1, 9, 1, 1, _CLIPPING),
    HostBudget("nn.GroupRational", 2, 6, 1, 0, _TRAINED),
    HostBudget("nn.GRKAN", 2, 18, 1, 0, _TRAINED),
    HostBudget("nn.KATMLP", 4, 30, 1, 0, _TRAINED),
    HostBudget("nn.SSTLinear", 2, 37, 2, 0, _PRODUCTS),
    HostBudget("nn.LorentzLinear", 4, 39, 3, 1, _PRODUCTS),
    HostBudget("functional.lorentz", 1, 0, 0, 0, _ALONE),
    HostBudget("functional.sst_linear", 0, 12, 0, 0, _PRODUCTS),
    HostBudget("functional.rational", 1, 0, 0, 0, _ALONE),
    HostBudget("functional.quantize", 1, 11, 5, 2, _STORED),
    HostBudget("functional.dequantize", 1, 1, 1, 0, _ALONE),
    HostBudget("functional.decode_attention", 1, 0, 0, 0, _ALONE),
    HostBudget("functional.probe_saliency", 1, 14, 2, 0, _STORED),
    HostBudget("kv.ZipCacheLayer", 1, 2, 0, 0, _CACHE),
    HostBudget("kv.MatryoshkaLayer", 4, 8, 2, 0, _WHOLE),
    HostBudget("kv.MatryoshkaLayer, ragged ranks", 6, 22, 5, 0, _RAGGED),
    HostBudget("kv.MatryoshkaLayer, 4 and 2 bits", 4, 4, 2, 0, _FEW_BITS),
    HostBudget("kv.ZipCacheLayer, planned", 1, 9, 1, 0, _PLANNED),
    HostBudget("kv.MatryoshkaLayer, planned", 4, 12, 5, 0, _PLANNED),
    HostBudget("kv.MatryoshkaLayer, 4 and 2 bits, planned", 4, 19, 6, 0, _PLANNED),
)
