// SPDX-License-Identifier: Apache-2.0
#include "simt/simt_traffic.h"

#include <pthread.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "simt/simt.h"

// Bounds of the program or library that this is linked into: its constants stand in no device's global memory.
extern "C" {
extern const char __ehdr_start[] __attribute__((visibility("hidden")));
extern const char _end[] __attribute__((visibility("hidden")));
}

namespace simt {
namespace {

constexpr std::uintptr_t kSectorBytes = 32;
constexpr unsigned kBanks = 32, kBankBytes = 4;
constexpr unsigned kWidest = 16;  // bytes that an instruction accesses

struct Counter {
  bool counts = false;
  std::uintptr_t stack_begin = 0, stack_end = 0;  // of the thread that launches: kernels' arguments stand there
  Traffic traffic;
};

Counter& counter() {
  static Counter counter;
  return counter;
}

bool stands_in_memory(const void* address) {
  const auto place = reinterpret_cast<std::uintptr_t>(address);
  const bool constant = address >= __ehdr_start && address < _end;
  const bool argument = place >= counter().stack_begin && place < counter().stack_end;
  return !constant && !argument && !Fiber::on_stack(address);
}

// GCC stores a vector that is written out, {x, y, z, w}, one by one. A loop's stores are one instruction, and stay
// apart.
bool continues_vector(const Recorder::Access& last, const Recorder::Access& next) {
  return last.store && next.store && next.instruction > last.instruction && next.address == last.address + last.bytes &&
         last.address / kWidest == (next.address + next.bytes - 1) / kWidest;
}

// Of one group: the most words that its lanes want from one bank.
std::int64_t wavefronts_of(std::vector<std::uintptr_t>& words) {
  std::sort(words.begin(), words.end());
  words.erase(std::unique(words.begin(), words.end()), words.end());
  std::array<std::int64_t, kBanks> wanted = {};
  for (const std::uintptr_t word : words) ++wanted[word % kBanks];
  return *std::max_element(wanted.begin(), wanted.end());
}

// Lanes, in their order, go in groups of as many as access 128 bytes.
void count_shared(const Recorder::Lanes& lanes) {
  Traffic& traffic = counter().traffic;
  const unsigned group = kBanks * kBankBytes / std::max(lanes[0].bytes, kBankBytes);
  std::vector<std::uintptr_t> words;
  for (auto lane = lanes.begin(); lane != lanes.end();) {
    const unsigned number = lane->lane / group;
    words.clear();
    for (; lane != lanes.end() && lane->lane / group == number; ++lane)
      for (std::uintptr_t w = lane->address / kBankBytes; w <= (lane->address + lane->bytes - 1) / kBankBytes; ++w)
        words.push_back(w);
    traffic.shared_wavefronts += wavefronts_of(words);
    ++traffic.shared_ideal;
  }
  ++traffic.shared_requests;
}

void count_global(Recorder::Lanes& lanes) {
  Traffic& traffic = counter().traffic;
  std::sort(lanes.begin(), lanes.end(),
            [](const Recorder::Access& a, const Recorder::Access& b) { return a.address < b.address; });
  Request request = {static_cast<std::int64_t>(lanes[0].address), lanes[0].store, 0, 0, 0};
  std::uintptr_t distinct = 0, seen = 0, next_sector = 0;  // bytes, up to which address, and up to which sector
  for (const Recorder::Access& a : lanes) {
    const std::uintptr_t end = a.address + a.bytes;
    request.bytes += a.bytes;
    distinct += end - std::min(end, std::max(seen, a.address));
    seen = std::max(seen, end);
    for (std::uintptr_t sector = std::max(next_sector, a.address / kSectorBytes); sector * kSectorBytes < end;
         ++sector) {
      traffic.sectors.push_back(launches() << 43 | sector << 1 | static_cast<std::uint64_t>(a.store));
      next_sector = sector + 1;
      ++request.sectors;
    }
  }
  request.ideal = static_cast<std::int64_t>((distinct + kSectorBytes - 1) / kSectorBytes);
  traffic.requests.push_back(request);
}

}  // namespace

void start_counting() {
  Counter& c = counter();
  c = {};
  pthread_attr_t attributes;
  void* stack = nullptr;
  std::size_t bytes = 0;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &bytes);
  pthread_attr_destroy(&attributes);
  c.stack_begin = reinterpret_cast<std::uintptr_t>(stack);
  c.stack_end = c.stack_begin + bytes;
  c.counts = true;
}

const Traffic& finish_counting() {
  Counter& c = counter();
  c.counts = false;
  std::vector<std::uint64_t>& sectors = c.traffic.sectors;
  std::sort(sectors.begin(), sectors.end());
  sectors.erase(std::unique(sectors.begin(), sectors.end()), sectors.end());
  return c.traffic;
}

void Recorder::add_shared(const void* memory, std::size_t bytes) {
  if (bytes > 0) shared_.emplace_back(reinterpret_cast<std::uintptr_t>(memory), bytes);
}

void Recorder::enter(unsigned thread) {
  current_ = this;
  thread_ = thread;
}

void Recorder::access(const void* address, std::size_t bytes, bool store, const void* instruction) {
  if (!in_kernel_) return;
  const InRuntime pause;
  if (!counter().counts || !stands_in_memory(address)) return;
  const auto place = reinterpret_cast<std::uintptr_t>(address);
  const auto from = reinterpret_cast<std::uintptr_t>(instruction);
  Lanes& accesses = current_->threads_[current_->thread_];
  if (!accesses.empty() &&
      continues_vector(accesses.back(), {from, place, static_cast<unsigned>(bytes), 0, 0, store})) {
    accesses.back().bytes += static_cast<unsigned>(bytes);
    return;
  }
  for (std::size_t done = 0; done < bytes; done += kWidest) {  // a structure goes word by word
    const auto part = static_cast<unsigned>(std::min<std::size_t>(bytes - done, kWidest));
    accesses.push_back({from + done, place + done, part, current_->thread_ % kWarpSize, 0, store});
  }
}

void Recorder::meet(unsigned first, unsigned count) {
  for (unsigned warp = first; warp < first + count; warp += kWarpSize)
    count_warp(warp, std::min(warp + kWarpSize, first + count));
}

bool Recorder::is_shared(std::uintptr_t address) const {
  return std::any_of(shared_.begin(), shared_.end(),
                     [=](const auto& range) { return address - range.first < range.second; });
}

// Numbers each lane's accesses by an instruction, and puts those of one number together.
void Recorder::count_warp(unsigned first, unsigned last) {
  Lanes all;
  for (unsigned thread = first; thread < last; ++thread) {
    Lanes& accesses = threads_[thread];
    std::stable_sort(accesses.begin(), accesses.end(),
                     [](const Access& a, const Access& b) { return a.instruction < b.instruction; });
    for (std::size_t i = 1; i < accesses.size(); ++i)
      if (accesses[i].instruction == accesses[i - 1].instruction) accesses[i].turn = accesses[i - 1].turn + 1;
    all.insert(all.end(), accesses.begin(), accesses.end());
    accesses.clear();
  }
  const auto key = [](const Access& a) { return std::tuple(a.instruction, a.turn, a.lane); };
  std::sort(all.begin(), all.end(), [&](const Access& a, const Access& b) { return key(a) < key(b); });
  for (auto begin = all.begin(); begin != all.end();) {
    const auto end = std::find_if(begin, all.end(), [&](const Access& a) {
      return a.instruction != begin->instruction || a.turn != begin->turn;
    });
    Lanes lanes(begin, end);
    if (is_shared(begin->address)) {
      count_shared(lanes);
    } else {
      count_global(lanes);
    }
    begin = end;
  }
}

}  // namespace simt

// What the compiler calls. The instruction is where they return to.
#define SIMT_ACCESS(name, bytes, store)                                         \
  void __tsan_##name(void* address) {                                           \
    simt::Recorder::access(address, bytes, store, __builtin_return_address(0)); \
  }                                                                             \
  void __tsan_unaligned_##name(void* address) {                                 \
    simt::Recorder::access(address, bytes, store, __builtin_return_address(0)); \
  }
#define SIMT_ACCESSES(bytes)             \
  SIMT_ACCESS(read##bytes, bytes, false) \
  SIMT_ACCESS(write##bytes, bytes, true)

extern "C" {
SIMT_ACCESSES(1)
SIMT_ACCESSES(2)
SIMT_ACCESSES(4)
SIMT_ACCESSES(8)
SIMT_ACCESSES(16)
void __tsan_read_range(void* address, std::size_t bytes) {
  simt::Recorder::access(address, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, std::size_t bytes) {
  simt::Recorder::access(address, bytes, true, __builtin_return_address(0));
}

void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// Of the host's code beside kernels: reference counts, statics.
std::int8_t __tsan_atomic8_load(const volatile std::int8_t* address, int) {
  return __atomic_load_n(address, __ATOMIC_SEQ_CST);
}
std::int32_t __tsan_atomic32_load(const volatile std::int32_t* address, int) {
  return __atomic_load_n(address, __ATOMIC_SEQ_CST);
}
std::int32_t __tsan_atomic32_fetch_add(volatile std::int32_t* address, std::int32_t value, int) {
  return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}

// For ctypes: counting/traffic.py.
struct SimtCounted {
  const simt::Request* requests;
  std::int64_t request_count;
  const std::uint64_t* sectors;
  std::int64_t sector_count, shared_requests, shared_wavefronts, shared_ideal;
};
#define SIMT_EXPORTED __attribute__((visibility("default")))
SIMT_EXPORTED void simt_start_counting() {
  simt::start_counting();
}
SIMT_EXPORTED SimtCounted simt_finish_counting() {
  const simt::Traffic& t = simt::finish_counting();
  return {t.requests.data(), static_cast<std::int64_t>(t.requests.size()),
          t.sectors.data(),  static_cast<std::int64_t>(t.sectors.size()),
          t.shared_requests, t.shared_wavefronts,
          t.shared_ideal};
}
SIMT_EXPORTED std::uint64_t simt_launches() {
  return simt::launches();
}
}
