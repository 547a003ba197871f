// Scratch memory of one call. std::vector would not do: simd.h says why nothing of the C++ library is used.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "cpu/no_memory.h"

namespace mrcn::MRCN_ISA {
namespace {

template <class T>
struct Buffer {
  T* data = nullptr;

  Buffer() = default;
  explicit Buffer(int64_t count) { allocate(count); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data); }

  void allocate(int64_t count) {
    if (count <= 0) return;
    const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
    data = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (data == nullptr) no_memory(int64_t(bytes));
  }
};

}  // namespace
}  // namespace mrcn::MRCN_ISA
