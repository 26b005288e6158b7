// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstring>
#include <list>
#include <mutex>

#include "optim/cuda.h"
#include "torch/device.h"

// Tables of tensors on the device, kept from one step to the next.
namespace singlepass::registration {

inline bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_launch("singlepass", cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

// Device tables by their contents. An entry belongs to one stream: its memory comes from that stream's pool and is only
// used on it, so that dropping the entry needs no synchronisation.
class TableCache {
 public:
  optim::DeviceTable get(const std::vector<optim::TensorRecord>& records, int state_count, const Tensor& like,
                         optim::LaunchShape shape = {}) {
    const int32_t device = like.get_device_index();
    const cudaStream_t stream = current_stream(device);
    if (is_capturing(stream)) {
      // The graph owns the memory and uploads the contents again at every replay.
      captured_ = optim::make_table(records, state_count, shape);
      const Tensor workspace = allocate(like, captured_.workspace_size);
      check_launch("singlepass", optim::upload_table(captured_, workspace.data_ptr(), stream));
      return optim::place_table(captured_, workspace.data_ptr());
    }
    for (auto entry = entries_.begin(); entry != entries_.end(); ++entry) {
      if (entry->device == device && entry->stream == stream && same(entry->table.records, records)) {
        entries_.splice(entries_.begin(), entries_, entry);
        return optim::place_table(entries_.front().table, entries_.front().workspace.data_ptr());
      }
    }
    optim::HostTable table = optim::make_table(records, state_count, shape);
    const Tensor workspace = allocate(like, table.workspace_size);
    check_launch("singlepass", optim::upload_table(table, workspace.data_ptr(), stream));
    entries_.push_front({device, stream, std::move(table), workspace});
    if (entries_.size() > kCapacity) entries_.pop_back();
    return optim::place_table(entries_.front().table, workspace.data_ptr());
  }

  std::mutex mutex;

 private:
  static constexpr size_t kCapacity = 64;

  struct Entry {
    int32_t device;
    cudaStream_t stream;
    optim::HostTable table;
    Tensor workspace;
  };

  static bool same(const std::vector<optim::TensorRecord>& a, const std::vector<optim::TensorRecord>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(optim::TensorRecord)) == 0;
  }

  std::list<Entry> entries_;
  optim::HostTable captured_;
};

inline TableCache& table_cache() {
  static TableCache* cache = new TableCache;  // outlives CUDA's own clean-up at exit
  return *cache;
}

}  // namespace singlepass::registration
