// The memory of a CPU operation's outputs.
//
// Small outputs are ordinary tensors. Large outputs reuse the memory of outputs that were freed: getting new
// pages from the system, which zeroes them, takes longer than the block. Their storages are torch's ordinary,
// resizable storages with an allocator of ours. Only the library _storage (storage.cpp), which is compiled
// against torch's own classes, can make them; where it is not connected, large outputs are ordinary tensors
// too.
#pragma once

#include <string>
#include <vector>

#include "arguments.h"

namespace mrcn {

// An output with uninitialized memory on the device of `like`.
Tensor make_output(
    const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like, bool channels_last);

// `count` feature maps of `like`'s dtype, which are written while the maps at `beside` are read. Large maps
// begin at places within their pages that differ from each other and from those of `beside`.
std::vector<Tensor> make_maps(int count, const std::vector<int64_t>& sizes, const Tensor& like,
    bool channels_last, std::vector<const void*> beside);

// Loads the library _storage, which must have been compiled for this version of torch. Returns why it can't
// be used, or "" if it can.
std::string connect_storage(const std::string& path, const std::string& torch_version);

// Gives back to the system the memory that is kept for the next outputs.
void release_memory();

// The bytes of large outputs in use, and the bytes kept for the next ones.
struct MemoryInUse {
  int64_t live, kept;
};
MemoryInUse memory_in_use();

}  // namespace mrcn
