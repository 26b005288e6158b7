// SPDX-License-Identifier: Apache-2.0
#pragma once

// Included before everything else in every file of the libraries: keeps them at symbols of glibc 2.28, the floor of
// manylinux_2_28 and of torch itself, whatever glibc they are built with.
#include <features.h>

#if defined(__GLIBC__) && !defined(__CUDA_ARCH__)
#if defined(__x86_64__)
#define SINGLEPASS_GLIBC_BASE "GLIBC_2.2.5"
#elif defined(__aarch64__)
#define SINGLEPASS_GLIBC_BASE "GLIBC_2.17"
#endif
#ifdef SINGLEPASS_GLIBC_BASE
// From glibc 2.29 on these have a second version, which differs in errno alone.
__asm__(".symver exp,exp@" SINGLEPASS_GLIBC_BASE);
__asm__(".symver log,log@" SINGLEPASS_GLIBC_BASE);
__asm__(".symver pow,pow@" SINGLEPASS_GLIBC_BASE);
// In libc from glibc 2.34 on; before, in libdl, which torch loads. Headers of torch 2.14 call it.
__asm__(".symver dlsym,dlsym@" SINGLEPASS_GLIBC_BASE);
#endif
// Of glibc 2.32. std::shared_ptr reads it, and counts with atomics where it is 0.
extern "C" {
__attribute__((weak, visibility("hidden"))) char __libc_single_threaded = 0;
}
#endif
