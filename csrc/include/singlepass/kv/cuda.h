// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "singlepass/common/cuda.h"
#include "singlepass/kv/problem.h"

namespace singlepass::kv {

// Each in one launch.
cudaError_t launch_quantize(const Codec& p, cudaStream_t stream);
cudaError_t launch_dequantize(const Codec& p, cudaStream_t stream);

}  // namespace singlepass::kv
