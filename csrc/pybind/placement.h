// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstring>
#include <deque>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "arrays.h"
#include "common/cuda.h"
#include "common/parallel.h"

namespace singlepass::pybind {

// How an op runs: "cpu" is the C++ engine on `workers` threads; "simt" is the CUDA launcher on the CPU in blocks of
// `threads` threads and, for optimizers, `chunk` elements.
struct Placement {
  std::string device;
  int threads, chunk, workers;

  void check() const {
    if (device != "cpu" && device != "simt")
      throw py::value_error("singlepass_core: expected device 'cpu' or 'simt'; got '" + device +
                            "'. Choose one of them.");
    if (workers < 1)
      throw py::value_error("singlepass_core: expected workers >= 1; got " + std::to_string(workers) + ".");
  }
};

// Cuts [0, n) in `workers` pieces, however small, each on a thread of its own.
inline ParallelFor parallel_for(int workers) {
  const auto run = [workers](int64_t n, int64_t, const ParallelFor::Body& body) {
    std::vector<std::thread> threads;
    for (int w = 0; w < workers; ++w) threads.emplace_back(body, n * w / workers, n * (w + 1) / workers);
    for (std::thread& thread : threads) thread.join();
  };
  return {run, workers};
}

[[noreturn]] inline void guards_overwritten(const char* what) {
  throw std::runtime_error(std::string(what) + " were stored to out of bounds");
}

// Runs launchers on the CPU. The device memory that they ask for is guarded.
class SimtGpu {
 public:
  Gpu where(const char* op) {
    return {op, nullptr,
            [this](int64_t bytes) {
              return static_cast<void*>(memory_.emplace_back(static_cast<std::size_t>(bytes)).data());
            },
            [this](int64_t count) {
              const simt::GuardedMemory& memory = tickets_.emplace_back(sizeof(unsigned) * static_cast<size_t>(count));
              std::memset(memory.data(), 0, memory.bytes());
              return reinterpret_cast<unsigned*>(memory.data());
            }};
  }

  void check_guards() const {
    for (const simt::GuardedMemory& memory : memory_)
      if (!memory.intact()) guards_overwritten("workspaces");
    for (const simt::GuardedMemory& memory : tickets_) {
      if (!memory.intact()) guards_overwritten("tickets");
      const auto is_zero = [](unsigned char byte) { return byte == 0; };
      if (!std::all_of(memory.data(), memory.data() + memory.bytes(), is_zero))
        throw std::runtime_error("tickets were not left at zero");
    }
  }

 private:
  std::deque<simt::GuardedMemory> memory_, tickets_;
};

}  // namespace singlepass::pybind
