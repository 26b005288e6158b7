// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "torch/arguments.h"

// What registrations of CUDA ops share.
namespace singlepass::registration {

inline void check_launch(const char* op, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(error));
}

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  aoti_torch_get_current_cuda_stream(device, &stream);
  return static_cast<cudaStream_t>(stream);
}

inline Tensor allocate(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

}  // namespace singlepass::registration
