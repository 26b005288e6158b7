// SPDX-License-Identifier: Apache-2.0
#pragma once

// SINGLEPASS_HD marks mathematics that is compiled for the host and for the device.
#if defined(__CUDACC__)
#define SINGLEPASS_HD __host__ __device__ __forceinline__
#elif defined(SINGLEPASS_SIMT)
#define SINGLEPASS_HD inline  // as __forceinline__ is in simt/simt_types.h
#else
#define SINGLEPASS_HD inline __attribute__((always_inline))
#endif

// SINGLEPASS_TARGET_CLONES: one loop compiled for SSE2, AVX2 and AVX-512, chosen when the library is loaded. A loop
// whose vectors have a width of their own for AVX-512 is written twice, with SINGLEPASS_TARGET_AVX512 and with clones
// up to AVX2; the caller chooses by has_avx512(). Where SINGLEPASS_HAS_TARGETS is defined, a loop can also be written
// for one of them alone. Sanitizers and other architectures take the plain build, and SINGLEPASS_NO_AVX512 shows what a
// processor without AVX-512 would run.
#if !defined(__x86_64__) || defined(__CUDACC__) || defined(SINGLEPASS_NO_TARGET_CLONES)
#define SINGLEPASS_TARGET_CLONES
#define SINGLEPASS_TARGET_CLONES_TO_AVX2
#define SINGLEPASS_TARGET_AVX512
#undef SINGLEPASS_NO_AVX512
#define SINGLEPASS_NO_AVX512
#else
#define SINGLEPASS_HAS_TARGETS
#define SINGLEPASS_TARGET_AVX2 __attribute__((target("arch=x86-64-v3")))
#define SINGLEPASS_TARGET_CLONES_TO_AVX2 __attribute__((target_clones("default", "arch=x86-64-v3")))
#define SINGLEPASS_TARGET_AVX512 __attribute__((target("arch=x86-64-v4")))
#if defined(SINGLEPASS_NO_AVX512)
#define SINGLEPASS_TARGET_CLONES SINGLEPASS_TARGET_CLONES_TO_AVX2
#else
#define SINGLEPASS_TARGET_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#endif
#endif

// A function in which a * b + c is rounded once where the processor has an instruction for it. Elsewhere it is rounded
// twice, so that processors, and the CUDA kernels run on them, give the same bits.
#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#define SINGLEPASS_FUSED_MULTIPLY_ADD __attribute__((optimize("fp-contract=fast")))
#else
#define SINGLEPASS_FUSED_MULTIPLY_ADD
#endif
