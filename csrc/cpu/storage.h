// What _C and the library _storage (storage.cpp) know of each other: functions of plain C types, because only
// one of the two is compiled against torch's stable headers.
#pragma once

#include <cstdint>

namespace mrcn {

// Memory that is handed out: where it begins, and what gives it back.
struct Lent {
  void* data;
  void* owner;
};

// What _C gives: memory of so many bytes, whose start is aligned to a cache line, and the way back.
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

// What _storage gives: a CPU tensor over such memory, as torch's stable headers handle tensors
// (AtenTensorHandle). If it throws, the memory is given back all the same.
using MakeTensor = void* (*)(const NewTensor&);

}  // namespace mrcn

// What _storage exports: the version of the torch that it was compiled for, and the connection of the two.
extern "C" {
__attribute__((visibility("default"))) const char* mrcn_storage_torch();
__attribute__((visibility("default"))) mrcn::MakeTensor mrcn_connect_storage(mrcn::Lender lender);
}
