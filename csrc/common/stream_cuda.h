// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "common/cuda.h"
#include "common/stream.h"

namespace singlepass {

// stream_cpu's counterpart; all pointers are aligned to 16.
cudaError_t launch_stream(const std::vector<const float*>& reads, const std::vector<float*>& updates, int64_t n,
                          cudaStream_t stream);

}  // namespace singlepass
