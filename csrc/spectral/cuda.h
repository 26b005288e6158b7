// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "common/cuda.h"
#include "optim/cuda.h"
#include "spectral/problem.h"
#include "spectral/step.h"

namespace singlepass::spectral {

// Into about how many thread blocks the tokens of a product are cut. Sizes alone decide, and so do the sums' bits.
inline constexpr int64_t kScaleLaunch = 1024;

// The numbers that p.partials needs room for.
int64_t scale_partials(const Scale& p, int64_t blocks = kScaleLaunch);

// In two launches: the product with partial sums, and their sums.
cudaError_t launch_scale(const Scale& p, cudaStream_t stream, int64_t blocks = kScaleLaunch);

// How records are cut for launch_step: short rows share a thread block, which has no more threads than a row needs.
inline constexpr optim::LaunchShape kStepShape = {128, 4096};

// Elements of a row that are kept in shared memory while its norm is found, a multiple of 8: with what the kernel has
// beside them they fill the 48 KiB that every device grants. What a row has beyond them is read and updated twice.
inline constexpr int64_t kHeldElements = 11264;

// In one launch for all tensors of the table.
cudaError_t launch_step(const optim::DeviceTable& table, const Rule::Hyper& hyper, const StepOptions& options,
                        cudaStream_t stream, int64_t held = kHeldElements);

// Bytes of device memory, aligned to 8, that launch_sample needs: one number for each place.
int64_t sample_workspace(const std::vector<Draw>& layers);

// A thread block for each layer; one launch for every kPieceLayers of them.
cudaError_t launch_sample(const std::vector<Draw>& layers, const DrawOptions& options, void* workspace,
                          cudaStream_t stream, int threads = 1024);

// A warp for each row that is exchanged; one launch for every kPiecePairs pairs.
cudaError_t launch_swap(const std::vector<Swap>& pairs, cudaStream_t stream, int threads = 256);

// A warp for each row; the backward pass adds up partial sums in a second launch.
cudaError_t launch_lorentz(const Lorentz& p, cudaStream_t stream, int threads = 256);
cudaError_t launch_lorentz_backward(const Lorentz& p, cudaStream_t stream, int threads = 256);

}  // namespace singlepass::spectral
