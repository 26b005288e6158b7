// SPDX-License-Identifier: Apache-2.0
// Memory of exactly the size asked for, between guard bytes: an access outside is an AddressSanitizer report at once,
// and in a build without ASan a store outside is found by intact().
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#endif

#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace simt {

inline void asan_poison([[maybe_unused]] const void* begin, [[maybe_unused]] std::size_t bytes) {
#if defined(SIMT_ASAN)
  __asan_poison_memory_region(begin, bytes);
#endif
}

inline void asan_unpoison([[maybe_unused]] const void* begin, [[maybe_unused]] std::size_t bytes) {
#if defined(SIMT_ASAN)
  __asan_unpoison_memory_region(begin, bytes);
#endif
}

// Every float, bfloat16 and half made of these bytes is NaN, every signed integer is -1.
constexpr unsigned char kPoison = 0xff;

class GuardedMemory {
 public:
  // data() lies `misalignment` bytes past a multiple of kAlignment, and is filled with kPoison.
  explicit GuardedMemory(std::size_t bytes, std::size_t misalignment = 0)
      : bytes_(bytes), front_(kGuard + misalignment) {
    const std::size_t total = (front_ + bytes_ + kGuard + kAlignment - 1) / kAlignment * kAlignment;
    block_ = static_cast<unsigned char*>(std::aligned_alloc(kAlignment, total));
    if (block_ == nullptr) throw std::bad_alloc();
    std::memset(block_, kGuardByte, front_ + bytes_ + kGuard);
    std::memset(data(), kPoison, bytes_);
    close();
  }

  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  ~GuardedMemory() {
    open();
    std::free(block_);
  }

  unsigned char* data() const { return block_ + front_; }
  std::size_t bytes() const { return bytes_; }

  // False once anything but kGuardByte was stored in the guards.
  bool intact() const {
    open();
    bool intact = true;
    for (std::size_t i = 0; i < front_; ++i) intact &= block_[i] == kGuardByte;
    for (std::size_t i = 0; i < kGuard; ++i) intact &= data()[bytes_ + i] == kGuardByte;
    close();
    return intact;
  }

 private:
  static constexpr std::size_t kAlignment = 256;  // cudaMalloc's
  static constexpr std::size_t kGuard = 256;
  static constexpr unsigned char kGuardByte = 0xa5;

  void open() const { asan_unpoison(block_, front_ + bytes_ + kGuard); }

  // ASan marks 8 bytes at a time and only their tail: up to 7 guard bytes before data() are left to intact().
  void close() const {
    asan_poison(block_, front_);
    asan_poison(data() + bytes_, kGuard);
  }

  std::size_t bytes_;
  std::size_t front_;
  unsigned char* block_;
};

}  // namespace simt
