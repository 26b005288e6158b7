// SPDX-License-Identifier: Apache-2.0
#include <functional>

#include "common/parallel.h"
#include "kv/torch.h"
#include "optim/torch.h"
#include "rational/torch.h"
#include "spectral/torch.h"
#include "torch/stream.h"

// That of the ops, under which Python declares them: the name of the package.
#ifndef SINGLEPASS_NAMESPACE
#define SINGLEPASS_NAMESPACE singlepass
#endif

namespace singlepass::registration {
namespace {

// Runs ops on torch's threads.
class Cpu {
 public:
  Cpu(const char*, const Tensor&) {}

  ParallelFor where() const {
    const auto run = [](int64_t n, int64_t grain, const ParallelFor::Body& body) {
      torch::stable::parallel_for(0, n, grain, body);
    };
    return {run, torch::stable::get_num_threads()};
  }

  const std::vector<TensorRecord>& table(const std::vector<TensorRecord>& records, int, optim::LaunchShape = {}) const {
    return records;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SINGLEPASS_NAMESPACE, CPU, m) {
  register_kv<Cpu>(m);
  register_optim<Cpu>(m);
  register_rational<Cpu>(m);
  register_spectral<Cpu>(m);
  register_stream<Cpu>(m);
}

}  // namespace singlepass::registration
