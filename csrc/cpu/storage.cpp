// The library _storage: tensors with ordinary resizable storages over the memory that _C lends.
//
// torch's stable headers cannot choose the allocator of a storage, and a tensor made with from_blob cannot be
// resized, which FSDP1 and some checkpointing wrappers do to free it. So this file, and no other, uses
// torch's own C++ classes. Their layout differs from one torch to the next: the library is loaded only with
// the torch for which it was compiled (mrcn_fast/backends/cpu.py). Without it everything works, but more
// slowly.
#include "cpu/storage.h"

#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>

namespace mrcn {
namespace {

Lender lender;

void give_back(void* owner) { lender.give_back(owner); }

c10::DataPtr owned(const Lent& memory) {
  return {memory.data, memory.owner, &give_back, c10::Device(c10::DeviceType::CPU)};
}

class LentMemory final : public c10::Allocator {
 public:
  // A resized storage takes its memory here too.
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, c10::Device(c10::DeviceType::CPU)};
    return owned(lender.take(int64_t(bytes)));
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

void* make_tensor(const NewTensor& made) {
  static LentMemory& allocator = *new LentMemory;  // storages may outlive every static object
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), made.bytes, owned(made.memory), &allocator, /*resizable=*/true);
  auto tensor = c10::make_intrusive<c10::TensorImpl>(c10::Storage(std::move(storage)),
      c10::DispatchKeySet(c10::DispatchKey::CPU), c10::scalarTypeToTypeMeta(c10::ScalarType(made.dtype)));
  const auto dimensions = size_t(made.dimensions);
  tensor->set_sizes_and_strides(
      c10::IntArrayRef(made.sizes, dimensions), c10::IntArrayRef(made.strides, dimensions));
  return new at::Tensor(std::move(tensor));
}

}  // namespace
}  // namespace mrcn

const char* mrcn_storage_torch() { return MRCN_TORCH_VERSION; }

mrcn::MakeTensor mrcn_connect_storage(mrcn::Lender lender) {
  mrcn::lender = lender;
  return &mrcn::make_tensor;
}
