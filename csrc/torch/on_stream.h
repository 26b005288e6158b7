// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstring>
#include <list>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "common/cuda.h"
#include "optim/device_table.h"
#include "torch/arguments.h"

namespace singlepass::registration {

inline Tensor device_memory(const Tensor& like, int64_t bytes) {
  const Tensor memory = new_tensor(like, {bytes}, ScalarType::Byte);
#if defined(SINGLEPASS_SIMT)
  if (bytes > 0) std::memset(memory.data_ptr(), 0xff, static_cast<size_t>(bytes));  // NaN: nothing may rely on zeros
#endif
  return memory;
}

inline bool is_capturing(const Gpu& gpu) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(gpu.op, cudaStreamIsCapturing(gpu.stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

// Tables of tensors on the device by their contents, kept from one step to the next. An entry belongs to one stream:
// its memory comes from that stream's pool and is only used on it, so that dropping the entry needs no synchronisation.
class TableCache {
 public:
  // A table, and the memory that it stands in, which the caller keeps until it has launched what reads it.
  std::pair<optim::DeviceTable, Tensor> get(const std::vector<optim::TensorRecord>& records, int state_count,
                                            optim::LaunchShape shape, const Tensor& like, const Gpu& gpu) {
    if (is_capturing(gpu)) {
      // The graph owns the memory and uploads the contents again at every replay.
      const Entry entry = make(records, state_count, shape, like, gpu);
      return {entry.place(), entry.memory};
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto same = [&](const Entry& e) {
      return e.device == like.get_device_index() && e.stream == gpu.stream && e.table.shape == shape &&
             e.table.records.size() == records.size() &&
             std::memcmp(e.table.records.data(), records.data(), records.size() * sizeof(optim::TensorRecord)) == 0;
    };
    const auto found = std::find_if(entries_.begin(), entries_.end(), same);
    if (found == entries_.end()) {
      entries_.push_front(make(records, state_count, shape, like, gpu));
      if (entries_.size() > kCapacity) entries_.pop_back();
    } else {
      entries_.splice(entries_.begin(), entries_, found);
    }
    return {entries_.front().place(), entries_.front().memory};
  }

 private:
  static constexpr size_t kCapacity = 64;

  struct Entry {
    int32_t device;
    cudaStream_t stream;
    optim::HostTable table;
    Tensor memory;

    optim::DeviceTable place() const { return optim::place_table(table, memory.data_ptr()); }
  };

  static Entry make(const std::vector<optim::TensorRecord>& records, int state_count, optim::LaunchShape shape,
                    const Tensor& like, const Gpu& gpu) {
    const optim::HostTable table = optim::make_table(records, state_count, shape);
    const Tensor memory = device_memory(like, table.workspace_size);
    optim::upload_table(table, memory.data_ptr(), gpu);
    return {like.get_device_index(), gpu.stream, table, memory};
  }

  std::mutex mutex_;
  std::list<Entry> entries_;
};

inline TableCache& table_cache() {
  static TableCache* cache = new TableCache;  // outlives CUDA's own clean-up at exit
  return *cache;
}

// Numbers that are zero between launches, kept from one call to the next, which takes no time to clear them. As with
// tables, an entry belongs to one stream: what is launched on it runs one after the other.
class TicketCache {
 public:
  // At least so many, and the memory that they stand in, which the caller keeps until it has launched what uses them.
  std::pair<unsigned*, Tensor> get(int64_t count, const Tensor& like, const Gpu& gpu) {
    if (is_capturing(gpu)) return made(count, like, gpu);  // the graph owns the memory, and clears it at every replay
    const std::lock_guard<std::mutex> lock(mutex_);
    Entry& entry = entries_[{like.get_device_index(), gpu.stream}];
    if (entry.count < count) {
      entry.count = std::max<int64_t>(count, kLeast);
      std::tie(entry.tickets, entry.memory) = made(entry.count, like, gpu);
    }
    return {entry.tickets, entry.memory};
  }

 private:
  static constexpr int64_t kLeast = 1024;

  struct Entry {
    int64_t count = 0;
    unsigned* tickets = nullptr;
    Tensor memory;
  };

  static std::pair<unsigned*, Tensor> made(int64_t count, const Tensor& like, const Gpu& gpu) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(unsigned));
    const Tensor memory = device_memory(like, bytes);
    check_cuda(gpu.op, cudaMemsetAsync(memory.data_ptr(), 0, static_cast<size_t>(bytes), gpu.stream));
    return {static_cast<unsigned*>(memory.data_ptr()), memory};
  }

  std::mutex mutex_;
  std::map<std::pair<int32_t, cudaStream_t>, Entry> entries_;
};

inline TicketCache& ticket_cache() {
  static TicketCache* cache = new TicketCache;  // outlives CUDA's own clean-up at exit
  return *cache;
}

// Runs ops on the device of `like`, on a stream. Memory that they ask for lives as long as this object, and then serves
// what is launched on that stream later.
class OnStream {
 public:
  OnStream(const char* op, const Tensor& like, cudaStream_t stream)
      : like_(like),
        gpu_{op, stream, [this](int64_t bytes) { return kept_.emplace_back(device_memory(like_, bytes)).data_ptr(); },
             [this](int64_t count) {
               const auto [tickets, memory] = ticket_cache().get(count, like_, gpu_);
               kept_.push_back(memory);
               return tickets;
             }} {}
  OnStream(const OnStream&) = delete;
  OnStream& operator=(const OnStream&) = delete;

  const Gpu& where() const { return gpu_; }

  optim::DeviceTable table(const std::vector<optim::TensorRecord>& records, int states,
                           optim::LaunchShape shape = {}) const {
    const auto [table, memory] = table_cache().get(records, states, shape, like_, gpu_);
    kept_.push_back(memory);
    return table;
  }

 private:
  const Tensor& like_;
  mutable Tensors kept_;
  Gpu gpu_;
};

}  // namespace singlepass::registration
