// The memory of a CPU operation's outputs.
//
// Small outputs are ordinary tensors. Large ones take the memory of outputs that were freed, because to get
// new pages from the system, which zeroes each of them, takes longer than the block does. Their storages are
// torch's ordinary, resizable ones over an allocator of ours, which takes a library that knows torch's own
// classes (storage.cpp); where that library is not connected, large outputs are ordinary tensors too.
#pragma once

#include <string>
#include <vector>

#include "arguments.h"

namespace mrcn {

// An output with uninitialized memory, of the device of `like`.
Tensor make_output(
    const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like, bool channels_last);

// `count` feature maps of `like`'s dtype, which are written while the maps at `beside` are read: large ones
// begin apart from these and from one another within their pages.
std::vector<Tensor> make_maps(int count, const std::vector<int64_t>& sizes, const Tensor& like,
    bool channels_last, std::vector<const void*> beside);

// Loads the library that makes storages of kept memory, which must have been compiled for this version of
// torch. Returns why it can't be used, or "" if it can.
std::string connect_storage(const std::string& path, const std::string& torch_version);

// Gives back to the system the memory that is kept for the next outputs.
void release_memory();

// Bytes of large outputs that live, and bytes that are kept for the next ones.
struct MemoryInUse {
  int64_t live, kept;
};
MemoryInUse memory_in_use();

}  // namespace mrcn
