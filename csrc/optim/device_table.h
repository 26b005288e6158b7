// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "common/parallel.h"
#include "optim/table.h"

namespace singlepass::optim {

// How a kernel is cut: threads per block (a multiple of 32, at most 256) and elements per block (a multiple of 8).
struct LaunchShape {
  int threads = 256;
  int chunk = 16384;

  bool operator==(const LaunchShape&) const = default;
};

// What the kernels read of a list of tensors, in device memory. It depends on addresses, sizes and dtypes alone, so a
// caller may keep it as long as these stay.
struct DeviceTable {
  const TensorRecord* records;
  const Chunk* chunks;
  unsigned* tickets;  // one per tensor and one for all, zero between launches
  double* norms;      // kNorms per tensor
  double* partials;   // kNorms per chunk
  int64_t tensor_count, chunk_count, longest_row;
  LaunchShape shape;
  bool all_float32;
};

// The host's copy of a table. It needs workspace_size bytes on the device.
struct HostTable {
  std::vector<TensorRecord> records;
  int64_t workspace_size;
  int64_t tensor_count, chunk_count, longest_row;
  LaunchShape shape;
  bool all_float32;
};

HostTable make_table(const std::vector<TensorRecord>& tensors, int state_count, LaunchShape shape = {});

// The table's parts inside `workspace`, device memory of table.workspace_size bytes, aligned to 16.
DeviceTable place_table(const HostTable& table, void* workspace);

// Copies the records through kernel arguments, and makes the rest of the table on the device: no pinned memory, no
// synchronisation, and a CUDA graph that captures the upload carries the contents with it.
void upload_table(const HostTable& table, void* workspace, const Gpu& gpu);

}  // namespace singlepass::optim
