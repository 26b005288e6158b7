// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/parallel.h"
#include "kv/problem.h"

namespace singlepass::kv {

void quantize_cpu(const Codec& p, const ParallelFor& parallel_for);
void dequantize_cpu(const Codec& p, const ParallelFor& parallel_for);
void saliency_cpu(const Saliency& p, const ParallelFor& parallel_for);
void decode_cpu(const Decode& p, const ParallelFor& parallel_for);

}  // namespace singlepass::kv
