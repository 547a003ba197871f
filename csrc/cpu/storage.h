// The interface between _C and the library _storage (storage.cpp). It has plain C types, because only one of
// the two is compiled against torch's stable headers.
#pragma once

#include <cstdint>

namespace mrcn {

// Memory on loan: where it begins, and what to return it with.
struct Lent {
  void* data;
  void* owner;
};

// What _C provides: memory of `bytes` bytes, aligned to a cache line, and the function that returns it.
struct Lender {
  Lent (*take)(int64_t bytes);
  void (*give_back)(void* owner);
};

struct NewTensor {
  Lent memory;
  int64_t bytes;
  const int64_t* sizes;
  const int64_t* strides;
  int64_t dimensions;
  int32_t dtype;  // as aoti_torch_dtype_float32() and its like number them
};

// What _storage provides: a CPU tensor over such memory, as a handle of torch's stable headers
// (AtenTensorHandle). If it throws, the memory has been returned.
using MakeTensor = void* (*)(const NewTensor&);

}  // namespace mrcn

// What _storage exports: the version of torch for which it was compiled, and the function that connects the
// two.
extern "C" {
__attribute__((visibility("default"))) const char* mrcn_storage_torch();
__attribute__((visibility("default"))) mrcn::MakeTensor mrcn_connect_storage(mrcn::Lender lender);
}
