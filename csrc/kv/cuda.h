// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/cuda.h"
#include "kv/problem.h"

namespace singlepass::kv {

// Each in one launch.
cudaError_t launch_quantize(const Codec& p, cudaStream_t stream);
cudaError_t launch_dequantize(const Codec& p, cudaStream_t stream);

// The bytes of device memory, aligned to 8, that launch_saliency needs for the rows' sums.
int64_t saliency_workspace(const Saliency& p);

// In two launches, or in one where the logarithms of sums are given.
cudaError_t launch_saliency(const Saliency& p, void* workspace, cudaStream_t stream);

// Of how many segments decode takes tokens.
inline constexpr size_t kMaxSegments = 4;

// Into how many spans of slots the work of a head is cut. It depends on the shapes of a sequence alone, so that its
// results are the same bits in every batch and on every GPU.
struct DecodeCut {
  int64_t spans = 64;                      // about, for eight rows of queries; fewer for more
  int64_t least = 128, window_least = 32;  // slots
};

// The bytes of device memory, aligned to 4, that launch_decode needs for the spans' results.
int64_t decode_workspace(const Decode& p, const DecodeCut& cut = {});

// In two launches: a softmax over each span, then their merging in the order of spans.
cudaError_t launch_decode(const Decode& p, void* workspace, cudaStream_t stream, const DecodeCut& cut = {});

}  // namespace singlepass::kv
